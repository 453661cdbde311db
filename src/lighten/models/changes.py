"""What tells a changed network from a freshly built one, as plain data, and the way back. Knows no files.

A change is one of: plain attributes that differ (`set`), parameters that are gone (`none`), children that are gone from
a container (`remove`), a module that became a small tree of known layers (`replace`). The data may come from a stranger:
nothing in it is looked up but names that the fresh network already has and layers of the table below.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadModel

LIMIT = 2**24
"""No channel count, size or setting of a vision network is larger."""
DEPTH = 8

CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode")
BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
POOL = ("kernel_size", "stride", "padding")
LAYERS: dict[str, tuple[str, ...]] = {
    "Sequential": (),
    "Identity": (),
    "Conv1d": CONV,
    "Conv2d": CONV,
    "ConvTranspose2d": (*CONV, "output_padding"),
    "Linear": ("in_features", "out_features", "bias"),
    "BatchNorm1d": BATCH_NORM,
    "BatchNorm2d": BATCH_NORM,
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias"),
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    "ReLU": ("inplace",),
    "ReLU6": ("inplace",),
    "LeakyReLU": ("negative_slope", "inplace"),
    "Hardtanh": ("min_val", "max_val", "inplace"),
    "Hardswish": ("inplace",),
    "Hardsigmoid": ("inplace",),
    "SiLU": ("inplace",),
    "GELU": ("approximate",),
    "Sigmoid": (),
    "Tanh": (),
    "Dropout": ("p", "inplace"),
    "Flatten": ("start_dim", "end_dim"),
    "MaxPool2d": (*POOL, "dilation", "ceil_mode"),
    "AvgPool2d": (*POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "AdaptiveAvgPool2d": ("output_size",),
}
"""The layers of `torch.nn` that may stand in for a module, with the arguments that make one."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
OWN = frozenset(vars(nn.Module()))
"""What every module has, whatever it computes: its stores, its hooks, whether it trains."""
DESCRIPTIONS = ("pretrained_cfg", "default_cfg")
"""timm's remarks about weights; the network does not read them."""
ADVICE = (
    "A GraphModule, a quantized network, a mask or a layer of its own cannot be described; save it before that step."
)


# --- telling apart --------------------------------------------------------------------------------------


def difference(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """The changes that make `old` into `new`, values of weights aside, by module name ("" is the network itself).

    Raises BadModel naming the module whose change cannot be described.
    """
    if _swapped(old, new):
        raise BadModel(f"The network is a {_kind(new)}, but the original is a {_kind(old)}.", ADVICE)
    found: dict[str, Any] = {}
    _compare("", old, new, found)
    return found


def _compare(name: str, old: nn.Module | None, new: nn.Module | None, found: dict[str, Any]) -> None:
    if _swapped(old, new):
        found[name] = {"replace": _tree(name, new)}
    elif old is not None and new is not None:
        _check_describable(name, old, new)
        row = {"set": _attributes(name, old, new), "none": _emptied(name, old, new), "remove": _removed(name, old, new)}
        if any(row.values()):
            found[name] = {k: v for k, v in row.items() if v}
        for child in new._modules:
            _compare(f"{name}.{child}" if name else child, old._modules[child], new._modules[child], found)


def _swapped(old: nn.Module | None, new: nn.Module | None) -> bool:
    """Whether `new` is something else than `old` with changed settings."""
    if old is None or new is None:
        return old is not new
    left = [k for k in old._modules if k in new._modules]
    return not _same_class(type(old), type(new)) or left != list(new._modules)


def _same_class(old: type, new: type) -> bool:
    """A class from a user's file is another object each time the file is read; it is known by its name."""
    if old is new:
        return True
    known = ("torch", "torchvision", "timm", "torchao")
    foreign = all(c.__module__.partition(".")[0] not in known for c in (old, new))
    return old.__qualname__ == new.__qualname__ and (foreign or old.__module__ == new.__module__)


def _check_describable(name: str, old: nn.Module, new: nn.Module) -> None:
    if isinstance(new, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise BadModel(f"{_where(name)} is a {_kind(new)}, which is code.", ADVICE)
    if type(new).get_extra_state is not nn.Module.get_extra_state:
        raise BadModel(f"{_where(name)} ({_kind(new)}) keeps state that is no tensor.", ADVICE)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if len(getattr(new, hooks)) > len(getattr(old, hooks)):
            raise BadModel(f"{_where(name)} ({_kind(new)}) has a forward hook.", "Remove it before saving.")


def _attributes(name: str, old: nn.Module, new: nn.Module) -> dict[str, Any]:
    before, after = _settings(old), _settings(new)
    added = [k for k in after if k not in before and (not k.startswith("_") or hasattr(type(new), k))]
    if strange := [*added, *(k for k in before if k not in after)]:
        raise BadModel(f"{_where(name)} ({_kind(new)}) differs in having the attribute {strange[0]!r} or not.", ADVICE)
    changed = {k: _bare(v) for k, v in after.items() if k in before and not _same(before[k], v)}
    for key, value in changed.items():
        if not _fits(before[key], value):
            raise BadModel(f"{_where(name)} ({_kind(new)}) has a changed {key!r} that is no plain value.", ADVICE)
    return changed


def _settings(module: nn.Module) -> dict[str, Any]:
    passing = (*OWN, *DESCRIPTIONS)
    return {k: v for k, v in vars(module).items() if k not in passing and "cache" not in k}


def _emptied(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    gone: list[str] = []
    for store in ("_parameters", "_buffers"):
        before, after = getattr(old, store), getattr(new, store)
        if strange := sorted(set(before) ^ set(after)):
            raise BadModel(f"{_where(name)} ({_kind(new)}) differs in having the tensor {strange[0]!r} or not.", ADVICE)
        gone += [k for k, v in after.items() if v is None and before[k] is not None]
    return gone


def _removed(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    gone = [k for k in old._modules if k not in new._modules]
    if gone and not isinstance(old, CONTAINERS):
        raise BadModel(
            f"{_where(name)} ({_kind(new)}) has no {gone[0]!r} any more.", "Put an nn.Identity in its place."
        )
    return gone


def _tree(name: str, module: nn.Module | None) -> dict[str, Any]:
    if module is None:
        return {"type": "None"}
    kind = _kind(module)
    if kind not in LAYERS or type(module) is not getattr(nn, kind):
        raise BadModel(f"{name} became a {type(module).__module__}.{kind}, which is no layer of the table.", ADVICE)
    made: dict[str, Any] = {"type": kind, "arguments": {k: _argument(module, k) for k in LAYERS[kind]}}
    if module._modules:
        made["children"] = {k: _tree(f"{name}.{k}", m) for k, m in module._modules.items()}
    return made


def _argument(module: nn.Module, key: str) -> Any:
    return module.bias is not None if key == "bias" else _bare(getattr(module, key))


def _same(a: Any, b: Any, depth: int = DEPTH) -> bool:
    """Equal as far as a module could notice; functions by name, modules by class (their own names hold the rest)."""
    if a is b:
        return True
    if is_plain(a) and is_plain(_bare(b)):
        return _type(a) == _type(_bare(b)) and _listed(a) == _listed(_bare(b))
    if not _same_class(type(a), type(b)) or depth == 0:
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, nn.Module):
        return True
    if isinstance(a, functools.partial):
        return _same([a.func, a.args, a.keywords], [b.func, b.args, b.keywords], depth - 1)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y, depth - 1) for x, y in zip(a, b))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[k], b[k], depth - 1) for k in a)
    if hasattr(a, "__qualname__"):
        return a.__qualname__ == b.__qualname__
    if isinstance(a, float | str | int | set | frozenset | torch.dtype | torch.device):
        return bool(a == b) or (a != a and b != b)
    return _same(dict(getattr(a, "__dict__", {})), dict(getattr(b, "__dict__", {})), depth - 1)


# --- plain values ---------------------------------------------------------------------------------------


def is_plain(value: Any, depth: int = 3) -> bool:
    """A bounded finite number, a short text, a truth value, None, or a short sequence of them."""
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 256 and all(is_plain(v, depth - 1) for v in value)
    if isinstance(value, str):
        return len(value) <= 256
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= LIMIT
    return value is None


def _bare(value: Any) -> Any:
    """Whole numbers of numpy and their like as Python's."""
    if isinstance(value, list | tuple):
        return [_bare(v) for v in value]
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _type(value: Any) -> str:
    return "sequence" if isinstance(value, list | tuple) else type(value).__name__


def _fits(old: Any, new: Any) -> bool:
    """Whether `new` may take the place of `old`: plain both, and of the same kind; 3 for (3, 3) and 1 for 0.5 too."""
    if not (is_plain(old) and is_plain(new)):
        return False
    pair = (_type(old), _type(new))
    return (
        pair[0] == pair[1] or "NoneType" in pair or pair in (("float", "int"), ("int", "sequence"), ("sequence", "int"))
    )


def _like(old: Any, new: Any) -> Any:
    """`new` in the containers of `old`: JSON knows no tuples."""
    if not isinstance(new, list | tuple):
        return new
    inner = [_like(o, n) for o, n in zip(old, new)] if isinstance(old, list | tuple) and len(old) == len(new) else None
    made = inner if inner is not None else [_like(None, v) for v in new]
    return made if isinstance(old, list) else tuple(made)


# --- the way back ---------------------------------------------------------------------------------------


def apply(model: nn.Module, changes: Any) -> None:
    """Make `changes` in `model`, in place; new layers have no storage yet (meta). Raises BadModel on anything else."""
    if not isinstance(changes, dict):
        raise BadModel("The description's changes are no table.", "")
    for name, row in changes.items():
        if not isinstance(row, dict) or not row or set(row) - {"set", "none", "remove", "replace"}:
            raise BadModel(f"The description of {_where(name)} says what cannot be said of a module.", "")
        if "replace" in row:
            _replace(model, name, row["replace"])
            continue
        module = _find(model, name)
        for child in _texts(name, row.get("remove", [])):
            _remove(name, module, child)
        for key in _texts(name, row.get("none", [])):
            _empty(name, module, key)
        _set(name, module, row.get("set", {}))


def _find(model: nn.Module, name: str) -> nn.Module:
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = module._modules.get(part) if module is not None else None
    if module is None:
        raise BadModel(f"The description changes {_where(name)}, which the architecture does not have.", "")
    return module


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadModel(f"The description of {_where(name)} holds no list of names where one belongs.", "")
    return value


def _remove(name: str, module: nn.Module, child: str) -> None:
    if not isinstance(module, CONTAINERS) or child not in module._modules:
        raise BadModel(f"The description removes {child!r} of {_where(name)}, which cannot be removed.", "")
    del module._modules[child]


def _empty(name: str, module: nn.Module, key: str) -> None:
    stores = [s for s in (module._parameters, module._buffers) if key in s]
    if not stores:
        raise BadModel(f"The description empties {key!r} of {_where(name)}, which is no tensor of it.", "")
    stores[0][key] = None


def _set(name: str, module: nn.Module, values: Any) -> None:
    if not isinstance(values, dict):
        raise BadModel(f"The description of {_where(name)} holds no settings where they belong.", "")
    have = _settings(module)
    for key, value in values.items():
        if key not in have or key.startswith("__") or not _fits(have[key], value):
            raise BadModel(
                f"The description sets {key!r} of {_where(name)} ({_kind(module)}), which is not a plain setting of it "
                "or not to such a value.",
                "",
            )
        vars(module)[key] = _like(have[key], value)


def _replace(model: nn.Module, name: str, tree: Any) -> None:
    parent, _, child = name.rpartition(".")
    owner = _find(model, parent)
    if not child or child not in owner._modules:
        raise BadModel(f"The description replaces {_where(name)}, which the architecture does not have.", "")
    with torch.device("meta"):  # sizes in a stranger's file reserve no memory
        owner._modules[child] = _made(name, tree, DEPTH)


def _made(name: str, tree: Any, depth: int) -> nn.Module | None:
    if not isinstance(tree, dict) or set(tree) - {"type", "arguments", "children"} or depth == 0:
        raise BadModel(f"The description of what {name} became is malformed or too deep.", "")
    kind, arguments, children = tree.get("type"), tree.get("arguments", {}), tree.get("children", {})
    if kind == "None" and not arguments and not children:
        return None
    if not isinstance(kind, str) or kind not in LAYERS:
        raise BadModel(f"{name} became a {kind!r}, which is no layer that a description may name.", "")
    if (
        not isinstance(arguments, dict)
        or set(arguments) != set(LAYERS[kind])
        or not all(map(is_plain, arguments.values()))
    ):
        raise BadModel(f"The arguments of {name} ({kind}) are not those of a {kind}.", "")
    try:
        module: nn.Module = getattr(nn, kind)(**{k: _like(None, v) for k, v in arguments.items()})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise BadModel(f"No {kind} can be made for {name}: {str(e).splitlines()[0] if str(e) else kind}.", "") from e
    _adopt(name, module, children, depth)
    return module


def _adopt(name: str, module: nn.Module, children: Any, depth: int) -> None:
    if not isinstance(children, dict) or (children and type(module) is not nn.Sequential):
        raise BadModel(f"{name} ({_kind(module)}) cannot have modules inside.", "")
    for child, tree in children.items():
        if not (child.isdigit() or child.isidentifier()) or hasattr(module, child):
            raise BadModel(f"{child!r} is no name for a module inside {name}.", "")
        module.add_module(child, _made(f"{name}.{child}", tree, depth - 1))


# --- whether sizes agree --------------------------------------------------------------------------------


def check_sizes(model: nn.Module) -> None:
    """Every layer's weights have the sizes that its attributes say. Raises BadModel naming the first that has not."""
    for name, module in model.named_modules():
        for key, want in _sizes(module).items():
            have = getattr(module, key, None)
            if isinstance(have, Tensor) and tuple(have.shape) != want:
                raise BadModel(
                    f"{_where(name)} ({_kind(module)}) says its {key} is {want}, but it is {tuple(have.shape)}.",
                    "The description and the weights belong to different networks.",
                )


def _sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        i, o, g = module.in_channels, module.out_channels, max(1, module.groups)
        first = (i, o // g) if module.transposed else (o, i // g)
        return {"weight": (*first, *module.kernel_size), "bias": (o,)}
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))
    if isinstance(module, nn.LayerNorm):
        return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (module.num_channels,))
    return {}


def _where(name: Any) -> str:
    return repr(name) if name else "the network itself"


def _kind(module: nn.Module | None) -> str:
    return type(module).__name__
