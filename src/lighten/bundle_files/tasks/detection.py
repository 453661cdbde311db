"""Find objects: python run.py photo.jpg [more.jpg ...] [--zh] [--draw out.jpg] [--font FILE]. Needs numpy, Pillow and the runtime."""

HEAD, SHOWN = MANIFEST["head"], MANIFEST["detection"]
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "C:/Windows/Fonts/msyh.ttc",
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def places():
    """Centres and sizes (x, y) of every place of the outputs, in pixels of the input: of its anchor, or of one step."""
    centres, sizes = [], []
    for level in HEAD["levels"]:
        shapes = np.array(level["shapes"] or [level["step"]])
        x, y = ((np.arange(level[n]) + level["offset"]) * s for n, s in zip(("columns", "rows"), level["step"]))
        grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        centres.append(np.repeat(grid, len(shapes), 0))
        sizes.append(np.tile(shapes, (len(grid), 1)))
    return np.concatenate(centres).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def corners(numbers, centres, sizes):
    """Box numbers of some places as x1, y1, x2, y2 in pixels of the input."""
    if HEAD["box"] == "offsets":
        moved = numbers / np.array(HEAD["weights"], np.float32)
        middle = moved[:, :2] * sizes + centres
        half = np.exp(np.minimum(moved[:, 2:], np.float32(HEAD["clip"]))) * sizes * np.float32(0.5)
        return np.concatenate([middle - half, middle + half], 1)
    if HEAD["box"] == "distribution":
        numbers = softmax(numbers.reshape(-1, 4, HEAD["bins"])) @ np.arange(HEAD["bins"], dtype=np.float32)
    reach = np.maximum(numbers, 0)
    return np.concatenate([centres - reach[:, :2] * sizes, centres + reach[:, 2:] * sizes], 1)


def overlap(box, others):
    """Intersection over union of one box and others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.maximum(sides, 0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared)


def detections(raw, w, h):
    """Raw outputs of one image of w x h: rows of x1, y1, x2, y2 in its pixels, score and class, the best first."""
    n = 4 * HEAD["bins"] if HEAD["box"] == "distribution" else 4
    centres, sizes = places()
    raw = np.asarray(raw, np.float32).reshape(len(centres), -1)
    logits = raw[:, n + HEAD["centerness"] :]
    with np.errstate(all="ignore"):  # what is not finite scores 0
        scores = softmax(logits)[:, 1:] if HEAD["score"] == "softmax" else sigmoid(logits)
        scores = np.sqrt(scores * sigmoid(raw[:, n : n + 1])) if HEAD["centerness"] else scores
        scores[~np.isfinite(raw).all(1)] = 0
        flat = scores.ravel()
        rows = np.flatnonzero(flat > SHOWN["threshold"])
        rows = rows[np.argsort(-flat[rows], kind="stable")][:1000]
        where, kinds = np.divmod(rows, HEAD["classes"])
        boxes = corners(raw[where, :n], centres[where], sizes[where])
    boxes = boxes.clip(0, np.array([HOW["width"], HOW["height"]] * 2, np.float32))
    good = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, kinds, rows = boxes[good], kinds[good], rows[good]
    kept = []
    for k in range(len(boxes)):
        same = [j for j in kept if kinds[j] == kinds[k]]
        if not (overlap(boxes[k], boxes[same]) > SHOWN["iou"]).any():
            kept.append(k)
    kept = kept[: SHOWN["most"]]
    across, down, left, top = frame(w, h)
    scale, limit = np.array([across / w, down / h] * 2), np.array([w, h] * 2)
    boxes = ((boxes[kept] - np.array([left, top] * 2)) / scale).clip(0, limit)
    found = np.column_stack([boxes, flat[rows[kept]], kinds[kept]])
    return found[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def letters(names, size, file):
    """A font that can write the names: the given file, Pillow's own for English, else the first of the usual ones."""
    from PIL import ImageFont

    if file or not "".join(names).isascii():
        file = file or next((f for f in FONTS if Path(f).is_file()), None)
        if file is None:
            sys.exit("No font with Chinese letters was found: name one (--font FILE), or leave --zh out.")
        return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)


def draw(image, found, names, file):
    """A copy of the image with a box, a name and a score for each object, the best on top."""
    from PIL import ImageDraw

    image = image.convert("RGB")
    short = min(image.size)
    pen, font = ImageDraw.Draw(image), letters(names, max(9, round(9 + 0.016 * short)), file)
    for *box, score, kind in found[::-1].tolist():
        ink, text = COLOURS[int(kind) % len(COLOURS)], f"{names[int(kind)]} {100 * score:.0f}%"
        pen.rectangle([round(v) for v in box], outline=ink, width=max(2, short // 200))
        *_, x2, y2 = pen.textbbox((0, 0), text, font=font)
        x = max(0, min(round(box[0]), image.width - x2))
        y = round(box[1]) - y2 - 2 if box[1] > y2 + 2 else round(box[1])
        pen.rectangle((x, y, x + x2 + 4, y + y2 + 2), fill=ink)
        pen.text((x + 2, y + 1), text, fill="black", font=font)
    return image


def main():
    from argparse import ArgumentParser

    asked = ArgumentParser(description=__doc__)
    asked.add_argument("images", nargs="+")
    asked.add_argument("--zh", action="store_true", help="Chinese names")
    asked.add_argument("--draw", help="write the one image here, with its boxes")
    asked.add_argument("--font", help="font file with the letters of the names")
    given = asked.parse_args()
    if HOW is None:
        sys.exit("This model takes ready float inputs, not images: see the README.")
    if given.draw and (len(given.images) > 1 or Path(given.draw).resolve() == Path(given.images[0]).resolve()):
        sys.exit("--draw takes one image, and another file to write to.")
    names = [row["name_zh" if given.zh else "name"] for row in MANIFEST["labels"]]
    model = load_model(str(HERE / MANIFEST["model"]["file"]))
    for path in given.images:
        image = upright(path)
        found = detections(model(normalize(pixels(image)[None]))[0], *image.size)
        rows = (
            f"{names[int(k)]} {100 * s:.0f} % ({', '.join(f'{v:.0f}' for v in box)})" for *box, s, k in found.tolist()
        )
        print(path, "  ".join(rows) or "-")
        if given.draw:
            draw(image, found, names, given.font).save(given.draw)


if __name__ == "__main__":
    main()
