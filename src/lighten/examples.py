"""The examples that come with a bundle: C++, Kotlin and Swift, with what its manifest says filled in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.types import Preprocess, from_json

_FILES = Path(__file__).parent / "bundle_files"
LANGUAGES = {"cpp": "cpp", "kotlin": "kt", "swift": "swift"}
"""Folder of bundle_files -> ending. The example in a bundle is `run` with that ending."""
READY = ("aoti", "torchscript")
"""Formats whose example takes ready floats, whatever the images were."""
TAKES_PIXELS = ("onnx",)
"""Formats whose examples know files that normalise inside."""
CHANNELS_LAST = ("litert",)
"""Formats whose file takes NHWC floats, though lighten's own loader is given NCHW."""
PACKAGE = "model.mlpackage"
COLUMNS = 110


def examples(format: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """File name in the bundle -> text, for every language that has an example of `format`; {} where there is none.

    Images are needed to show how one is fed: a manifest without preprocessing has only what takes ready floats. All of
    them read the scores of classes, so that other tasks have none.
    """
    found: dict[str, str] = {}
    if manifest["task"] != "classification":
        return found
    for language, ending in LANGUAGES.items():
        template = _FILES / language / f"{format}.{ending}"
        if not template.is_file():
            continue
        text = template.read_text("utf-8")
        if format not in READY:
            if not _can_fill(format, manifest):
                continue
            text = _filled(text, format, manifest, language)
        found[f"run.{ending}"] = text
    return found


def _can_fill(format: str, manifest: Mapping[str, Any]) -> bool:
    if not manifest["preprocessing"]:
        return False
    return manifest["input"]["dtype"] == "float32" or format in TAKES_PIXELS


def _filled(text: str, format: str, manifest: Mapping[str, Any], language: str) -> str:
    """`text` with the common part, without the sections that do not hold, and with every @NAME@ replaced, once: what is
    filled in may look like a placeholder itself."""
    common = _FILES / language / f"common.{LANGUAGES[language]}"
    if "@COMMON@" in text:
        text = text.replace("@COMMON@\n", common.read_text("utf-8"))
    how = from_json(Preprocess, manifest["preprocessing"])
    kind = "float" if manifest["input"]["dtype"] == "float32" else "uint8"
    text = _sections(text, {kind, how.mode, how.channel_order})
    values = _values(format, manifest, how, language)
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)


def _sections(text: str, holds: set[str]) -> str:
    """Lines between `//: if WORD` and `//: end` stay where WORD holds."""
    section = re.compile(r"^//: if (\w+)\n(.*?)^//: end\n", re.MULTILINE | re.DOTALL)
    return section.sub(lambda found: found[2] if found[1] in holds else "", text)


def _values(format: str, manifest: Mapping[str, Any], how: Preprocess, language: str) -> dict[str, str]:
    last = manifest["input"]["layout"] == "NHWC" or format in CHANNELS_LAST
    plane = "height * width" if language == "swift" else "HEIGHT * WIDTH"
    channels = "channels" if language == "swift" else "CHANNELS"
    file = PACKAGE if format == "coreml" else manifest["model"]["file"]
    labels = manifest["labels"]
    return {
        "FILE": quoted(file, language),
        "INPUT": quoted(manifest["input"]["name"], language),
        "OUTPUT": quoted(manifest["output"]["name"], language),
        "HEIGHT": str(how.height),
        "WIDTH": str(how.width),
        "CHANNELS": str(how.channels),
        "ORDER": how.channel_order,
        "LAYOUT": "NHWC" if last else "NCHW",
        "PLACE": f"i * {channels} + c" if last else f"c * {plane} + i",
        "MODE": how.mode,
        "RESIZE": str(how.resize),
        "INTERPOLATION": how.interpolation,
        "MEAN": ", ".join(repr(float(v)) for v in how.mean),
        "STD": ", ".join(repr(float(v)) for v in how.std),
        "LABELS": _lines([quoted(row["name"], language) for row in labels], language),
        "LABELS_ZH": _lines([quoted(row["name_zh"], language) for row in labels], language),
    }


def _lines(items: list[str], language: str) -> str:
    """A list's items, comma after each but the last, in lines of about `COLUMNS`."""
    rows: list[str] = []
    for item in items:
        if rows and len(rows[-1]) + len(item) + 2 <= COLUMNS:
            rows[-1] += f", {item}"
        else:
            rows.append(item)
    indent = " " * (12 if language == "kotlin" else 8)
    return ",\n".join(indent + row for row in rows)


def quoted(text: str, language: str) -> str:
    """A string literal of the language that holds exactly `text`; signs that cannot be seen are written by number."""
    special = {"kotlin": '\\"$', "swift": '\\"', "cpp": '\\"'}[language]
    return '"' + "".join(_sign(c, special, language) for c in text) + '"'


def _sign(c: str, special: str, language: str) -> str:
    if c in special:
        return f"\\{c}"
    if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return c
    if language == "swift":  # which has no half of a pair
        return f"\\u{{{0xFFFD if 0xD800 <= ord(c) <= 0xDFFF else ord(c):x}}}"
    if language == "cpp":
        return "".join(f"\\{byte:03o}" for byte in c.encode("utf-8", "surrogatepass"))
    pairs = c.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{pairs[k : k + 4]}" for k in range(0, len(pairs), 4))
