"""What the peers' scripts share: the job they are handed, and the results they hand back.

A peer is one script beside this one, run in an environment of its own: `python NAME.py JOB.json`. It names its
contenders; each makes `model.onnx` or `model.xml` in a folder of its own, or answers the test images itself
("simulated"). No file is named after the package that it uses: the script's folder comes first on Python's path.
"""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
CHECKED = 500
"""Images that a simulation answers where there is a file too: enough to see whether they agree."""


class NotOffered(Exception):
    """The tool has no way to do what was asked; the message says so in one sentence."""


@dataclass(frozen=True)
class Job:
    """`first` and `last` are the module names of the layers that keep 8 bits; arrays are float32 (N, C, H, W).

    Contenders whose title holds a word of `skip` are not made.
    """

    room: Path
    out: Path
    arch: str
    classes: int
    weight_bits: int
    iterations: int
    first: str
    last: str
    skip: tuple[str, ...] = ()

    @property
    def float_onnx(self) -> Path:
        return self.room / "float.onnx"

    @property
    def calibration(self) -> np.ndarray:
        return np.load(self.room / "calibration.npy", mmap_mode="r")

    @property
    def tests(self) -> np.ndarray:
        return np.load(self.room / "tests.npy", mmap_mode="r")

    @property
    def ends(self) -> tuple[str, str]:
        return self.first, self.last

    def model(self) -> Any:
        """The trained torch module, in eval mode."""
        from safetensors.torch import load_file

        home, _, name = self.arch.partition(":")
        if home == "timm":
            import timm

            module = timm.create_model(name, num_classes=self.classes)
        else:
            import torchvision

            module = torchvision.models.get_model(name, weights=None, num_classes=self.classes)
        module.load_state_dict(load_file(self.room / "weights.safetensors"))
        return module.eval()

    def batches(self) -> Iterator[Any]:
        """The calibration images as torch tensors, `BATCH` at a time."""
        import torch

        rows = self.calibration
        for k in range(0, len(rows), BATCH):
            yield torch.from_numpy(np.array(rows[k : k + BATCH]))


@dataclass(frozen=True)
class Made:
    """A remark for the table and, for what can answer in its own framework, a function that does."""

    note: str = ""
    simulate: Callable[[np.ndarray], np.ndarray] | None = None


Make = Callable[[Path], Made]


def run(contenders: Callable[[Job], Mapping[str, Make]], *packages: str) -> None:
    """Make every contender of the job in argv[1]; results.json is written after each, so that a crash loses one."""
    job = read(Path(sys.argv[1]))
    versions = {name: metadata.version(name) for name in packages}
    rows: list[dict[str, Any]] = []
    for k, (title, make) in enumerate(contenders(job).items()):
        folder = job.out / str(k)
        folder.mkdir(parents=True, exist_ok=True)
        skipped = any(word.lower() in title.lower() for word in job.skip)
        result = {"status": "not run", "note": "left out by --skip"} if skipped else attempt(job, make, folder)
        rows.append({"title": title, "folder": str(folder), **result})
        (job.out / "results.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))
        print(title, rows[-1], flush=True)


def read(file: Path) -> Job:
    """The job from its JSON file."""
    values = json.loads(file.read_text())
    return Job(**{**values, "room": Path(values["room"]), "out": Path(values["out"])})


def attempt(job: Job, make: Make, folder: Path) -> dict[str, Any]:
    """Make one contender, timed; what its tool raises becomes a row."""
    began = time.perf_counter()
    try:
        made = make(folder)
        seconds = time.perf_counter() - began
        if made.simulate:
            has_file = any(folder.glob("model.*"))
            tests = job.tests[:CHECKED] if has_file else job.tests
            parts = [made.simulate(np.array(tests[k : k + BATCH])) for k in range(0, len(tests), BATCH)]
            np.save(folder / "outputs.npy", np.concatenate(parts))
    except NotOffered as e:
        return {"status": "not offered", "note": str(e)}
    except Exception as e:  # noqa: BLE001 - a peer's own exceptions
        traceback.print_exc()
        return {"status": "failed", "note": f"{type(e).__name__}: {first_line(e)}"}
    return {"status": "made", "seconds": seconds, "note": made.note}


def first_line(e: Exception) -> str:
    """Of its message, without the codes that colour a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(e))
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:160]


def answers(module: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A torch module as a function over numpy arrays."""
    import torch

    def answer(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return answer
