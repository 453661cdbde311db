"""Models in: hostile, damaged and foreign weights are refused by name, and nothing of a file is ever run."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from lighten.data.preprocess import normalize, to_pixels  # noqa: E402
from lighten.errors import BadModel, UnknownName, UntrustedCode  # noqa: E402
from lighten.models.load import build, fill, load, own_preprocess, read_weights  # noqa: E402

RESNET = "lighten:resnet20"


def state(classes: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build(RESNET, classes=classes).state_dict())


def saved(value: Any, folder: Path, name: str = "w.pth", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def refusal(path: Path) -> BadModel:
    with pytest.raises(BadModel, match=path.name) as caught:
        read_weights(path)
    assert caught.value.to_do
    return caught.value


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["w.pth", "legacy.pth", "w.safetensors", "renamed.pth"])
def test_weights_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors, path = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}, tmp_path / kind
    if kind in ("w.safetensors", "renamed.pth"):
        save_file(tensors, path)
    else:
        saved(tensors, tmp_path, kind, _use_new_zipfile_serialization=kind == "w.pth")
    got, notices = read_weights(path)
    assert notices == ()
    assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in tensors.items()}


HTML = b"\n <!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (HTML, "is a web page"),
        (b"<HTML>", "is a web page"),
        (POINTER, "is a Git LFS pointer"),
        (b"these are no weights", "is not a weights file"),
        (bytes(range(1, 256)) * 20, "is not a weights file"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_files_that_are_no_weights(content: bytes, message: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{ending}"
    path.write_bytes(content)
    if ending == ".safetensors" and "not a weights file" in message:
        message = "damaged or truncated"
    assert message in refusal(path).what


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "gone.pth").what
    assert "is a folder" in refusal(tmp_path).what


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated_pth(legacy: bool, part: float, tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(5000)}, tmp_path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * part)])
    assert "damaged or truncated" in refusal(path).what


def _safetensors(header: bytes, body: bytes = bytes(16), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    "raw",
    [
        _safetensors(HEADER, bytes(8)),
        _safetensors(HEADER, length=2**60),
        _safetensors(HEADER, length=5),
        _safetensors(HEADER.replace(b"[4]", b"[5]")),
        _safetensors(HEADER.replace(b"16]", b"999999]")),
        _safetensors(HEADER.replace(b"F32", b"X99")),
        _safetensors(b"not json at all"),
        b"abc",
    ],
    ids=["cut", "huge length", "short length", "shape", "offsets", "dtype", "no json", "tiny"],
)
def test_safetensors_with_a_wrong_header(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(_safetensors(HEADER))
    assert list(read_weights(tmp_path / "good.safetensors")[0]) == ["a"]
    (tmp_path / "w.safetensors").write_bytes(raw)
    assert "damaged or truncated" in refusal(tmp_path / "w.safetensors").what


# --- code in files ----------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return subprocess.call, ([sys.executable, "-c", f"open({str(self.target)!r}, 'w')"],)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_with_code_does_not_run(kind: str, tmp_path: Path) -> None:
    value, target = {"a": torch.zeros(2), "b": Payload(tmp_path / "pwned")}, tmp_path / "pwned"
    if kind == "pickle":
        (tmp_path / "w.pth").write_bytes(pickle.dumps(value["b"]))
    else:
        saved(value, tmp_path, _use_new_zipfile_serialization=kind == "zip")
    e = refusal(tmp_path / "w.pth")
    assert "more than weights" in e.what
    assert "torch.save(model.state_dict()" in e.to_do
    assert not target.exists()
    if kind == "zip":
        torch.load(tmp_path / "w.pth", weights_only=False)
        assert target.exists()  # the payload is live: only the refusal held it back


def test_a_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    e = refusal(saved(nn.Linear(2, 2), tmp_path))
    assert "it needs torch.nn.modules.linear.Linear" in e.what
    assert "add_safe_globals" not in str(e)  # torch's advice is to trust it
    assert "state_dict" in e.to_do


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip")
def test_a_torchscript_archive_is_refused_as_such(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "w.pt")
    assert "TorchScript" in refusal(tmp_path / "w.pt").what


# --- what is in them --------------------------------------------------------------------------------


def test_nested_state_dicts_and_prefixes_are_taken_off_with_a_notice(tmp_path: Path) -> None:
    plain = {"a": torch.zeros(2), "b": torch.ones(2)}
    wrapped = {"epoch": 3, "state_dict": {f"_orig_mod.module.{k}": v for k, v in plain.items()}}
    got, notices = read_weights(saved(wrapped, tmp_path))
    assert sorted(got) == ["a", "b"]
    assert len(notices) == 3
    for word in ("'state_dict'", "'module.'", "'_orig_mod.'"):
        assert any(word in n for n in notices)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    got, notices = read_weights(saved({"module.a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path))
    assert sorted(got) == ["b", "module.a"]
    assert notices == ()


def test_one_entry_can_be_asked_for(tmp_path: Path) -> None:
    path = saved({"best": {"a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, tmp_path)
    assert read_weights(path)[0]["a"].item() == 0
    assert read_weights(path, inner="best")[0]["a"].item() == 1
    with pytest.raises(BadModel, match=r"no entry 'ema'.*best, model"):
        read_weights(path, inner="ema")


@pytest.mark.parametrize("value", [torch.zeros(2), {}, {"a": 1}, {0: torch.zeros(2)}, [torch.zeros(2)]])
def test_what_is_no_state_dict(value: Any, tmp_path: Path) -> None:
    assert "holds no state_dict" in refusal(saved(value, tmp_path)).what


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_named(bad: float, tmp_path: Path) -> None:
    e = refusal(saved({"good": torch.zeros(2), "conv.weight": torch.tensor([1.0, bad])}, tmp_path))
    assert "1 tensors hold NaN or infinity: conv.weight" in e.what


def test_float8_weights_are_checked_too(tmp_path: Path) -> None:
    ok = torch.zeros(2).to(torch.float8_e4m3fn)
    assert list(read_weights(saved({"a": ok}, tmp_path))[0]) == ["a"]
    refusal(saved({"a": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, tmp_path))


# --- filling a model --------------------------------------------------------------------------------


def test_load_gives_the_very_weights_in_eval_mode(tmp_path: Path) -> None:
    tensors = state()
    model, notices = load(saved(tensors, tmp_path), RESNET)
    assert notices == ()
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key]), key


def test_every_key_that_does_not_fit_is_listed() -> None:
    tensors = state()
    keys = [k for k in tensors if k.endswith("weight")]
    tensors["extra.weight"] = tensors.pop(keys[0])
    tensors[keys[1]] = torch.zeros(1, 2)
    want = tuple(state()[keys[1]].shape)
    with pytest.raises(BadModel, match=r"w\.pth does not fit") as caught:
        fill(build(RESNET), tensors, "w.pth", RESNET)
    for row in (f"missing {keys[0]}", "unknown extra.weight", f"{keys[1]}: file (1, 2), model {want}"):
        assert row in caught.value.what


def test_a_long_list_is_cut_and_counted() -> None:
    total = len([k for k in state() if not k.endswith("num_batches_tracked")])
    with pytest.raises(BadModel, match=f"and {total + 1 - 12} more"):
        fill(build(RESNET), {"x": torch.zeros(1)}, "w.pth", RESNET)


def test_old_checkpoints_without_batch_counters_fit() -> None:
    tensors = {k: v for k, v in state().items() if not k.endswith("num_batches_tracked")}
    fill(build(RESNET), tensors, "w.pth", RESNET)


@pytest.mark.parametrize(
    "arch", [RESNET, "torchvision:squeezenet1_1", "torchvision:resnet18", "timm:mobilenetv3_small_050"]
)
@pytest.mark.parametrize("classes", [7, None])
def test_the_number_of_classes_is_read_off_the_weights(arch: str, classes: int | None, tmp_path: Path) -> None:
    tensors = build(arch, classes=classes).state_dict()
    model, _ = load(saved(tensors, tmp_path), arch)
    outputs = model(torch.zeros(2, 3, 64, 64)).shape[1]
    assert outputs == (classes or (10 if arch == RESNET else 1000))


def test_other_layers_are_not_taken_for_a_class_count(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="does not fit"):
        load(saved(build("torchvision:resnet34").state_dict(), tmp_path), "torchvision:resnet18")


# --- architectures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "near"),
    [
        ("torchvision:resnet19", "resnet18"),
        ("timm:mobilenetv3_smal_100", "mobilenetv3_small_100"),
        ("timm:resnet50.a9_in1k", "resnet50.a1_in1k"),
        ("lighten:resnet21", "resnet20"),
    ],
)
def test_an_unknown_architecture_suggests_near_names(arch: str, near: str) -> None:
    with pytest.raises(UnknownName) as caught:
        build(arch)
    assert "Did you mean" in caught.value.to_do
    assert near.split("_")[0][:7] in caught.value.to_do


@pytest.mark.parametrize("arch", ["resnet18", "keras:resnet18", "", ":"])
def test_an_architecture_without_a_home(arch: str) -> None:
    with pytest.raises(BadModel, match="does not say where") as caught:
        build(arch)
    assert "torchvision:NAME" in caught.value.to_do


CODE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from torch import nn

Path(__file__).with_suffix(".ran").touch()

@dataclass
class Settings:
    width: int = 4

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.model = nn.Linear(Settings().width, num_classes)

def plain():
    return Net(5)

def breaks():
    raise RuntimeError("no GPU here")

def leaves():
    raise SystemExit(3)

def number():
    return 42
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path / "net.py"


def test_a_python_file_runs_only_with_trust(file: Path) -> None:
    with pytest.raises(UntrustedCode, match=r"net\.py") as caught:
        build(f"{file}:Net")
    assert "--trust-code" in caught.value.to_do
    assert not file.with_suffix(".ran").exists()
    assert build(f"{file}:Net", trust_code=True).model.out_features == 3
    assert file.with_suffix(".ran").exists()
    assert build(f"{file}:Net", classes=9, trust_code=True).model.out_features == 9
    assert build(f"{file}:plain", classes=9, trust_code=True).model.out_features == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", "net.py:breaks failed: RuntimeError: no GPU here"),
        ("number", "gave a int, not an nn.Module"),
        ("Nett", "has no callable named 'Nett'"),
        ("leaves", "net.py:leaves failed: SystemExit: 3"),
    ],
)
def test_failing_user_code_is_named(name: str, message: str, file: Path) -> None:
    with pytest.raises(BadModel) as caught:
        build(f"{file}:{name}", trust_code=True)
    assert message in caught.value.what


def test_user_files_that_cannot_be_imported(file: Path) -> None:
    file.write_text("def net(:\n")
    with pytest.raises(BadModel, match="failed: SyntaxError"):
        build(f"{file}:net", trust_code=True)
    with pytest.raises(BadModel, match="does not exist"):
        build(f"{file.parent}/gone.py:net", trust_code=True)


def test_a_users_model_whose_own_names_start_with_a_prefix(file: Path, tmp_path: Path) -> None:
    """Its keys are model.weight and model.bias; DataParallel puts module. before them."""
    tensors = build(f"{file}:Net", trust_code=True).state_dict()
    assert sorted(tensors) == ["model.bias", "model.weight"]
    path = saved({f"module.{k}": v for k, v in tensors.items()}, tmp_path)
    model, _ = load(path, f"{file}:Net", trust_code=True)
    assert torch.equal(model.state_dict()["model.weight"], tensors["model.weight"])


# --- preprocessing ----------------------------------------------------------------------------------

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), np.uint8))


def ours(how: Any) -> np.ndarray:
    return normalize(to_pixels(PHOTO, how)[None], how)[0]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "swin_t", "efficientnet_b1"])
def test_preprocessing_is_torchvisions_own(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    how = own_preprocess(f"torchvision:{name}", nn.Identity())
    theirs = models.get_model_weights(name).DEFAULT.transforms()
    np.testing.assert_allclose(ours(how), theirs(PHOTO).numpy(), rtol=1e-5, atol=1e-5)


class Described:
    """Stands for a timm model: what is read of it is only this."""

    def __init__(self, name: str) -> None:
        import timm

        self.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()


def timm_transform(name: str) -> Any:
    from timm.data import create_transform, resolve_data_config

    return create_transform(**resolve_data_config({}, pretrained_cfg=Described(name).pretrained_cfg))


TIMM = [
    "resnet18.a1_in1k",
    "mobilenetv3_small_050.lamb_in1k",
    "tf_efficientnet_lite0.in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_siglip_224.webli",  # squash
    "inception_v3.tv_in1k",
]


@pytest.mark.parametrize("name", TIMM)
def test_preprocessing_is_timms_own(name: str) -> None:
    pytest.importorskip("timm")
    how = own_preprocess(f"timm:{name}", Described(name))  # type: ignore[arg-type]
    np.testing.assert_allclose(ours(how), timm_transform(name)(PHOTO).numpy(), rtol=1e-5, atol=1e-5)


def test_a_tag_chooses_among_timms_preprocessings() -> None:
    pytest.importorskip("timm")
    names = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm:resnet18.tv_in1k", "timm:resnet18.a1_in1k"
    how = [own_preprocess(n, build(n)) for n in names]
    assert [h and (h.mean[0], h.resize, h.interpolation) for h in how] == [
        (0.5, 248, "bicubic"),
        (0.485, 256, "bilinear"),
        (0.485, 235, "bicubic"),
    ]


def test_no_description_in_timm_fails_and_few_cannot_be_held() -> None:
    timm = pytest.importorskip("timm")
    names = timm.list_pretrained()
    none = [n for n in names if own_preprocess(f"timm:{n}", Described(n)) is None]  # type: ignore[arg-type]
    assert len(none) < 0.05 * len(names), none


def test_where_nothing_is_said() -> None:
    assert own_preprocess(RESNET, build(RESNET)) is None
    assert own_preprocess("torchvision:nosuchnet", nn.Identity()) is None
    for name in ("raft_small", "r3d_18", "fcn_resnet50", "ssd300_vgg16"):
        assert own_preprocess(f"torchvision:{name}", nn.Identity()) is None
