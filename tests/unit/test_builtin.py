"""Built-in data sets: only the published bytes are kept, a half fetch is never taken for a whole one."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data import builtin, load
from lighten.data.builtin import Builtin, Parts, cifar_from_sheets, fetch, read
from lighten.errors import BadData, MissingBackend, UnknownName
from lighten.types import Progress, silent

GOOD = bytes(range(200))


def decode(parts: Parts) -> dict[str, np.ndarray]:
    x = np.random.default_rng(parts["a.bin"][0]).integers(0, 256, (40, 8, 8, 3), np.uint8)
    y = np.arange(40) % 4
    return {"train": x, "train_labels": y, "test": x[:20], "test_labels": y[:20]}


def source(result: bytes | Exception, calls: list[int] | None = None) -> Callable[[Progress], Parts]:
    def get(_: Progress) -> Parts:
        if calls is not None:
            calls.append(1)
        if isinstance(result, Exception):
            raise result
        return {"a.bin": result}

    return get


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes "toy" the only built-in set, with these sources, in an empty cache."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))

    def put(*sources: Callable[[Progress], Parts], how: Callable[[Parts], dict[str, np.ndarray]] = decode) -> None:
        named = tuple((f"source {k}", s) for k, s in enumerate(sources, 1))
        sums = {"a.bin": hashlib.sha256(GOOD).hexdigest()}
        classes = ("a", "b", "c", "d")
        toy = Builtin("toy", classes, ("甲", "乙", "丙", "丁"), sums, named, how)
        monkeypatch.setattr(builtin, "known", lambda: {"toy": toy})

    return put


def test_the_second_call_reads_the_cache(offer: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    offer(source(GOOD, calls))
    spec, arrays = read("toy")
    again = read("toy")[1]
    assert calls == [1]
    assert fetch("toy") == tmp_path / "cache" / "toy"
    assert json.loads((fetch("toy") / "complete.json").read_text())["sha256"] == spec.sha256
    for key, want in decode({"a.bin": GOOD}).items():
        np.testing.assert_array_equal(arrays[key], want)
        np.testing.assert_array_equal(again[key], want)


def test_wrong_bytes_are_refused_and_the_next_source_tried(offer: Any) -> None:
    first: list[int] = []
    second: list[int] = []
    offer(source(GOOD[:-1], first), source(GOOD, second))
    np.testing.assert_array_equal(read("toy")[1]["train"], decode({"a.bin": GOOD})["train"])
    assert (first, second) == ([1], [1])


FAILURES = [
    OSError("no route"),
    TimeoutError("timed out"),
    EOFError("ended early"),
    zlib.error("bad block"),
    KeyError("a.bin"),
    ValueError("no JSON"),
    subprocess.TimeoutExpired("npm", 9),
    MissingBackend("torchvision", "compress"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda e: type(e).__name__)
def test_any_failure_of_a_source_leads_to_the_next(failure: Exception, offer: Any) -> None:
    offer(source(failure), source(GOOD))
    assert len(read("toy")[1]["train"]) == 40


def test_all_sources_fail_and_each_reason_is_named(offer: Any, tmp_path: Path) -> None:
    offer(source(OSError("no route to host")), source(b"error page"), source(TimeoutError()))
    with pytest.raises(BadData, match="toy could not be fetched") as caught:
        fetch("toy")
    for reason in ("source 1: no route", "source 2: wrong sha256 of a.bin", "source 3: TimeoutError"):
        assert reason in caught.value.what
    assert not (tmp_path / "cache" / "toy").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_fetch_leaves_nothing(error: type[BaseException], offer: Any, tmp_path: Path) -> None:
    def breaks(parts: Parts) -> dict[str, Any]:
        whole = decode(parts)

        class Half(dict[str, Any]):
            def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
                yield "train", whole["train"]
                raise error

        return Half()

    offer(source(GOOD), how=breaks)
    with pytest.raises(error):
        fetch("toy")
    assert list((tmp_path / "cache").iterdir()) == []
    offer(source(GOOD))
    assert len(read("toy")[1]["train_labels"]) == 40


def test_a_folder_without_its_seal_is_fetched_anew(offer: Any, tmp_path: Path) -> None:
    offer(source(GOOD))
    folder = tmp_path / "cache" / "toy"
    folder.mkdir(parents=True)
    np.save(folder / "train.npy", np.zeros(3))
    assert read("toy")[1]["train"].shape == (40, 8, 8, 3)


def test_a_file_cut_short_in_the_cache_is_named(offer: Any) -> None:
    offer(source(GOOD))
    file = fetch("toy") / "train.npy"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BadData, match="is damaged") as caught:
        read("toy")
    assert "Delete that folder" in caught.value.to_do


def test_load_splits_train_and_keeps_test_for_the_report(offer: Any) -> None:
    offer(source(GOOD))
    data = load("toy")
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 28, "calibrate": 6, "select": 6, "report": 20}
    assert data.classes_zh[0] == "甲"
    x = decode({"a.bin": GOOD})
    np.testing.assert_array_equal(data.report.images.read(3), x["test"][3])
    np.testing.assert_array_equal(data.select.labels, x["train_labels"][data.select.rows])
    assert load("toy").fingerprint == data.fingerprint != load("toy", seed=1).fingerprint


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean cifar10"):
        fetch("cifar-10")


def test_the_real_sets_name_each_class_twice_and_each_part_once() -> None:
    for name, spec in builtin.known().items():
        assert spec.name == name
        assert len(set(spec.classes)) == len(set(spec.classes_zh)) == 10
        assert all(len(s) == 64 for s in spec.sha256.values())


# --- decoding ---------------------------------------------------------------------------------------


def sheet(marks: dict[tuple[int, int], tuple[int, int, int]]) -> bytes:
    """A sheet of 10,000 rows of 1,024 pixels, black but for `marks` at (row, pixel)."""
    x = np.zeros((10000, 1024, 3), np.uint8)
    for at, colour in marks.items():
        x[at] = colour
    out = io.BytesIO()
    Image.fromarray(x).save(out, "PNG", compress_level=1)
    return out.getvalue()


def test_cifar_sheets_become_the_original_batches_and_those_images() -> None:
    """Label, then the red, green and blue planes of 1,024 bytes: the layout of cs.toronto.edu/~kriz/cifar.html."""
    first, last = sheet({(7, 33): (1, 2, 3), (9999, 0): (4, 5, 6)}), sheet({(0, 1023): (7, 8, 9)})
    labels = np.arange(50000) % 10
    files = {f"data_batch_{k}.png": first for k in range(1, 6)} | {"test_batch.png": last}
    files["train_lables.json"] = json.dumps(labels.tolist()).encode()
    files["test_lables.json"] = json.dumps((labels[:10000][::-1]).tolist()).encode()
    parts = cifar_from_sheets(files.__getitem__)
    assert list(parts) == [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    assert {len(p) for p in parts.values()} == {10000 * 3073}
    row = parts["data_batch_1.bin"][7 * 3073 : 8 * 3073]
    assert row[0] == 7
    assert [row[1 + plane * 1024 + 33] for plane in range(3)] == [1, 2, 3]
    assert sum(row[1:]) == 6
    got = builtin._decode_cifar(parts)
    assert got["train"].shape == (50000, 32, 32, 3)
    assert got["train"][7, 1, 1].tolist() == [1, 2, 3]  # pixel 33 is row 1, column 1
    assert got["train"][49999, 0, 0].tolist() == [4, 5, 6]
    assert got["test"][0, 31, 31].tolist() == [7, 8, 9]
    np.testing.assert_array_equal(got["train_labels"], labels)
    np.testing.assert_array_equal(got["test_labels"], labels[:10000][::-1])


def test_fashion_idx_files_become_images() -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28))
    images, labels = head + x.tobytes(), b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([9, 0, 4])
    names = {"train": "train", "t10k": "test"}
    parts = {f"{n}-images-idx3-ubyte": images for n in names} | {f"{n}-labels-idx1-ubyte": labels for n in names}
    got = builtin._decode_fashion(parts)
    for ours in names.values():
        np.testing.assert_array_equal(got[ours][..., 0], x)
        assert got[f"{ours}_labels"].tolist() == [9, 0, 4]


# --- downloading ------------------------------------------------------------------------------------

BODY = bytes(1000)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/gone":
            self.send_error(404, "Not Found")
            return
        chunked = self.path == "/chunked-short"
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding" if chunked else "Content-Length", "chunked" if chunked else "1000")
        self.end_headers()
        sent = {"/whole": BODY, "/short": BODY[:600], "/none": b"", "/chunked-short": b"3e8\r\n" + BODY[:600]}
        self.wfile.write(sent[self.path])
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_whole_download(address: str) -> None:
    seen: list[tuple[int, int]] = []
    assert builtin._download(f"{address}/whole", lambda _, a, b: seen.append((a, b)), "x") == BODY
    assert seen[-1] == (1000, 1000)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/short", "ended after 600 of 1,000 bytes|broke off"),
        ("/none", "ended after 0 of 1,000 bytes|broke off"),
        ("/chunked-short", "broke off"),
        ("/gone", "Not Found"),
    ],
)
def test_a_download_that_fails_is_an_os_error(path: str, message: str, address: str) -> None:
    with pytest.raises(OSError, match=message):
        builtin._download(f"{address}{path}", silent, "x")


def test_a_download_over_the_limit_and_no_web_address(address: str) -> None:
    with pytest.raises(OSError, match="larger than any file"):
        builtin._download(f"{address}/whole", silent, "x", limit=999)
    with pytest.raises(OSError, match="not a web address"):
        builtin._download("file:///etc/passwd", silent, "x")
    with pytest.raises(OSError, match="cannot be reached"):
        builtin._download("http://127.0.0.1:9/x", silent, "x")
