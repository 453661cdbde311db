"""The folder that ships: model, manifest, labels, golden vectors, a runner. Writing, reading, checking it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lighten.data.cache import sha256_file, whole_folder, write_whole
from lighten.errors import BadBundle
from lighten.examples import examples
from lighten.heads import Head
from lighten.plugins import get, task_of
from lighten.types import Artifact, Preprocess, Result, Trial, from_json, metric_title, to_json

SCHEMA_VERSION = 1
GOLDEN_IMAGES = 16
GOLDEN_BYTES = 64_000_000
"""Of golden outputs, before they are packed: large detectors have megabytes of raw values an image, and get fewer images."""
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
QUANTIZED_TOLERANCE = 0.05
"""Of the largest golden output. Integer kernels of other processors may round the last step differently."""

THRESHOLDS = ("threshold", "floor", "iou", "most")
"""Settings of the detection task that a manifest carries."""

_FILES = Path(__file__).parent / "bundle_files"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked against the sha256 in its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / self.manifest["model"]["file"]

    @property
    def format(self) -> str:
        return str(self.manifest["model"]["format"])

    @property
    def preprocess(self) -> Preprocess | None:
        found = self.manifest["preprocessing"]
        return from_json(Preprocess, found) if found else None

    @property
    def head(self) -> Head | None:
        """What a detector's raw outputs mean; None of other tasks."""
        found = self.manifest.get("head")
        return from_json(Head, found) if found else None

    @property
    def task(self) -> Any:
        """The task, bound to the head, the size of the input and the thresholds of a detector. Raises UnknownName."""
        module, head, how = get("tasks", self.manifest["task"]), self.head, self.preprocess
        if head is None:
            return module
        return module.bind(head, (how.width, how.height) if how else None, **self.manifest["detection"])

    def again(self, reference: np.ndarray, got: np.ndarray) -> tuple[int, int, str]:
        """How many of the answers of `reference` are in `got` too, of how many, and what they are: one answer an image,
        or every box that a detector shows."""
        if self.head is None:
            return int((got.argmax(1) == reference.argmax(1)).sum()), len(reference), "answers"
        task = self.task
        n = sum(map(len, task.shown(reference))) or sum(map(len, task.shown(got)))
        return round(task.agreement(reference, got) * n / 100), n, "boxes"

    def labels(self, lang: str = "en") -> tuple[str, ...]:
        """Class names in order, Chinese where there are any and `lang` is "zh"."""
        return tuple(row["name_zh" if lang == "zh" else "name"] for row in self.manifest["labels"])

    def golden(self) -> dict[str, np.ndarray]:
        """`pixels`, `outputs` and `atol`."""
        with np.load(self.folder / "golden.npz", allow_pickle=False) as found:
            return {k: found[k] for k in ("pixels", "outputs", "atol")}


def write(result: Result, run_folder: Path, pixels: np.ndarray, outputs: np.ndarray, into: Path | None = None) -> Path:
    """The winner as a bundle in `into` (else `run_folder`/bundle), whole or not at all.

    `pixels` and `outputs` are images and the winner's own answers to them, in its runtime: the golden vectors.
    """
    into = into or run_folder / "bundle"
    winner = result.winning
    assert winner.artifact is not None
    shape = pixels.shape[1:] if pixels.dtype != np.uint8 else result.preprocess.input_shape if result.preprocess else ()
    manifest = describe(result, [int(n) for n in shape])
    source = run_folder / winner.artifact.path
    root = source.parents[len(Path(_file(winner.artifact)).parts) - 1]
    with whole_folder(into) as room:
        for name in (manifest["model"]["file"], *manifest["model"]["companions"]):
            (room / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, room / name)
        _write_golden(room, winner, pixels, outputs)
        write_whole(room / "run.py", runner(winner.artifact.format, result.task))
        for name, text in examples(winner.artifact.format, manifest).items():
            write_whole(room / name, text)
        write_whole(room / "labels.txt", "".join(f"{en}\t{zh}\n" for en, zh in zip(result.classes, result.classes_zh)))
        write_whole(room / "README.md", readme(result))
        files = sorted(f for f in room.rglob("*") if f.is_file())
        manifest["files"] = {f.relative_to(room).as_posix(): sha256_file(f) for f in files}
        write_whole(room / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    return into


def _file(artifact: Artifact) -> str:
    """The model's file as it lies in a bundle: some formats are a folder (model.mlpackage/Manifest.json)."""
    depth = get("formats", artifact.format).SUFFIX.count("/")
    return "/".join(Path(artifact.path).parts[-1 - depth :])


def runner(format: str, task: str = "classification") -> str:
    """run.py with the loader of one runtime in it, and with what else its task needs: the first line of that part is
    run.py's own, the rest takes the place of its main."""
    text, loader = ((_FILES / name).read_text("utf-8") for name in ("run.py", f"loaders/{format}.py"))
    start, end = text.index("def load_model("), text.index("def upright(")
    text = f"{text[:start]}{loader.rstrip()}\n\n\n{text[end:]}"
    part = _FILES / "tasks" / f"{task}.py"
    if not part.is_file():
        return text
    first, rest = part.read_text("utf-8").split("\n", 1)
    start, end = text.index("\n"), text.index("def main(")
    return f"{first}{text[start:end]}{rest.lstrip()}"


def _write_golden(room: Path, winner: Trial, pixels: np.ndarray, outputs: np.ndarray) -> None:
    n = max(1, min(GOLDEN_IMAGES, GOLDEN_BYTES // max(1, outputs[:1].nbytes)))
    share = TOLERANCE.get(winner.recipe.precision.weights, QUANTIZED_TOLERANCE)
    atol = np.float32(share * max(1.0, float(np.abs(outputs[:n]).max())))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=pixels[:n], outputs=outputs[:n], atol=atol)
    write_whole(room / "golden.npz", buffer.getvalue())


def describe(result: Result, shape: list[int]) -> dict[str, Any]:
    """The manifest, without the sums of the files."""
    winner = result.winning
    assert winner.artifact is not None
    evidence = to_json(winner.evidence)
    evidence["size"].pop("weights")
    file = Path(_file(winner.artifact))
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "file": file.as_posix(),
            "format": winner.artifact.format,
            "sha256": winner.artifact.sha256,
            "companions": [(file.parent / name).as_posix() for name in winner.artifact.companions],
            "source": result.model,
        },
        "task": result.task,
        "input": input_of(result.preprocess, shape),
        "output": output_of(result),
        "preprocessing": to_json(result.preprocess),
        "labels": [{"name": en, "name_zh": zh} for en, zh in zip(result.classes, result.classes_zh)],
        "recipe": to_json(winner.recipe),
        "layers": to_json(winner.layers),
        "device": to_json(result.device),
        "evidence": evidence,
        "final": to_json(result.final),
        "budget": to_json(result.budget),
        "verdict": result.verdict,
        "misses": to_json(result.misses),
        "environment": result.environment,
        **detection_of(result),
    }


def output_of(result: Result) -> dict[str, Any]:
    """What the file answers: a score for each class, or the raw values of every place of a detector."""
    head = result.head
    shape = [len(result.classes)] if head is None else [head.places, head.values]
    meaning = "scores before softmax" if head is None else "raw values of every place, which `head` says how to read"
    return {"name": "output", "shape": ["batch", *shape], "dtype": "float32", "meaning": meaning}


def detection_of(result: Result) -> dict[str, Any]:
    """How a detector's outputs become boxes: its head, and the thresholds of what is shown. Nothing for other tasks."""
    if result.head is None:
        return {}
    task = task_of(result)
    return {"head": to_json(result.head), "detection": {name: getattr(task, name) for name in THRESHOLDS}}


def input_of(how: Preprocess | None, shape: list[int]) -> dict[str, Any]:
    """What the file takes: the network's input of `shape` (C, H, W), or pixels where it normalises them inside."""
    if how is not None and how.inside:
        size = ["batch", how.height, how.width, how.channels]
        return {"name": "pixels", "shape": size, "layout": "NHWC", "dtype": "uint8"}
    return {"name": "input", "shape": ["batch", *shape], "layout": "NCHW", "dtype": "float32"}


def readme(result: Result) -> str:
    """What an app developer needs to know to use the bundle, English then Chinese."""
    texts = _sections((_FILES / "README.md").read_text("utf-8"), result.task)
    winner, how = result.winning, result.preprocess
    assert winner.artifact is not None
    assert winner.evidence is not None
    from lighten.data.preprocess import describe as in_words

    given = input_of(how, list(how.input_shape) if how else [])
    values = {
        "file": _file(winner.artifact),
        "runtime": " ".join(get("formats", winner.artifact.format).RUNS_ON).replace("_", "-"),
        "ran": winner.evidence.runtime,
        "precision": winner.recipe.precision.title,
        "verdict": result.verdict,
        "size": f"{winner.evidence.size.mb:.2f}",
        "metric": metric_title(winner.evidence.metric_name),
        "accuracy": f"{result.final.winner.value:.2f}",
        "before": f"{result.final.baseline.value:.2f}",
        "n": str(result.final.winner.n),
        "preprocess": in_words(how),
        "output": " x ".join(map(str, output_of(result)["shape"])),
        "input": given["name"],
        "dtype": given["dtype"],
        "layout": given["layout"],
        "shape": " x ".join(map(str, given["shape"])) if how else "see manifest.json",
    }
    return re.sub(r"\{([a-z]+)\}", lambda found: values[found[1]], texts)


def _sections(text: str, task: str) -> str:
    """Lines between `<!-- if TASK -->` and `<!-- end -->` stay where the task is that one."""
    section = re.compile(r"^<!-- if (\w+) -->\n(.*?)^<!-- end -->\n", re.MULTILINE | re.DOTALL)
    return section.sub(lambda found: found[2] if found[1] == task else "", text)


def load(folder: Path) -> Bundle:
    """Read and check a bundle. Raises BadBundle naming the file that is missing, damaged or changed."""
    file = folder / "manifest.json"
    if not file.is_file():
        inside = folder / "bundle"
        hint = f"Did you mean {inside}?" if (inside / "manifest.json").is_file() else "A bundle is runs/NAME/bundle."
        raise BadBundle(f"{folder} is not a bundle: it has no manifest.json.", hint)
    try:
        manifest = json.loads(file.read_text("utf-8"))
        files, version = dict(manifest["files"]), manifest["schema_version"]
        names = [manifest["model"]["file"], *manifest["model"]["companions"], "golden.npz"]
        if manifest["preprocessing"]:
            from_json(Preprocess, manifest["preprocessing"])
        if not isinstance(version, int) or not all(isinstance(n, str) for n in names):
            raise TypeError("a value of the wrong kind")
        if manifest["task"] == "detection" or manifest.get("head"):
            _check_detector(Bundle(folder, manifest))
    except (ValueError, KeyError, TypeError) as e:
        raise BadBundle(f"{file} is damaged ({type(e).__name__}: {e}).", "Build the bundle again.") from e
    if version > SCHEMA_VERSION:
        raise BadBundle(
            f"{file} has schema version {version}; this lighten reads up to {SCHEMA_VERSION}.",
            "pip install -U lighten",
        )
    for name in dict.fromkeys([*names, *files]):
        _check(folder, name, files.get(name))
    return Bundle(folder, manifest)


def _check_detector(found: Bundle) -> None:
    """Raises KeyError, TypeError or ValueError where a detector's head, thresholds or names cannot be used."""
    head, given = from_json(Head, found.manifest["head"]), found.manifest["detection"]
    counts = [n for level in head.levels for n in (level.rows, level.columns)]
    if not all(type(n) is int and n >= 1 for n in (*counts, head.classes)) or type(head.bins) is not int:
        raise TypeError("head: rows, columns, classes and bins are whole numbers")
    sizes = [n for level in head.levels for n in (*level.step, level.offset, *sum(level.shapes, ()))]
    if not all(map(math.isfinite, (*sizes, *head.weights, head.clip))) or type(head.centerness) is not bool:
        raise ValueError("head: a value that is no number, or centerness that is neither true nor false")
    if set(given) != set(THRESHOLDS) or type(given["most"]) is not int:
        raise ValueError(f"detection needs {', '.join(THRESHOLDS)}")
    names = [row[key] for row in found.manifest["labels"] for key in ("name", "name_zh")]
    if len(names) < 2 * head.classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"labels do not name {head.classes} classes")
    _ = found.task  # which checks the thresholds themselves


def _check(folder: Path, name: str, want: str | None) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "/".join(parts) != name or name.startswith("/") or set(name) & {"\\", ":"}:
        raise BadBundle(
            f"The manifest of {folder} names a file outside the bundle: {name!r}.", "Do not use this bundle."
        )
    path = folder / name
    if any((folder.joinpath(*parts[:k])).is_symlink() for k in range(1, len(parts) + 1)) or not path.is_file():
        raise BadBundle(f"{path} is missing, or is not a plain file.", "Copy the whole bundle folder.")
    if want is None or sha256_file(path) != want:
        raise BadBundle(
            f"{path} is not the file its manifest was written for (sha256 differs).",
            "Copy the bundle again, or build it again.",
        )


def verify(bundle: Bundle) -> tuple[bool, str]:
    """Whether the golden vectors still give the golden answers here, and by how much they differ."""
    from lighten import bench

    golden = bundle.golden()
    got = bench.measure(bundle.model, bundle.format, golden["pixels"], bundle.preprocess, timing=None).outputs
    if got.shape != golden["outputs"].shape:
        return False, f"outputs have shape {got.shape}, not {golden['outputs'].shape}"
    worst, atol = float(np.abs(got - golden["outputs"]).max()), float(golden["atol"])
    same, n, what = bundle.again(golden["outputs"], got)
    told = "are the same" if what == "answers" else "are found again"
    text = f"{same} of {n} golden {what} {told}, outputs differ by at most {worst:.3g} (allowed {atol:.3g})"
    return bool(worst <= atol), text


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of named arrays, in order of their names."""
    mark = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        mark.update(f"{name}{array.shape}{array.dtype}".encode())
        mark.update(array.tobytes())
    return mark.hexdigest()
