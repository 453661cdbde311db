"""Models in: an architecture by name, weights without unpickling code, every mismatch named."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadModel, UnknownName, UntrustedCode
from lighten.models import detectors
from lighten.plugins import require
from lighten.types import Preprocess

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")


def build(arch: str, *, classes: int | None = None, trust_code: bool = False) -> nn.Module:
    """The architecture with random weights.

    `arch` is `torchvision:NAME`, `timm:NAME`, `lighten:NAME`, or `FILE.py:CALLABLE` (only with `trust_code`, since it
    runs the file). Raises UnknownName with the nearest names, or UntrustedCode.
    """
    home, _, name = arch.rpartition(":")
    if home.endswith(".py"):
        return _from_file(Path(home), name, classes, trust_code)
    if home not in ("torchvision", "timm", "lighten"):
        raise BadModel(
            f"--arch {arch!r} does not say where the architecture comes from.",
            "Write torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE.",
        )
    options = {} if classes is None else {"num_classes": classes}
    if home == "torchvision":
        models = require("torchvision", "compress", f"build {arch}").models
        if name in models.list_models(module=models.detection):
            return detectors.build(name, classes)
        _known("torchvision architecture", name, models.list_models())
        return models.get_model(name, weights=None, **options)
    if home == "timm":
        timm = require("timm", "compress", f"build {arch}")
        _known("timm architecture", name.split(".")[0], timm.list_models())
        if "." in name:  # the tag says which preprocessing the weights were trained with
            _known("timm architecture with weights", name, timm.list_pretrained())
        return timm.create_model(name, pretrained=False, **options)
    from lighten.models import builders

    _known("lighten architecture", name, builders())
    return builders()[name](**options)


def read_weights(path: Path, *, inner: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a `.safetensors` or a weights-only `.pth`, and notices of what was unwrapped.

    Never runs code of the file. Raises BadModel for what is missing, empty, truncated, a web page, a Git LFS pointer,
    a pickle with code, or holds NaN.
    """
    _check_file(path)
    if _looks_like_safetensors(path):
        raw = _read_safetensors(path)
    else:
        raw = _read_torch(path)
    tensors, notices = _unwrap(raw, path, inner)
    _check_finite(path, tensors)
    return tensors, notices


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file under their own names. Raises BadModel as `read_weights` does."""
    _check_file(path)
    tensors = _read_safetensors(path)
    _check_finite(path, tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing of other files. Raises BadModel as `read_weights` does."""
    from safetensors import SafetensorError, safe_open

    _check_file(path)
    if not _looks_like_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as e:
        raise _damaged(path, e) from e


def load(
    path: Path, arch: str | None, *, classes: int | None = None, trust_code: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """Architecture plus weights, in eval mode, on the CPU. The number of classes is read off the weights if not given.

    A checkpoint that describes itself (`lighten.models.saved`) needs no `arch`; one that is given must agree.
    """
    from lighten.models import saved

    if (told := saved.told(path)) is not None:
        saved.agree(told, path, arch, classes)
        return saved.load(path, trust_code=trust_code), ()
    if not arch:
        raise BadModel(f"{path} does not say which architecture it belongs to.", "Give --arch.")
    tensors, notices = read_weights(path)
    if classes is None:
        classes = _count_classes(arch, tensors, trust_code)
    model = build(arch, classes=classes, trust_code=trust_code)
    fill(model, tensors, str(path), arch)
    return model.eval(), notices


def fill(model: nn.Module, tensors: dict[str, Tensor], where: str, arch: str) -> None:
    """Copy `tensors` into `model`. Raises BadModel listing each missing, unknown and misshapen key."""
    want = model.state_dict()
    tensors = _named_as(want, tensors)
    optional = {k for k in want if k.endswith("num_batches_tracked")}
    missing = [k for k in want if k not in tensors and k not in optional]
    unknown = [k for k in tensors if k not in want]
    shapes = [
        f"{k}: file {tuple(tensors[k].shape)}, model {tuple(want[k].shape)}"
        for k in want
        if k in tensors and tensors[k].shape != want[k].shape
    ]
    if missing or unknown or shapes:
        rows = [*(f"missing {k}" for k in missing), *(f"unknown {k}" for k in unknown), *shapes]
        shown = "\n  ".join(rows[:12]) + (f"\n  ... and {len(rows) - 12} more" if len(rows) > 12 else "")
        raise BadModel(
            f"{where} does not fit {arch}:\n  {shown}",
            "Check --arch and --classes against the training code.",
        )
    model.load_state_dict(tensors, strict=False)


def _named_as(want: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model whose own names start with one of the prefixes that `read_weights` takes off gets it back."""
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in want) and not any(k.startswith(prefix) for k in tensors):
            return {prefix + k: v for k, v in tensors.items()}
    return tensors


def own_preprocess(arch: str, model: nn.Module) -> Preprocess | None:
    """What timm or torchvision say of the weights of this architecture; None where they say nothing, or something
    that `Preprocess` cannot hold (padding, or a centre cut of a stretched image)."""
    if isinstance(model, detectors.TorchvisionRaw):
        return model.preprocess()
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean") and config.get("input_size"):
        return _from_timm(config)
    home, _, name = arch.rpartition(":")
    if home != "torchvision":
        return None
    models = require("torchvision", "compress", "read its preprocessing").models
    if name not in models.list_models(module=models):  # the others take videos, or pairs of images
        return None
    preset = models.get_model_weights(name).DEFAULT.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return Preprocess(
        crop,
        crop,
        "crop",
        max(resize, crop),
        preset.interpolation.value,
        "RGB",
        tuple(preset.mean),
        tuple(preset.std),
        "torchvision's description of its ImageNet weights",
    )


def _from_timm(config: dict[str, Any]) -> Preprocess | None:
    _, height, width = config["input_size"]
    share, mode = config.get("crop_pct") or 1.0, config.get("crop_mode") or "center"
    rest = (
        config.get("interpolation") or "bilinear",
        "RGB",
        tuple(config["mean"]),
        tuple(config["std"]),
        "timm's description of the weights",
    )
    if mode == "squash" and share == 1:
        return Preprocess(height, width, "stretch", None, *rest)
    if mode == "center" and share <= 1 and height == width:
        return Preprocess(height, width, "crop", int(height / share), *rest)
    return None


# --- weights ----------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    if not path.exists():
        raise BadModel(f"{path} does not exist.", "Check the path of the weights.")
    if path.is_dir():
        raise BadModel(f"{path} is a folder.", "Give the .safetensors or .pth file in it.")
    try:
        with path.open("rb") as f:
            head = f.read(512)
    except OSError as e:
        raise BadModel(f"{path} cannot be read ({e.strerror}).", "Check its permissions.") from e
    if not head:
        raise BadModel(f"{path} is empty.", "Fetch it again.")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BadModel(f"{path} is a web page, not weights.", "The download gave an error page; fetch the file itself.")
    if head.startswith(b"version https://git-lfs"):
        raise BadModel(f"{path} is a Git LFS pointer, not weights.", "Run: git lfs pull")


def _looks_like_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as f:
        head = f.read(9)
    return len(head) == 9 and head[8:] == b"{" and not zipfile.is_zipfile(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, e: Exception) -> BadModel:
    return BadModel(f"{path} is damaged or truncated ({e}).", "Fetch or save it again.")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as e:
        raise _refusal(path, e) from e


def _refusal(path: Path, e: Exception) -> BadModel:
    """What torch.load's answer means for the user; torch's own advice (to allow the code) is left out."""
    with path.open("rb") as f:
        head = f.read(2)
    save = "Save the weights alone: torch.save(model.state_dict(), 'weights.pth') or as .safetensors."
    needs = re.search(r"GLOBAL ([\w.]+)", str(e))
    if "TorchScript" in str(e):
        return BadModel(f"{path} is a TorchScript archive, which holds code, so it was not opened.", save)
    if needs or (isinstance(e, pickle.UnpicklingError) and head[:1] == b"\x80"):
        what = f"it needs {needs[1]}" if needs else "it is a plain pickle"
        return BadModel(f"{path} holds more than weights (objects or code), so it was not opened: {what}.", save)
    if head != b"PK" and head[:1] != b"\x80":
        return BadModel(f"{path} is not a weights file.", "Give a .safetensors file, or a .pth that torch.save wrote.")
    reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    return BadModel(f"{path} is damaged or truncated ({reason}).", "Fetch or save it again.")


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not _finite(v)]
    if bad:
        raise BadModel(
            f"{path}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:5])}.",
            "The training broke; use an earlier checkpoint.",
        )


def _finite(v: Tensor) -> bool:
    return bool(torch.isfinite(v if v.element_size() > 1 else v.float()).all())  # no isfinite for 8-bit floats


def _unwrap(raw: Any, path: Path, inner: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notices = []
    if inner is not None and not (isinstance(raw, dict) and isinstance(raw.get(inner), dict)):
        raise BadModel(f"{path} has no entry {inner!r} with weights in it ({_held(raw)}).", "Name one that it has.")
    for _ in range(3):
        nested = next(
            (k for k in ((inner,) if inner else WRAPPERS) if isinstance(raw, dict) and isinstance(raw.get(k), dict)),
            None,
        )
        if nested is None:
            break
        raw = raw[nested]
        notices.append(f"{path.name}: the weights were read from its entry {nested!r}.")
        inner = None
    if not _is_state_dict(raw):
        raise BadModel(f"{path} holds no state_dict ({_held(raw)}).", "Save model.state_dict().")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in raw)), None):
        raw = {k[len(prefix) :]: v for k, v in raw.items()}
        notices.append(f"{path.name}: the prefix {prefix!r} was taken off every key.")
    return dict(raw), tuple(notices)


def _is_state_dict(raw: Any) -> bool:
    return (
        isinstance(raw, dict)
        and bool(raw)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in raw.items())
    )


def _held(raw: Any) -> str:
    return f"keys {', '.join(map(str, list(raw)[:8]))}" if isinstance(raw, dict) else type(raw).__name__


# --- architectures ----------------------------------------------------------------------------------


def _known(kind: str, name: str, names: Any) -> None:
    if name not in names:
        raise UnknownName(kind, name, names)


def _from_file(file: Path, name: str, classes: int | None, trust_code: bool) -> nn.Module:
    if not trust_code:
        raise UntrustedCode(
            f"--arch {file}:{name} would run the file {file}.",
            "Read it, and if you trust it add --trust-code.",
        )
    if not file.is_file():
        raise BadModel(f"{file} does not exist.", "Check the path in --arch.")
    spec = importlib.util.spec_from_file_location(f"_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise BadModel(f"{file} cannot be imported.", "Give a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up there
    sys.path.insert(0, str(file.resolve().parent))  # so that it finds the files beside it
    try:
        spec.loader.exec_module(module)
        make = getattr(module, name, None)
        if not callable(make):
            raise BadModel(
                f"{file} has no callable named {name!r}.", "Name a function or class that gives an nn.Module."
            )
        model = make() if classes is None else _call(make, classes)
    except BadModel:
        raise
    except (Exception, SystemExit) as e:  # the user's own code may raise anything
        raise BadModel(f"{file}:{name} failed: {type(e).__name__}: {e}", "Mend the file, then run it again.") from e
    if not isinstance(model, nn.Module):
        raise BadModel(f"{file}:{name} gave a {type(model).__name__}, not an nn.Module.", "Return the model.")
    return model


def _call(make: Any, classes: int) -> Any:
    import inspect

    takes = inspect.signature(make).parameters
    return make(num_classes=classes) if "num_classes" in takes else make()


def _count_classes(arch: str, tensors: dict[str, Tensor], trust_code: bool) -> int | None:
    """The rows of the classifier: the last 1-D bias or 2-D weight whose shape alone differs from the default model."""
    if ".py:" in arch:
        return None
    home, _, name = arch.rpartition(":")
    if home == "torchvision" and name in detectors.KNOWN:
        return detectors.classes_in(name, tensors)
    with torch.device("meta"):
        default = build(arch, trust_code=trust_code).state_dict()
    differs = [k for k, v in tensors.items() if k in default and v.shape != default[k].shape and v.ndim >= 1]
    if differs and all(tensors[k].shape[1:] == default[k].shape[1:] for k in differs):
        rows = {tensors[k].shape[0] for k in differs}
        return rows.pop() if len(rows) == 1 else None
    return None
