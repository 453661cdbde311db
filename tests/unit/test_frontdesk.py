"""What a person typed: sizes, times, numbers, methods, YAML under the command line, a machine without torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten import frontdesk
from lighten.errors import EXIT_INPUT, BadConfig, LightenError, MissingBackend
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


@pytest.mark.parametrize(
    ("given", "known", "want"),
    [
        ({"input_size": "64", "letterbox": True}, None, "letterbox"),
        ({"input_size": "64"}, "letterbox", "letterbox"),
        ({"letterbox": True}, "crop", "letterbox"),
        ({"letterbox": False}, "letterbox", "stretch"),
        ({"resize": 80, "input_size": "64"}, "letterbox", "crop"),
        ({"mean": "0,0,0"}, "letterbox", "letterbox"),
    ],
)
def test_who_letterboxed_keeps_to_it_until_told_otherwise(given: dict[str, Any], known: str | None, want: str) -> None:
    own = {"letterbox": Preprocess(96, 96, "letterbox"), "crop": KNOWN}
    how = preprocess_of(given, own[known] if known else None)
    assert how is not None
    assert (how.mode, how.resize) == (want, 80 if want == "crop" else None)


def test_cropping_and_letterboxing_at_once_is_refused() -> None:
    with pytest.raises(BadConfig, match="--resize and --letterbox"):
        preprocess_of({"input_size": "64", "resize": 80, "letterbox": True}, None)


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


# --- methods ----------------------------------------------------------------------------------------


def taken(options: Options) -> list[tuple[str, dict[str, Any]]]:
    """The steps of what was typed, with their settings."""
    return [(step.method, dict(step.settings)) for step in frontdesk.steps(options)]


def test_pruning_is_followed_by_training_which_gets_epochs_and_rate() -> None:
    got = taken(Options(method="prune", ratio=0.3, scope="local", importance="taylor", epochs=2.0, lr=0.01))
    assert got == [
        ("channel_prune", {"ratio": 0.3, "scope": "local", "importance": "taylor"}),
        ("distill", {"epochs": 2.0, "lr": 0.01}),
    ]


def test_pruning_without_epochs_trains_nothing() -> None:
    assert taken(Options(method="prune", ratio=0.3, epochs=0, time="1h")) == [("channel_prune", {"ratio": 0.3})]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"method": "distill", "teacher_share": 1.0, "loss": "dkd"}, ("distill", {"distill": 1.0, "loss": "dkd"})),
        ({"method": "distill", "student": "timm:resnet18"}, ("distill", {"student": "timm:resnet18"})),
        ({"method": "finetune", "epochs": 0.5, "time": "100s"}, ("finetune", {"epochs": 0.5, "seconds": 70.0})),
        ({"method": "sparsify", "pattern": "2:4", "time": "100s"}, ("sparsify", {"pattern": "2:4"})),
        ({"method": "factorize", "energy": 0.9, "keep": "fc, stem"}, ("low_rank", {"energy": 0.9, "keep": ("fc", "stem")})),
        ({"method": "sparsify", "ratio": 0.8, "keep": ["fc"]}, ("sparsify", {"ratio": 0.8, "keep": ("fc",)})),
    ],
)  # fmt: skip
def test_each_method_becomes_its_own_step(given: dict[str, Any], want: tuple[str, dict[str, Any]]) -> None:
    assert taken(Options(**given)) == [want]


def test_settings_reach_the_steps_in_an_order_of_their_own() -> None:
    a = frontdesk.steps(Options(method="sparsify", scope="local", ratio=0.5))
    b = frontdesk.steps(Options(method="sparsify", ratio=0.5, scope="local"))
    assert a == b
    assert list(a[0].settings) == sorted(a[0].settings)


def test_every_setting_of_a_method_is_one_of_its_step() -> None:
    from lighten.plugins import get

    trained = {"prune": {"epochs", "lr"}}
    for method in ("prune", "distill", "finetune", "sparsify", "factorize"):
        known = {f.name for f in dataclasses.fields(get("methods", frontdesk.PLUGINS.get(method, method)).Step)}
        given = set(frontdesk.STEPS[method]) - trained.get(method, set())
        assert {"distill" if s == "teacher_share" else s for s in given} <= known


@pytest.mark.parametrize("method", [None, "ptq", "qat", "dynamic", "weight-only"])
def test_ways_to_quantize_are_no_steps(method: str | None) -> None:
    assert frontdesk.steps(Options(method=method)) == ()


@pytest.mark.parametrize("method", ["prune", "distill", "finetune", "sparsify", "factorize"])
def test_methods_that_change_the_network_ask_for_no_bits(method: str) -> None:
    assert frontdesk.asked(Options(method=method)) is None
    with pytest.raises(BadConfig, match="bits are given with method"):
        frontdesk.steps(Options(method=method, bits="w8a8"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "prune", "energy": 0.9}, "method prune has no setting energy"),
        ({"method": "distill", "ratio": 0.5}, "method distill has no setting ratio"),
        ({"method": "finetune", "temperature": 2.0}, "method finetune has no setting temperature"),
        ({"method": "sparsify", "recover": 5}, "method sparsify has no setting recover"),
        ({"method": "factorize", "student": "timm:x"}, "method factorize has no setting student"),
        ({"method": "ptq", "ratio": 0.5}, "method ptq has no setting ratio"),
        ({"ratio": 0.5}, "ratio is given without a method"),
        ({"bits": "w8a8"}, "bits is given without a method"),
        ({"method": "shrink"}, "There is no method 'shrink'"),
    ],
)
def test_a_setting_that_the_method_does_not_have_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        frontdesk.steps(Options(**given))


# --- what the walk is given -------------------------------------------------------------------------


class Walked(Exception):
    """Raised in place of a walk, with what it was given."""


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the front desk of `lighten compress` up to the walk, and say what the walk would be given."""

    def caught(model: Any, data: Any, budget: Any, device: Any, **rest: Any) -> None:
        raise Walked({"data": data, "budget": budget, **rest})

    monkeypatch.setattr("lighten.walk.compress", caught)

    def run(**given: Any) -> dict[str, Any]:
        with pytest.raises(Walked) as found:
            frontdesk.run_compress(Options(**{"model": "demo", **given}), lambda *_: None, lambda line: None)
        return dict(found.value.args[0])

    return run


def test_the_walk_hears_of_steps_budget_and_architecture(walked: Callable[..., dict[str, Any]]) -> None:
    got = walked(method="prune", ratio=0.3, min_shrink=50.0, time="2m", narrow=False)
    assert [s.method for s in got["settings"].steps] == ["channel_prune", "distill"]
    assert dict(got["settings"].steps[1].settings) == {"seconds": 84.0}
    assert (got["settings"].arch, got["settings"].narrow) == ("lighten:resnet20", False)
    assert (got["budget"].min_shrink, got["budget"].time_s) == (50.0, 120.0)
    assert got["settings"].asked is None


def test_held_out_images_are_read_and_the_data_holds_them_out(
    walked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from lighten.data import demo

    known = demo.data()
    rows = known.train.rows.tolist()[:100]
    (tmp_path / "held.txt").write_text("\n".join(map(str, rows)))
    data = walked(held_out=str(tmp_path / "held.txt"))["data"]
    assert {*data.calibrate.rows.tolist(), *data.select.rows.tolist()} == set(rows)
    assert not set(data.train.rows.tolist()) & {*rows, *known.report.rows.tolist()}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "prune", "ratio": 0.0}, "ratio of 0 removes nothing"),
        ({"method": "prune", "ratio": 1.0}, "ratio of 1 removes everything"),
        ({"method": "sparsify", "ratio": 1.0}, "above 0 and under 1"),
        ({"method": "factorize", "energy": 1.5}, "energy is 1.5"),
        ({"method": "distill", "teacher_share": 2.0}, "between 0 and 1"),
        ({"method": "distill", "student": "resnet18"}, "does not say where the architecture comes from"),
        ({"method": "distill", "student": "lighten:resnet21"}, "resnet21"),
        ({"method": "prune", "keep": "layer9"}, "layer9"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"min_shrink": 100.0}, "min_shrink"),
        ({"method": "finetune", "epochs": -1.0}, "epochs"),
    ],
)
def test_what_cannot_work_is_refused_before_the_walk(given: dict[str, Any], says: str) -> None:
    with pytest.raises(LightenError) as told:
        frontdesk.run_compress(Options(model="demo", **given), lambda *_: None, lambda line: None)
    assert told.value.exit_code == EXIT_INPUT
    assert says in told.value.what


def test_mistakes_of_method_budget_and_names_are_told_together() -> None:
    options = Options(model="demo", method="distill", student="lighten:resnet21", max_drop=-1.0, device="toaster")
    with pytest.raises(BadConfig, match="3 problems") as told:
        frontdesk.run_compress(options, lambda *_: None, lambda line: None)
    assert all(part in told.value.what for part in ("resnet21", "max_drop", "toaster"))
