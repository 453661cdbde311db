"""A checkpoint that describes itself: safetensors whose metadata says how the network differs from its architecture.

The metadata entry `lighten` is one JSON text: version, arch, classes, class_names, preprocess, changes (see
`lighten.models.changes`) and tied (names of tensors that are another one). The tensors are those of `state_dict()`,
tied ones once, so that other tools read the file as any safetensors. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.data.cache import room_to_write, write_whole
from lighten.errors import BadModel
from lighten.models.changes import LIMIT, apply, check_sizes, difference
from lighten.models.load import build, read_metadata, read_tensors
from lighten.types import Preprocess, from_json, to_json

KEY, VERSION = "lighten", 1
TEXT_LIMIT = 16_000_000


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for a tensor in a network: its full name, the module that holds it, its name there."""

    name: str
    owner: nn.Module
    leaf: str
    parameter: bool

    @property
    def tensor(self) -> Tensor | None:
        return self._store[self.leaf]

    @property
    def kept(self) -> bool:
        """Whether `state_dict()` has it."""
        return self.leaf not in self.owner._non_persistent_buffers_set

    @property
    def _store(self) -> dict[str, Any]:
        return self.owner._parameters if self.parameter else self.owner._buffers

    def put(self, tensor: Tensor) -> None:
        self._store[self.leaf] = tensor


# --- to the file ----------------------------------------------------------------------------------------


def save(
    path: Path | str,
    module: nn.Module,
    arch: str | None,
    *,
    classes: int | None,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] = (),
    original: nn.Module | None = None,
    example: Tensor | None = None,
    trust_code: bool = False,
) -> None:
    """Write `module` to the one file `path`, whole, after it was read back and found to be the same network.

    `original` is an unchanged network to compare with; without one, `arch` is built. Without an `arch`, or with
    FILE.py:CALLABLE, whoever loads the file needs the class. The network read back answers `example` (N, C, H, W), or
    noise of the size of `preprocess`, as `module` does. Raises BadModel naming a module whose change cannot be told.
    """
    if not isinstance(module, nn.Module):
        raise BadModel(f"A {type(module).__name__} is no nn.Module.", "Save the network itself.")
    if original is None and not arch:
        raise BadModel("Neither arch nor original is given.", "Give one, so that the changes can be told.")
    path, fresh = Path(path), original if original is not None else _fresh(arch or "", classes, trust_code)
    document = {
        "version": VERSION,
        "arch": arch or "",
        "classes": classes,
        "class_names": list(class_names),
        "preprocess": None if preprocess is None else to_json(preprocess),
        "changes": difference(fresh, module),
        "tied": _tied(module),
    }
    raw = _packed(document, _tensors(module, fresh))
    base = original if not arch or (".py:" in arch and not trust_code) else None
    with tempfile.TemporaryDirectory() as folder:  # so that a good file is never replaced by one that fails
        written = Path(folder) / path.name
        with room_to_write(written):
            written.write_bytes(raw)
        try:
            again = load(written, model=base, trust_code=trust_code)
        except BadModel as e:
            raise type(e)(e.what.replace(str(written), str(path)), e.to_do) from e
    _check_same(module, again, _example(example, preprocess))
    write_whole(path, raw)


def _packed(document: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save as pack

    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    raw: bytes = pack(tensors, metadata={"format": "pt", "arch": document["arch"], KEY: text})
    return raw


def _fresh(arch: str, classes: int | None, trust_code: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # a file read or written in between changes no training
        return build(arch, classes=classes, trust_code=trust_code)


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Every place for a tensor, empty ones too, shared ones under each of their names."""
    for name, owner in model.named_modules(remove_duplicate=False):
        front = f"{name}." if name else ""
        yield from (Slot(front + k, owner, k, True) for k in owner._parameters)
        yield from (Slot(front + k, owner, k, False) for k in owner._buffers)


def _tied(model: nn.Module) -> dict[str, str]:
    """Names whose tensor is the very one of an earlier name."""
    first: dict[int, str] = {}
    names = {s.name: first.setdefault(id(s.tensor), s.name) for s in _slots(model) if s.tensor is not None}
    return {k: v for k, v in names.items() if k != v}


def _tensors(model: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """What the file holds: all of `state_dict()`, and the buffers outside of it that a fresh network has otherwise."""
    tied, known = _tied(model), {s.name: s for s in _slots(fresh)}
    made = {}
    for slot in _slots(model):
        if slot.tensor is None or slot.name in tied:
            continue
        _check_dense(slot)
        one = slot.tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if slot.kept or slot.name not in known or not _equal(one, known[slot.name].tensor):
            made[slot.name] = one
    return made


def _check_dense(slot: Slot) -> None:
    held = slot.tensor
    assert held is not None
    plain = type(held) in (Tensor, nn.Parameter) or type(held).__name__ == "Buffer"
    if not plain or held.is_quantized or held.is_meta or held.layout != torch.strided:
        raise BadModel(
            f"{slot.name} is no dense tensor of numbers ({type(held).__name__}, {held.dtype}).",
            "Save the network before it is quantized.",
        )


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.detach().cpu())


# --- whether what was written is what was meant -----------------------------------------------------------


def _check_same(module: nn.Module, again: nn.Module, example: Tensor | None) -> None:
    rest = difference(again, module)
    other = {s.name: s.tensor for s in _slots(again)}
    unlike = [s.name for s in _slots(module) if s.tensor is not None and not _equal(s.tensor.cpu(), other.get(s.name))]
    if wrong := [*rest, *unlike, *(_tied(again).items() ^ _tied(module).items())]:
        raise BadModel(
            f"The network does not come back from its description: {wrong[0] or 'the network itself'} differs.",
            "Give save() an original of the same architecture, built with the same settings.",
        )
    if example is not None and not _answer_alike(module, again, example):
        raise BadModel(
            "The network that the description gives back answers otherwise.",
            "Its forward uses something that is neither a module, a tensor nor a plain setting.",
        )


def _example(given: Tensor | None, preprocess: Preprocess | None) -> Tensor | None:
    if given is not None or preprocess is None:
        return given
    return torch.randn(1, *preprocess.input_shape, generator=torch.Generator().manual_seed(0))


def _answer_alike(module: nn.Module, again: nn.Module, example: Tensor) -> bool:
    """Within rounding: another memory layout of the same weights may take another kernel."""
    weight = next(module.parameters(), torch.zeros(0))
    example = example.to(weight.device, weight.dtype)
    try:
        ours, theirs = (_answers(m, example) for m in (module, again.to(weight.device)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as e:
        raise BadModel(
            f"The network cannot take an input of {tuple(example.shape)}: {str(e).splitlines()[0] if str(e) else e!r}.",
            "Check preprocess or example.",
        ) from e
    return len(ours) == len(theirs) and all(_near(a, b) for a, b in zip(ours, theirs))


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * (1 + a.abs().max()))


def _answers(model: nn.Module, example: Tensor) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves
    with _eval(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = [v for v in leaves(model(example)) if isinstance(v, Tensor) and v.numel()]
        return [v.float().nan_to_num() for v in found]


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


# --- from the file --------------------------------------------------------------------------------------


def describe(path: Path | str) -> dict[str, Any]:
    """The description in the file, checked for its shape; no tensor is read. Raises BadModel."""
    found = told(Path(path))
    if found is None:
        raise BadModel(f"{path} does not describe itself.", "Give --arch, or write it with lighten.save.")
    return found


def told(path: Path) -> dict[str, Any] | None:
    """As `describe`, but None for weights that say nothing of themselves."""
    text = read_metadata(path).get(KEY)
    if text is None:
        return None
    try:
        found = json.loads(text) if len(text) <= TEXT_LIMIT else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadModel(f"{path}: its description is not JSON of a sane size.", "Save it again.")
    if found.get("version") != VERSION:
        raise BadModel(
            f"{path}: its description has version {found.get('version')!r}, not {VERSION}.", "Use a newer lighten."
        )
    rules = {
        "arch": isinstance(found.get("arch"), str),
        "classes": found.get("classes") is None or (type(found["classes"]) is int and 0 < found["classes"] <= LIMIT),
        "class_names": _all_texts(found.get("class_names")),
        "changes": isinstance(found.get("changes"), dict),
        "tied": isinstance(found.get("tied"), dict) and _all_texts(list(found["tied"].values())),
        "preprocess": _readable(found),
    }
    if wrong := [k for k, holds in rules.items() if not holds]:
        raise BadModel(f"{path}: the entry {wrong[0]!r} of its description is malformed.", "Save it again.")
    return found


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _readable(found: dict[str, Any]) -> bool:
    try:
        how = preprocess_in(found)
    except (KeyError, TypeError, ValueError):
        return False
    return how is None or all(type(v) is int for v in (how.height, how.width, how.resize or 0))


def preprocess_in(found: dict[str, Any]) -> Preprocess | None:
    """The preprocessing of a description that `describe` or `told` gave."""
    if found.get("preprocess") is None:
        return None
    return dataclasses.replace(from_json(Preprocess, found["preprocess"]), source="the checkpoint's own description")


def agree(found: dict[str, Any], path: Path, arch: str | None, classes: int | None) -> None:
    """Raises BadModel where a person says otherwise than the file."""
    for what, asked, has in (("arch", arch, found["arch"]), ("classes", classes, found["classes"])):
        if asked and has and asked != has:
            raise BadModel(f"{path} says {what} {has}, but --{what} says {asked}.", f"Leave --{what} out.")


def load(path: Path | str, *, model: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """The network of a self-describing checkpoint, on the CPU, in eval mode, ready to be trained or exported.

    `model` is an unchanged network of the architecture, for files that name none; it is copied. Raises BadModel for
    whatever the file says that a network could not have, UntrustedCode for FILE.py:CALLABLE without `trust_code`.
    """
    path = Path(path)
    found = describe(path)
    tensors = read_tensors(path)
    try:
        made = _base(found, model, trust_code)
        apply(made, found["changes"])
        _pour(made, tensors, found)
        check_sizes(made)
    except BadModel as e:
        raise type(e)(f"{path}: {e.what}", e.to_do or "The file is damaged or not what it says; fetch it again.") from e
    return made.eval()


def _base(found: dict[str, Any], model: nn.Module | None, trust_code: bool) -> nn.Module:
    if model is not None:
        return copy.deepcopy(model).cpu()
    if not found["arch"]:
        raise BadModel(
            "it names no architecture.", "lighten.load(path, model=...) with a network of the original class."
        )
    return _fresh(found["arch"], found["classes"], trust_code)


def _pour(model: nn.Module, tensors: dict[str, Tensor], found: dict[str, Any]) -> None:
    """Every tensor of the file into its place, in the shape that it has there, and nothing left over on either side."""
    slots, tied = {s.name: s for s in _slots(model)}, found["tied"]
    gone = {f"{name}.{k}" if name else k for name, row in found["changes"].items() for k in row.get("none", [])}
    needed = {k for k, s in slots.items() if s.tensor is not None and s.kept}
    rows = [
        *(f"missing {k}" for k in sorted(needed - set(tensors) - set(tied))),
        *(f"unknown {k}" for k in (*tensors, *tied) if k not in slots),
        *(f"{k} tied to unknown {v}" for k, v in tied.items() if v not in tensors),
        *(f"twice {k}" for k in sorted(set(tensors) & set(tied))),
        *(f"said to be gone {k}" for k in sorted(gone & {*tensors, *tied})),
    ]
    if rows:
        raise BadModel(f"Description and weights do not fit each other: {', '.join(rows[:8])}.", "")
    for name, tensor in tensors.items():
        slots[name].put(_held(slots[name], tensor))
    for name, first in tied.items():
        if slots[name].parameter != slots[first].parameter:
            raise BadModel(f"{name} and {first} cannot be one tensor.", "")
        slots[name].put(_tensor(slots[first]))


def _tensor(slot: Slot) -> Tensor:
    assert slot.tensor is not None
    return slot.tensor


def _held(slot: Slot, tensor: Tensor) -> Tensor:
    """The file's tensor as a parameter or buffer of memory of its own, trained if the fresh one is."""
    old, shape = slot.tensor, tuple(tensor.shape)
    if any(not 0 < n <= LIMIT for n in shape) or (old is not None and len(shape) != old.ndim):
        raise BadModel(f"{slot.name} has the shape {shape}, which no network has there.", "")
    if tensor.is_floating_point() != (old.is_floating_point() if old is not None else True):
        raise BadModel(f"{slot.name} holds {tensor.dtype}, not the kind of numbers that belong there.", "")
    if not slot.parameter:
        return tensor.clone()
    return nn.Parameter(tensor.clone(), requires_grad=True if old is None else old.requires_grad)
