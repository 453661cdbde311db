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


def upright(path):
    """The image, eight bits a channel, turned as its camera says."""
    with Image.open(path) as image:
        if image.width * image.height > 64_000_000:
            sys.exit(f"{path}: too large ({image.width} x {image.height} pixels)")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        return image.convert("L" if HOW["channel_order"] == "GRAY" else "RGB")


def frame(w, h):
    """Where an image of w x h lies in the input: its width and height there, left and top (below 0: cropped)."""
    width, height = HOW["width"], HOW["height"]
    if HOW["mode"] == "letterbox":
        ratio = min(width / w, height / h)
        across, down = max(1, round(w * ratio)), max(1, round(h * ratio))
        return across, down, (width - across) // 2, (height - down) // 2
    across, down, short = width, height, HOW["resize"]
    if HOW["mode"] == "crop":
        across, down = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    return across, down, -round((across - width) / 2), -round((down - height) / 2)


def pixels(image):
    """The image as the model was calibrated on it: uint8 (H, W, C)."""
    across, down, left, top = frame(*image.size)
    if image.size != (across, down):
        image = image.resize((across, down), FILTERS[HOW["interpolation"]])
    whole = Image.new(image.mode, (HOW["width"], HOW["height"]), (114,) * len(image.getbands()))
    whole.paste(image, (left, top))
    array = np.asarray(whole, np.uint8)
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
        scores = model(normalize(pixels(upright(path))[None]))[0].astype(np.float64)
        share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = np.argsort(-share)[:3]
        print(path, "  ".join(f"{MANIFEST['labels'][k][key]} {100 * share[k]:.1f} %" for k in best))


if __name__ == "__main__":
    main()
