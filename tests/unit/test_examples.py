"""The examples of a bundle: what the manifest says, to the last digit, and numbers equal to Python's where a compiler is."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mobile_stubs import ANDROID, APPLE
from PIL import Image

from lighten.data.preprocess import normalize, to_pixels
from lighten.examples import examples, quoted
from lighten.types import Preprocess, to_json

HOSTILE = (
    'a "b"',
    "$cash ${HOME} $",
    "back\\slash \\(x) \\n",
    "@HEIGHT@ @NONE@",
    "tab\tline\nend",
    "//: end",
    "*/ x",
    "",
)
CHINESE = ("猫", "“引号”", "狗 🐕", "隐\u202e藏", "线\u2028", "花", "树", "鱼")
ALL = (*HOSTILE, "cat", "🐈 emoji", "soft\u00adhyphen", "e\u0301")
ALL_ZH = (*CHINESE, "猫", "🐈", "软", "重")
FILES = {
    "onnx": {"run.cpp", "run.kt", "run.swift"},
    "litert": {"run.kt"},
    "executorch": {"run.kt", "run.swift"},
    "coreml": {"run.swift"},
    "torchscript": {"run.cpp"},
    "aoti": {"run.cpp"},
    "openvino": set(),
    "ncnn": set(),
    "mnn": set(),
    "tensorrt": set(),
}
ODD: dict[str, Any] = {"mean": (0.1 + 0.2, 1 / 3, 1e-05), "std": (0.229, 2.0, 1.0000000001)}
GREY: dict[str, Any] = {"mean": (0.4914,), "std": (0.2471,)}


def manifest(how: Preprocess | None, labels: Sequence[str] = ALL, zh: Sequence[str] = ALL_ZH) -> dict[str, Any]:
    """What bundle.describe says, as far as the examples read it."""
    inside = how is not None and how.inside
    return {
        "model": {"file": "model.onnx"},
        "task": "classification",
        "preprocessing": to_json(how),
        "input": {
            "name": "pixels" if inside else "input",
            "layout": "NHWC" if inside else "NCHW",
            "dtype": "uint8" if inside else "float32",
        },
        "output": {"name": "output"},
        "labels": [{"name": en, "name_zh": cn} for en, cn in zip(labels, zh, strict=True)],
    }


def hows() -> list[Preprocess]:
    """Every mode, channel order, filter and place of normalisation."""
    made = []
    for mode, order, filter, inside in itertools.product(
        ("stretch", "crop"), ("RGB", "BGR", "GRAY"), ("nearest", "bilinear", "bicubic", "lanczos"), (False, True)
    ):
        resize = 33 if mode == "crop" else None
        numbers = GREY if order == "GRAY" else ODD
        made.append(Preprocess(24, 31, mode, resize, filter, order, inside=inside, **numbers))
    return made


def photos(how: Preprocess) -> np.ndarray:
    """`pictures` as the model was calibrated on them: uint8 (5, H, W, C)."""
    return np.stack([to_pixels(image, how) for image in pictures()])


def pictures() -> list[Image.Image]:
    """Gradients, edges and noise in odd sizes, in colour; every value of a byte occurs."""
    dice = np.random.default_rng(8)
    made = []
    for k, (width, height) in enumerate(((40, 33), (33, 71), (64, 64), (120, 37), (33, 34))):
        y, x = np.mgrid[:height, :width]
        base = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), (x * y + 40 * k) % 256], -1)
        noise = dice.integers(0, 256, base.shape)
        made.append(Image.fromarray(np.where((x // 7 % 2 == 0)[..., None], base, noise).astype(np.uint8)))
    return made


# --- what is written, anywhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FILES)
def test_each_format_has_its_files_and_nothing_is_left_open(format: str) -> None:
    for how in hows():
        made = examples(format, manifest(how))
        takes = not how.inside or format in ("onnx", "torchscript", "aoti")
        assert set(made) == (FILES[format] if takes else set())
        for text in made.values():
            plain = text.replace("@HEIGHT@ @NONE@", "").replace('"//: end"', "")
            assert not re.search(r"@[A-Z_]+@|//: |@COMMON@", plain)
            assert text.endswith("\n")


def test_without_images_only_what_takes_ready_floats_is_there() -> None:
    for format, files in FILES.items():
        assert set(examples(format, manifest(None))) == (files if format in ("torchscript", "aoti") else set())


def test_a_task_without_classes_has_no_example_of_classes() -> None:
    assert examples("onnx", manifest(hows()[0]) | {"task": "detection"}) == {}


NUMBERS = {"run.cpp": r"double {}\[CHANNELS\] = \{{(.*?)\}}", "run.kt": r"val {} = doubleArrayOf\((.*?)\)"}
SWIFT = r"static let {}: \[Double\] = \[(.*?)\]"


@pytest.mark.parametrize("format", [f for f in FILES if FILES[f] and f not in ("torchscript", "aoti")])
def test_constants_are_the_manifests_to_the_last_digit(format: str) -> None:
    for how in (h for h in hows() if not h.inside):
        found = json.loads(json.dumps(manifest(how)))["preprocessing"]
        for name, text in examples(format, manifest(how)).items():
            for key in ("mean", "std"):
                pattern = NUMBERS[name].format(key.upper()) if name in NUMBERS else SWIFT.format(key)
                (values,) = re.findall(pattern, text)
                assert [float(v) for v in values.split(",")] == found[key]
                assert all("." in v or "e" in v for v in values.split(","))
            for key in ("height", "width"):
                assert re.search(rf"\b{key}\b = {found[key]}\b", text, re.IGNORECASE)
            if name != "run.cpp":
                assert ("33" in re.findall(r"(?i)\bresize = (\d+)", text)) == (how.mode == "crop")
                assert f'"{how.channel_order}"' in text
                assert f'"{how.interpolation}"' in text
                assert f'"{how.mode}"' in text


def test_the_layout_is_that_of_the_file() -> None:
    how = Preprocess(24, 31)
    assert '"NHWC"' in examples("litert", manifest(how))["run.kt"]
    assert "i * CHANNELS + c" in examples("litert", manifest(how))["run.kt"]
    for format, name in (("onnx", "run.kt"), ("executorch", "run.kt"), ("coreml", "run.swift"), ("onnx", "run.swift")):
        assert '"NCHW"' in examples(format, manifest(how))[name]
    assert "c * height * width + i" in examples("coreml", manifest(how))["run.swift"]
    for text in examples("onnx", manifest(Preprocess(24, 31, inside=True))).values():
        assert '"pixels"' in text
        assert "MEAN" not in text
        assert "normalize(" not in text


def read_back(literal: str, language: str) -> str:
    """A literal's value by the language's own rules, told apart from those that `quoted` is written by: JSON's for Kotlin
    (whose escapes are JSON's and \\$), Python's for C++ (octal) and Swift."""
    if language == "kotlin":
        assert not re.search(r"(?<!\\)(?:\\\\)*\$", literal)
        return json.loads(literal.replace("\\$", "$"))
    if language == "swift":
        return ast.literal_eval(re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", literal))
    return ast.literal_eval(
        "b" + re.sub(r"[^\x00-\x7f]", lambda m: "".join(f"\\x{b:02x}" for b in m[0].encode()), literal)
    ).decode()


@pytest.mark.parametrize("language", ["kotlin", "swift", "cpp"])
def test_strings_are_written_so_that_they_read_the_same(language: str) -> None:
    for text in (*HOSTILE, *CHINESE, *ALL, *ALL_ZH, "\x00\x1f\x7f", "\U000e0041 tag"):
        written = quoted(text, language)
        assert written.isprintable()
        assert "\n" not in written
        assert read_back(written, language) == text


def test_labels_keep_their_number_and_order() -> None:
    many = [f"class {k}, with a comma" for k in range(1000)]
    text = examples("onnx", manifest(Preprocess(8, 8), many, [f"第{k}类" for k in range(1000)]))["run.kt"]
    block = re.findall(r"val LABELS: .*?listOf\(\n(.*?)\n        \)", text, re.DOTALL)[0]
    assert json.loads(f"[{block}]") == many
    assert max(map(len, text.splitlines())) < 140


# --- the same numbers, where a compiler is ----------------------------------------------------------------

CASES = {
    "stretch_rgb": ("onnx", Preprocess(24, 31, **ODD)),
    "crop_bgr": ("executorch", Preprocess(24, 31, "crop", 33, channel_order="BGR")),
    "crop_grey": ("onnx", Preprocess(23, 30, "crop", 33, channel_order="GRAY", **GREY)),
    "inside_bgr": ("onnx", Preprocess(24, 31, channel_order="BGR", inside=True)),
    "inside_grey": ("onnx", Preprocess(24, 31, channel_order="GRAY", inside=True, **GREY)),
}
KOTLIN_ONLY = {
    "last_rgb": ("litert", Preprocess(24, 31, **ODD)),
    "last_grey": ("litert", Preprocess(24, 31, channel_order="GRAY", **GREY)),
}
SWIFT_ONLY = {"coreml_rgb": ("coreml", Preprocess(24, 31, "crop", 33))}
SCORES = (0.5, -3.25, 7.0, 7.0, 88.5, -100.0, 88.25, 1e-3, 0.0, 12.0, -0.5, 3.0)
SIZES = [(w, h) for w in (33, 34, 35, 47, 500, 333, 4032) for h in (33, 36, 48, 375, 500, 3024, 4001)]

KOTLIN_MAIN = """
import java.io.*
import java.nio.*
import java.nio.file.*

fun ints(path: String): IntArray {
    val ints = ByteBuffer.wrap(Files.readAllBytes(Paths.get(path))).order(ByteOrder.LITTLE_ENDIAN).asIntBuffer()
    return IntArray(ints.remaining()).also { ints.get(it) }
}
fun save(path: String, values: FloatArray) {
    val out = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
    values.forEach { out.putFloat(it) }
    Files.write(Paths.get(path), out.array())
}
fun main(args: Array<String>) {
    val room = args[0]
    val scores = floatArrayOf(@SCORES@)
    val sizes = ints("$room/sizes")
    @BODY@
}
"""
KOTLIN_CASE = """
    run {
        val argb = ints("$room/@CASE@.in")
        val size = @CASE@.Model.HEIGHT * @CASE@.Model.WIDTH
        val out = ByteArrayOutputStream()
        for (start in argb.indices step size) {
            val one = argb.copyOfRange(start, start + size)
            @FEED@
        }
        Files.write(Paths.get("$room/@CASE@.out"), out.toByteArray())
        save("$room/@CASE@.softmax", @CASE@.Model.softmax(scores))
        File("$room/@CASE@.topk").writeText(@CASE@.answers(scores, 4).joinToString("\\u0000") { it.label + "\\u0001" + it.labelZh })
        File("$room/@CASE@.sizes").writeText((0 until sizes.size step 2).joinToString("\\n") {
            val (w, h) = @CASE@.Model.scaledSize(sizes[it], sizes[it + 1])
            val (left, top) = @CASE@.Model.cropCorner(w, h)
            "$w $h $left $top"
        })
    }
"""
KOTLIN_FLOATS = """val all = ByteBuffer.allocate(4 * size * @CASE@.Model.CHANNELS).order(ByteOrder.LITTLE_ENDIAN)
            @CASE@.Model.normalize(one).forEach { all.putFloat(it) }
            out.write(all.array())"""
SWIFT_MAIN = """
let room = CommandLine.arguments[1]
func bytes(_ name: String) -> [UInt8] { [UInt8](FileManager.default.contents(atPath: room + "/" + name)!) }
func save(_ name: String, _ data: Data) { precondition(FileManager.default.createFile(atPath: room + "/" + name, contents: data)) }
func save(_ name: String, _ values: [Float]) { save(name, values.withUnsafeBytes { Data($0) }) }
let scores: [Float] = [@SCORES@]
let sizes: [Int] = bytes("sizes").withUnsafeBytes { $0.bindMemory(to: Int32.self).map { Int($0) } }
@BODY@
"""
SWIFT_CASE = """
do {
    let rgba = bytes("@CASE@.in")
    let size = 4 * @CASE@.Model.height * @CASE@.Model.width
    var out = Data()
    for start in stride(from: 0, to: rgba.count, by: size) {
        let one = Array(rgba[start..<(start + size)])
        @CASE@.Model.@FEED@(one).withUnsafeBytes { out.append(contentsOf: $0) }
    }
    save("@CASE@.out", out)
    save("@CASE@.softmax", @CASE@.Model.softmax(scores))
    let best = @CASE@.Model.answers(scores, 4).map { $0.label + "\\u{1}" + $0.labelZh }
    save("@CASE@.topk", best.joined(separator: "\\u{0}").data(using: .utf8)!)
    let lines: [String] = stride(from: 0, to: sizes.count, by: 2).map {
        let scaled = @CASE@.Model.scaledSize(width: sizes[$0], height: sizes[$0 + 1])
        let corner = @CASE@.Model.cropCorner(width: scaled.width, height: scaled.height)
        return "\\(scaled.width) \\(scaled.height) \\(corner.left) \\(corner.top)"
    }
    save("@CASE@.sizes", lines.joined(separator: "\\n").data(using: .utf8)!)
}
"""


def pure(text: str) -> str:
    return re.findall(r"// --- begin pure.*?\n(.*?)// --- end pure ---", text, re.DOTALL)[0]


def fill(template: str, **values: str) -> str:
    for key, value in values.items():
        template = template.replace(f"@{key}@", value)
    return template


def colours(how: Preprocess) -> np.ndarray:
    """Pixels in colour as a phone has them, scaled and cut already: uint8 (5, H, W, 3) in RGB order."""
    plain = Preprocess(how.height, how.width, how.mode, how.resize)
    return np.stack([to_pixels(image, plain) for image in pictures()])


def expected(how: Preprocess, format: str, rgb: np.ndarray) -> np.ndarray:
    """What Python makes of the same pixels, in the file's layout."""
    ready = np.stack(
        [
            to_pixels(
                one, Preprocess(how.height, how.width, channel_order=how.channel_order, mean=how.mean, std=how.std)
            )
            for one in rgb
        ]
    )
    if how.inside:
        return ready
    x = normalize(ready, how)
    return x.transpose(0, 2, 3, 1) if format == "litert" else x


def crop_of(how: Preprocess, width: int, height: int) -> tuple[int, int, int, int]:
    """Scaled size and corner, as Pillow's steps in data.preprocess take them: read off what they do to an image whose
    pixels hold their own place."""
    w, h = how.width, how.height
    if how.mode == "crop":
        short = how.resize or 0
        w, h = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    place = np.stack([np.arange(w) + 0 * np.arange(h)[:, None], np.arange(h)[:, None] + 0 * np.arange(w)], -1)
    marks = [Image.fromarray((place[..., k] // d % 256).astype(np.uint8)) for k in (0, 1) for d in (1, 256)]
    grey = Preprocess(how.height, how.width, how.mode, how.resize, channel_order="GRAY", **GREY)
    low_x, high_x, low_y, high_y = (int(to_pixels(m, grey)[0, 0, 0]) for m in marks)
    return w, h, low_x + 256 * high_x, low_y + 256 * high_y


def hold(room: Path, cases: dict[str, tuple[str, Preprocess]]) -> None:
    """What the compiled program wrote, against Python."""
    powers = np.exp(np.float64(SCORES) - max(SCORES))
    share = powers / powers.sum()
    best = np.argsort(-share, kind="stable")[:4]
    for case, (format, how) in cases.items():
        want = expected(how, format, colours(how))
        got = np.fromfile(room / f"{case}.out", np.uint8 if how.inside else np.float32).reshape(want.shape)
        np.testing.assert_array_equal(got, want, err_msg=case)
        np.testing.assert_allclose(np.fromfile(room / f"{case}.softmax", np.float32), share, rtol=1e-6, atol=1e-12)
        told = [tuple(row.split("\x01")) for row in (room / f"{case}.topk").read_bytes().decode().split("\x00")]
        assert told == [(ALL[k], ALL_ZH[k]) for k in best]
        lines = [tuple(map(int, line.split())) for line in (room / f"{case}.sizes").read_text().splitlines()]
        assert lines == [crop_of(how, w, h) for w, h in SIZES]


def prepare(room: Path, cases: dict[str, tuple[str, Preprocess]], write: Callable[[np.ndarray], np.ndarray]) -> None:
    np.array(SIZES, np.int32).tofile(room / "sizes")
    for case, (_, how) in cases.items():
        write(colours(how)).tofile(room / f"{case}.in")


def ran(words: list[object], room: Path) -> None:
    """Run a tool in `room`; Java's second compiler would cost the Kotlin compiler half its time."""
    quick = {**os.environ, "JAVA_OPTS": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"}
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=600, cwd=room, env=quick)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def argb(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = (rgb[..., k].astype(np.uint32) for k in range(3))
    return (np.uint32(0xFF000000) | red << 16 | green << 8 | blue).astype("<u4")


def rgba(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)


@pytest.mark.skipif(shutil.which("kotlinc") is None, reason="no Kotlin compiler (apt-get install kotlin)")
def test_kotlin_computes_what_python_does(tmp_path: Path) -> None:
    cases = CASES | KOTLIN_ONLY
    prepare(tmp_path, cases, argb)
    body, files = [], []
    for place, text in ANDROID.items():
        files.append(tmp_path / f"{place}.kt")
        files[-1].write_text(f"package {place}\n{text}\n", "utf-8")
    for case, (format, how) in cases.items():
        files.append(tmp_path / f"{case}.kt")
        files[-1].write_text(f"package {case}\n{examples(format, manifest(how))['run.kt']}", "utf-8")
        feed = f"out.write({case}.Model.bytes(one))" if how.inside else fill(KOTLIN_FLOATS, CASE=case)
        body.append(fill(KOTLIN_CASE, FEED=feed, CASE=case))
    numbers = ", ".join(f"{s}f" for s in SCORES)
    (tmp_path / "main.kt").write_text(fill(KOTLIN_MAIN, SCORES=numbers, BODY="".join(body)), "utf-8")
    ran(["kotlinc", *files, "main.kt", "-include-runtime", "-d", "all.jar"], tmp_path)
    ran(["java", "-cp", "all.jar", "MainKt", tmp_path], tmp_path)
    hold(tmp_path, cases)


@pytest.mark.skipif(shutil.which("swiftc") is None, reason="no Swift compiler")
def test_swift_computes_what_python_does(tmp_path: Path) -> None:
    cases = CASES | SWIFT_ONLY
    prepare(tmp_path, cases, rgba)
    parts, body = ["import Foundation\n"], []
    for case, (format, how) in cases.items():
        parts.append(f"enum {case} {{\n{pure(examples(format, manifest(how))['run.swift'])}}}\n")
        body.append(fill(SWIFT_CASE, FEED="bytes" if how.inside else "normalize", CASE=case))
    numbers = ", ".join(map(str, SCORES))
    parts.append(fill(SWIFT_MAIN, SCORES=numbers, BODY="".join(body)))
    (tmp_path / "main.swift").write_text("".join(parts), "utf-8")
    ran(["swiftc", "main.swift", "-o", "all"], tmp_path)
    ran([tmp_path / "all", tmp_path], tmp_path)
    hold(tmp_path, cases)


@pytest.mark.skipif(shutil.which("swiftc") is None, reason="no Swift compiler")
def test_swift_files_are_well_typed(tmp_path: Path) -> None:
    for name, text in APPLE.items():
        if sys.platform != "darwin" or not name.startswith("Core"):
            (tmp_path / f"{name}.swift").write_text(text, "utf-8")
            ran(["swiftc", "-emit-module", "-module-name", name, "-parse-as-library", f"{name}.swift"], tmp_path)
    for case, (format, how) in (CASES | SWIFT_ONLY).items():
        file = tmp_path / f"{case}.swift"
        file.write_text(examples(format, manifest(how))["run.swift"], "utf-8")
        ran(["swiftc", "-typecheck", "-parse-as-library", "-warnings-as-errors", "-I", tmp_path, file], tmp_path)
