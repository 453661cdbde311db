"""Run this bundle on images: python run.py photo.jpg [more.jpg ...] [--zh]. Needs numpy, Pillow and the runtime."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MANIFEST = json.loads((HERE / "manifest.json").read_text("utf-8"))
HOW = MANIFEST["preprocessing"]
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def load_model(file, threads=0):
    """lighten.bundle puts the loader of the bundle's runtime here (bundle_files/loaders)."""
    raise SystemExit("This run.py was not written by lighten.bundle.")


def pixels(path):
    """The image as the model was calibrated on it: uint8 (H, W, C)."""
    with Image.open(path) as image:
        if image.width * image.height > 64_000_000:
            sys.exit(f"{path}: too large ({image.width} x {image.height} pixels)")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        image = image.convert("L" if HOW["channel_order"] == "GRAY" else "RGB")
    width, height = size = HOW["width"], HOW["height"]
    if HOW["mode"] == "crop":
        short, (w, h) = HOW["resize"], image.size
        size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if image.size != size:
        image = image.resize(size, FILTERS[HOW["interpolation"]])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    array = np.asarray(image.crop((left, top, left + width, top + height)), np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    return array[..., ::-1] if HOW["channel_order"] == "BGR" else array


def normalize(batch):
    """uint8 (N, H, W, C) to float32 (N, C, H, W); pixels stay where the file itself normalises them."""
    if HOW["inside"]:
        return np.ascontiguousarray(batch)
    mean, std = (np.asarray(HOW[k], np.float32) for k in ("mean", "std"))
    scaled = (batch.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def main():
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    if not paths or HOW is None:
        sys.exit(__doc__ if HOW else "This model takes ready float inputs, not images: see the README.")
    model, key = load_model(str(HERE / MANIFEST["model"]["file"])), "name_zh" if "--zh" in sys.argv else "name"
    for path in paths:
        scores = model(normalize(pixels(path)[None]))[0].astype(np.float64)
        share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = np.argsort(-share)[:3]
        print(path, "  ".join(f"{MANIFEST['labels'][k][key]} {100 * share[k]:.1f} %" for k in best))


if __name__ == "__main__":
    main()
