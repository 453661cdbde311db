"""The embedded demonstration images: real, from CIFAR-10, with the splits the embedded network was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lighten.data.cache import sha256_file, whole_folder, write_whole
from lighten.data.splits import ArrayImages, Split
from lighten.types import Data, Preprocess, digest

FOLDER = Path(__file__).parent.parent / "demo_files"
WEIGHTS = FOLDER / "resnet20.safetensors"
PREPROCESS = Preprocess(32, 32, source="the training's settings")
COUNTS = {"train": 256, "calibrate": 256, "select": 1200, "report": 1800}
COLUMNS = 64


def data() -> Data:
    """The embedded images, split as they were when the network was trained: train images are from its training set,
    calibrate and select were held out of it, report is from CIFAR-10's test set."""
    table = json.loads((FOLDER / "labels.json").read_text("utf-8"))
    with Image.open(FOLDER / "images.webp", formats=["WEBP"]) as sheet:
        pixels = _tiles(np.asarray(sheet.convert("RGB")), len(table["labels"]))
    images = ArrayImages(pixels, np.array(table["labels"], np.int64))
    edges = np.cumsum([0, *COUNTS.values()])
    splits = {name: Split(images, np.arange(a, b)) for name, a, b in zip(COUNTS, edges, edges[1:])}
    mark = digest([sha256_file(FOLDER / "images.webp"), table["labels"]])
    return Data(
        "demo (CIFAR-10)",
        tuple(table["classes"]),
        tuple(table["classes_zh"]),
        splits["train"],
        splits["calibrate"],
        splits["select"],
        splits["report"],
        mark,
    )


def make(weights: Path, source: Data) -> None:
    """Write the embedded files from a trained checkpoint and the CIFAR-10 splits it was trained with."""
    import torch
    from safetensors.torch import load_file, save

    tiles, labels = [], []
    for name, count in COUNTS.items():
        part = getattr(source, name).take(count)
        tiles.append(part.pixels(PREPROCESS))
        labels += part.labels.tolist()
    with whole_folder(FOLDER) as room:
        Image.fromarray(_sheet(np.concatenate(tiles))).save(room / "images.webp", lossless=True, quality=100, method=6)
        state = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in load_file(weights).items()}
        write_whole(room / WEIGHTS.name, save(state))
        table = {"classes": source.classes, "classes_zh": source.classes_zh, "labels": labels}
        write_whole(room / "labels.json", json.dumps(table, ensure_ascii=False))


def _sheet(tiles: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) as one picture of COLUMNS tiles a row."""
    rows = -(-len(tiles) // COLUMNS)
    full: np.ndarray = np.zeros((rows * COLUMNS, 32, 32, 3), np.uint8)
    full[: len(tiles)] = tiles
    return full.reshape(rows, COLUMNS, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, COLUMNS * 32, 3)


def _tiles(sheet: np.ndarray, count: int) -> np.ndarray:
    rows = sheet.shape[0] // 32
    tiles = sheet.reshape(rows, 32, COLUMNS, 32, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, 32, 32, 3)[:count])
