"""The bundle: whole, checked, honest, and its own runner gives the answers that lighten gives."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import trial
from lighten import bundle as bundles
from lighten import plugins
from lighten.bundle import Bundle
from lighten.data.cache import sha256_file
from lighten.data.images import open_image
from lighten.data.preprocess import normalize, to_pixels
from lighten.errors import BadBundle
from lighten.runner import answers
from lighten.types import Artifact, Budget, Device, Estimate, Final, Precision, Preprocess, Recipe, Result, Step, Trial

onnx = pytest.importorskip("onnx")

CLASSES, CLASSES_ZH = ("red", "green", "blue", "dark"), ("红", "绿", "蓝", "暗")
HOW = Preprocess(12, 16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
FILES = ("model.onnx", "golden.npz", "run.py", "labels.txt", "README.md", "run.cpp", "run.kt", "run.swift")
INT8 = Recipe((Step("quantize"),), Precision("int8", "int8"))


def model(channels: int) -> Any:
    """Scores that hang on the mean of each channel and of the image's left half: order, crop and mirror all matter."""
    from onnx import TensorProto, helper, numpy_helper

    dice = np.random.default_rng(4)
    colour, side = dice.normal(size=(channels, 4)), 12 * dice.normal(size=(channels, 4))
    held = {
        "start": np.array([0], np.int64), "stop": np.array([5], np.int64), "axis": np.array([3], np.int64),
        "w": np.concatenate([colour - side, side]).astype(np.float32), "b": dice.normal(size=4).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node("Slice", ["input", "start", "stop", "axis"], ["left"]),
        helper.make_node("GlobalAveragePool", ["left"], ["left_mean"]),
        helper.make_node("Concat", ["mean", "left_mean"], ["both"], axis=1),
        helper.make_node("Flatten", ["both"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", channels, "h", "w_"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def own_answers(file: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


def result_of(won: Trial, how: Preprocess | None) -> Result:
    """A run with one trial."""
    score = Estimate(88.125, 1.0, 1800)
    return Result(
        verdict="PASS", misses=(), advice=(), budget=Budget(max_drop=1), device=Device("d", "d", "设备", ("onnx",)),
        task="classification", model="colours", data="made up", classes=CLASSES, classes_zh=CLASSES_ZH, preprocess=how,
        baseline=trial(Recipe()), trials=(won,), winner=won.id, final=Final(score, score, score, 0, ()),
        environment={"python": "3"}, command="lighten compress", images={"report": 1800},
    )  # fmt: skip


def write_bundle(folder: Path, how: Preprocess | None = HOW, recipe: Recipe = INT8) -> Path:
    """A run folder with one trial, and its bundle."""
    file = folder / "artifacts" / recipe.id / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(model(how.channels if how else 3).SerializeToString())
    won = replace(trial(recipe), artifact=Artifact(str(file.relative_to(folder)), "onnx", sha256_file(file)))
    result = result_of(won, how)
    dice = np.random.default_rng(0)
    if how is None:
        pixels: np.ndarray = dice.normal(size=(20, 3, 12, 16)).astype(np.float32)
        x = pixels
    else:
        pixels = dice.integers(0, 256, (20, how.height, how.width, how.channels), dtype=np.uint8)
        x = normalize(pixels, how)
    return bundles.write(result, folder, pixels, own_answers(file, x))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    edit(manifest)
    file.write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")


# --- what is written ------------------------------------------------------------------------------------


def test_a_bundle_holds_what_it_should_and_nothing_else(made: Path) -> None:
    assert {f.name for f in made.iterdir()} == {*FILES, "manifest.json"}
    found = bundles.load(made)
    assert found.model == made / "model.onnx"
    assert found.format == "onnx"
    assert found.preprocess == HOW
    assert found.labels() == CLASSES
    assert found.labels("zh") == CLASSES_ZH
    assert found.manifest["model"]["sha256"] == found.manifest["files"]["model.onnx"] == sha256_file(found.model)
    assert found.manifest["input"]["shape"] == ["batch", 3, 12, 16]
    assert (made / "labels.txt").read_text("utf-8").splitlines()[2] == "blue\t蓝"


def test_golden_vectors_are_the_first_sixteen_images_and_answers(made: Path) -> None:
    golden = bundles.load(made).golden()
    assert golden["pixels"].shape == (16, 12, 16, 3)
    assert golden["pixels"].dtype == np.uint8
    x = ((golden["pixels"] / 255.0 - HOW.mean) / HOW.std).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_allclose(own_answers(made / "model.onnx", x), golden["outputs"], atol=1e-5)
    assert float(golden["atol"]) == pytest.approx(0.05 * max(1.0, np.abs(golden["outputs"]).max()))


def test_the_readme_is_filled_in(made: Path) -> None:
    text = (made / "README.md").read_text("utf-8")
    assert "{" not in text
    for word in ("model.onnx", "int8", "88.12", "1800", "PASS", "12", "16"):
        assert word in text


def test_writing_again_replaces_and_failing_leaves_the_old_one(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "a")
    before = {f.name: f.read_bytes() for f in first.iterdir()}
    won = trial(Recipe())
    with pytest.raises(FileNotFoundError):
        bundles.write(  # its artifact is not there
            Result(
                "PASS", (), (), Budget(), Device("d", "d", "d", ("onnx",)), "classification", "m", "d", CLASSES, CLASSES_ZH,
                HOW, won, (), won.id, Final(Estimate(1, 1, 1), Estimate(1, 1, 1), Estimate(1, 1, 1), 0, ()), {}, "", {},
            ), tmp_path / "a", np.zeros((1, 12, 16, 3), np.uint8), np.zeros((1, 4), np.float32),
        )  # fmt: skip
    assert {f.name: f.read_bytes() for f in first.iterdir()} == before
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"artifacts", "bundle"}


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(BadBundle, match=rf"{name}.*sha256"):
        bundles.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BadBundle, match=name):
        bundles.load(folder)


def test_a_symlink_is_no_file_of_the_bundle(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").rename(tmp_path / "elsewhere")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        bundles.load(folder)


def test_a_model_that_is_a_folder_keeps_its_shape(tmp_path: Path) -> None:
    """Core ML's package: the model's file lies beside folders, and a changed file in them is named."""
    recipe = replace(INT8, format="coreml")
    home = tmp_path / "artifacts" / recipe.id / "model.mlpackage"
    inner = ("Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin")
    for k, name in enumerate(("Manifest.json", *inner)):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"part %d" % k)
    file = home / "Manifest.json"
    artifact = Artifact(str(file.relative_to(tmp_path)), "coreml", sha256_file(file), inner)
    result = replace(result_of(replace(trial(recipe), artifact=artifact), HOW), path=str(tmp_path))
    pixels: np.ndarray = np.zeros((2, HOW.height, HOW.width, HOW.channels), np.uint8)
    made = bundles.write(result, tmp_path, pixels, np.zeros((2, len(CLASSES)), np.float32))
    found = bundles.load(made)
    assert found.model == made / "model.mlpackage" / "Manifest.json"
    assert (made / "model.mlpackage" / inner[1]).read_bytes() == b"part 2"
    assert "model.mlpackage" in (made / "run.swift").read_text("utf-8")
    (made / "model.mlpackage" / inner[1]).write_bytes(b"part 3")
    with pytest.raises(BadBundle, match=r"weight\.bin.*sha256"):
        bundles.load(made)
    shutil.move(made / "model.mlpackage" / "Data", tmp_path / "elsewhere")
    (made / "model.mlpackage" / "Data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadBundle, match="not a plain file"):
        bundles.load(made)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "a/../../x", "a//b", "a\\b", "C:x", "..", ".", "", "run.py/"]
)
@pytest.mark.parametrize("where", ["files", "file", "companions"])
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str, where: str) -> None:
    (folder.parent / "x").write_text("secret")

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = sha256_file(folder.parent / "x")
        if where == "file":
            manifest["model"]["file"] = name
        elif where == "companions":
            manifest["model"]["companions"] = [name]

    change(folder, edit)
    with pytest.raises(BadBundle, match="outside the bundle"):
        bundles.load(folder)


def test_a_model_without_a_sum_is_refused(folder: Path) -> None:
    change(folder, lambda m: m["files"].pop("model.onnx"))
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        bundles.load(folder)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"null", b"3", b"\xff\xfe\x00", b'{"files": 3}'])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(BadBundle, match=r"manifest\.json"):
        bundles.load(folder)


@pytest.mark.parametrize(
    "path, value",
    [
        (("schema_version",), "two"),
        (("schema_version",), None),
        (("model", "file"), 5),
        (("model", "companions"), None),
        (("model",), []),
        (("preprocessing",), 3),
        (("preprocessing",), {"height": 12}),
        (("preprocessing", "std"), [0.0, 1.0, 1.0]),
        (("preprocessing", "mean"), 7),
        (("files",), []),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(folder: Path, path: tuple[str, ...], value: Any) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    change(folder, edit)
    with pytest.raises(BadBundle):
        bundles.load(folder)


def test_a_newer_bundle_asks_for_a_newer_lighten(folder: Path) -> None:
    change(folder, lambda m: m.update(schema_version=bundles.SCHEMA_VERSION + 1))
    with pytest.raises(BadBundle, match="schema version 2") as e:
        bundles.load(folder)
    assert "pip install -U lighten" in e.value.to_do


def test_a_run_folder_is_pointed_to_its_bundle(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadBundle) as e:
        bundles.load(made.parent)
    assert str(made) in e.value.to_do
    with pytest.raises(BadBundle, match="no manifest"):
        bundles.load(tmp_path / "nothing")


# --- verify -----------------------------------------------------------------------------------------------


def golden_with(folder: Path, **arrays: np.ndarray) -> Bundle:
    """The bundle with other golden vectors, and sums that fit them."""
    with np.load(folder / "golden.npz") as kept:
        np.savez_compressed(folder / "golden.npz", **{**kept, **arrays})  # type: ignore[arg-type]
    change(folder, lambda m: m["files"].update({"golden.npz": sha256_file(folder / "golden.npz")}))
    return bundles.load(folder)


def test_an_untouched_bundle_verifies(made: Path) -> None:
    passed, text = bundles.verify(bundles.load(made))
    assert passed
    assert text.startswith("16 of 16")


@pytest.mark.parametrize("by", [10.0, float("nan")])
def test_one_golden_answer_that_differs_fails(folder: Path, by: float) -> None:
    outputs = bundles.load(folder).golden()["outputs"].copy()
    outputs[3, 1] += by
    passed, _ = bundles.verify(golden_with(folder, outputs=outputs))
    assert not passed


def test_a_difference_inside_the_tolerance_passes_and_is_told(folder: Path) -> None:
    golden = bundles.load(folder).golden()
    outputs = golden["outputs"].copy()
    outputs[0, 0] += 0.9 * golden["atol"]
    passed, text = bundles.verify(golden_with(folder, outputs=outputs))
    assert passed
    assert f"{0.9 * float(golden['atol']):.3g}" in text


def test_golden_answers_of_another_shape_fail(folder: Path) -> None:
    passed, text = bundles.verify(golden_with(folder, outputs=np.zeros((16, 7), np.float32)))
    assert not passed
    assert "(16, 7)" in text


# --- the bundle's own runner ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real kinds of files: each would give another answer if it were decoded carelessly."""
    room = tmp_path_factory.mktemp("photos")
    dice = np.random.default_rng(1)
    coarse = Image.fromarray(dice.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    photo = coarse.resize((57, 40), Image.Resampling.BICUBIC)
    ramp = np.linspace(0, 65535, 40 * 57).reshape(40, 57).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(dice.integers(0, 256, (40, 57), dtype=np.uint8)))
    paths = {k: room / f"{k}.{v}" for k, v in {
        "rgb": "png", "tall": "png", "jpeg": "jpg", "grey": "png", "sixteen": "png", "cmyk": "jpg", "turned": "jpg",
        "palette": "gif", "alpha": "png", "grey_alpha": "png", "bits": "png", "exact": "png",
    }.items()}  # fmt: skip
    photo.save(paths["rgb"])
    photo.transpose(Image.Transpose.ROTATE_90).save(paths["tall"])
    photo.save(paths["jpeg"], quality=80)
    photo.convert("L").save(paths["grey"])
    Image.fromarray(ramp).save(paths["sixteen"])
    photo.convert("CMYK").save(paths["cmyk"])
    photo.save(paths["turned"], exif=exif)
    photo.quantize(32).save(paths["palette"])
    clear.save(paths["alpha"])
    clear.convert("LA").save(paths["grey_alpha"])
    photo.convert("1").save(paths["bits"])
    photo.resize((16, 12)).save(paths["exact"])
    return paths


def labels_of(line: str) -> list[tuple[str, float]]:
    words = line.split("  ")
    first = words[0].split(" ")[1:]
    rows = [first, *[w.split(" ") for w in words[1:]]]
    return [(row[0], float(row[1])) for row in rows]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_run_py_prints_the_labels_that_lighten_gives(made: Path, photos: dict[str, Path], lang: str) -> None:
    command = [sys.executable, str(made / "run.py"), *map(str, photos.values()), *(["--zh"] if lang == "zh" else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = list(answers(made, list(photos.values()), lang, 3))
    assert len(lines) == len(wanted) == len(photos)
    assert len({a.labels[0][0] for a in wanted}) > 1  # the images do differ
    for line, want in zip(lines, wanted):
        assert line.startswith(str(want.image))
        got = labels_of(line)
        assert [name for name, _ in got] == [name for name, _ in want.labels]
        np.testing.assert_allclose([p for _, p in got], [100 * p for _, p in want.labels], atol=0.051)


SETTINGS = {
    "stretch": HOW,
    "crop": Preprocess(12, 16, "crop", 20),
    "square crop": Preprocess(16, 16, "crop", 16),
    "odd crop": Preprocess(11, 15, "crop", 18, "bicubic"),
    "bgr": replace(HOW, channel_order="BGR"),
    "bgr crop": Preprocess(9, 9, "crop", 13, "lanczos", "BGR"),
    "gray": Preprocess(12, 16, channel_order="GRAY", mean=(0.3,), std=(0.7,)),
    "gray crop": Preprocess(8, 8, "crop", 9, "nearest", "GRAY", (0.5,), (0.5,)),
    "bicubic": replace(HOW, interpolation="bicubic"),
    "upscale": Preprocess(64, 80, interpolation="bilinear"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_run_py_prepares_images_exactly_as_lighten_does(name: str, photos: dict[str, Path], tmp_path: Path) -> None:
    how = SETTINGS[name]
    spec = importlib.util.spec_from_file_location("bundle_run", write_bundle(tmp_path / "run", how) / "run.py")
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    for kind, path in photos.items():
        want = to_pixels(open_image(path), how)
        got = run.pixels(run.upright(path))
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want, err_msg=kind)
        np.testing.assert_array_equal(run.normalize(got[None]), normalize(want[None], how), err_msg=kind)


def test_run_py_says_when_the_model_takes_no_images(tmp_path: Path, photos: dict[str, Path]) -> None:
    made = write_bundle(tmp_path, None)
    command = [sys.executable, str(made / "run.py"), str(photos["rgb"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "float inputs" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(BadBundle, match="float inputs"):
        list(answers(made, [photos["rgb"]], "en", 3))


@pytest.mark.parametrize("format", plugins.names("formats"))
def test_every_runtime_has_a_run_py_of_its_own(format: str) -> None:
    """Short, whole Python, and with no other runtime's loader in it."""
    text = bundles.runner(format)
    compile(text, "run.py", "exec")
    assert text.count("def load_model(") == 1
    assert len(text.splitlines()) < 100


def test_run_py_is_short_and_needs_nothing_of_lighten(made: Path) -> None:
    text = (made / "run.py").read_text("utf-8")
    assert len(text.splitlines()) < 100
    assert "import lighten" not in text
    assert "from lighten" not in text
