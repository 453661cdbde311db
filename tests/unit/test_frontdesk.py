"""What a person typed: sizes, times, numbers, YAML under the command line, a machine without torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lighten import frontdesk
from lighten.errors import BadConfig, MissingBackend
from lighten.frontdesk import ModelIn, Options, compress_options, preprocess_of, seconds
from lighten.types import Preprocess

KNOWN = Preprocess(224, 224, "crop", 256, source="timm")


@pytest.mark.parametrize(("text", "want"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), (30, 30), (None, None)])
def test_times_are_read(text: Any, want: float | None) -> None:
    assert seconds(text) == want


@pytest.mark.parametrize("text", ["soon", "-5m", "5d", "", "1e3s"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="time is"):
        seconds(text)


def test_without_options_the_weights_own_description_is_taken_whole() -> None:
    assert preprocess_of({"input_size": None, "mean": None}, KNOWN) is KNOWN
    assert preprocess_of({}, None) is None


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"input_size": "64"}, (64, 64, "stretch", None)),
        ({"input_size": 64}, (64, 64, "stretch", None)),
        ({"input_size": "96x128"}, (96, 128, "stretch", None)),
        ({"input_size": [96, 128]}, (96, 128, "stretch", None)),
        ({"input_size": "64", "resize": 72}, (64, 64, "crop", 72)),
        ({"resize": 300}, (224, 224, "crop", 300)),
    ],
)
def test_sizes_are_height_by_width_and_stretch_unless_resize_is_given(
    given: dict[str, Any], want: tuple[Any, ...]
) -> None:
    how = preprocess_of(given, KNOWN)
    assert how is not None
    assert (how.height, how.width, how.mode, how.resize) == want
    assert how.mean == KNOWN.mean
    assert "command line" in how.source


def test_grey_without_mean_gets_one_channel() -> None:
    how = preprocess_of({"input_size": "28", "channel_order": "GRAY"}, None)
    assert how is not None
    assert (how.channels, how.mean, how.std) == (1, (0.5,), (0.5,))


@pytest.mark.parametrize(
    "given",
    [
        {"input_size": "0"},
        {"input_size": "big"},
        {"input_size": "64", "mean": "0.5,0.5"},
        {"input_size": "64", "mean": "a,b,c"},
        {"input_size": "64", "std": "0,1,1"},
        {"input_size": "64", "channel_order": "RBG"},
        {"input_size": "64", "interpolation": "cubic"},
        {"input_size": "64", "resize": 32},
    ],
)
def test_nonsense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        preprocess_of(given, None)


def test_without_a_size_and_a_description_the_size_is_asked_for() -> None:
    with pytest.raises(BadConfig, match="--input-size"):
        preprocess_of({"mean": "0.5,0.5,0.5"}, None)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "l.yaml"
    file.write_text("model: a.pth\narch: timm:x\ndata: photos\nmax_drop: 1\nmin_shrink: 60\nmean: [0.5, 0.5, 0.5]\n")
    got = compress_options({"min_shrink": 75.0}, file, "")
    assert got == Options(
        model="a.pth", arch="timm:x", data="photos", max_drop=1, min_shrink=75.0, mean=[0.5, 0.5, 0.5], command=""
    )


@pytest.mark.parametrize("line", ["max_drop: yes", "max_drop: one", "min_shrink: [70]"])
def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "l.yaml"
    file.write_text(f"model: demo\n{line}\n")
    with pytest.raises(BadConfig, match="not a number"):
        compress_options({}, file, "")


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    for ask in (
        lambda: frontdesk.inspect_model(ModelIn("demo"), None, "this-machine"),
        lambda: frontdesk.run_compress(Options(model="demo"), lambda *_: None, print),
    ):
        with pytest.raises(MissingBackend, match="torch") as told:
            ask()
        assert "lighten[compress]" in told.value.to_do
