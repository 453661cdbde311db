"""Budgets that quantization alone misses: the walk narrows and trains, keeps to its time, and goes on where it was cut."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lighten
from lighten import bundle, devices, scout, trials, walk, workshop
from lighten.bench import Timing
from lighten.data.preprocess import normalize
from lighten.data.splits import Split
from lighten.plugins import get
from lighten.search import reach
from lighten.types import Budget, Data, Result, Trial, from_json

QUICK = Timing(warmup=1, runs=5, least=2, seconds=0.1)
HOW = lighten.Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SMALL = Budget(max_drop=20, min_shrink=90)
"""INT8 saves some 74 %."""


class Net(nn.Module):
    """Three convolutions with batch norms and a linear layer, 224 thousand weights: (3, 16, 16) to 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = unit(3, 64, 2), unit(64, 128, 2), unit(128, 128, 1)
        self.fc = nn.Linear(128, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            die_if_told()
        return self.fc(self.two(self.one(self.stem(x))).mean((2, 3)))


DEATH = "LIGHTEN_TEST_DEATH"
"""Names a file: while it is there, the next training in another process than the one it names kills that process."""


def die_if_told() -> None:
    file = Path(os.environ.get(DEATH, os.devnull))
    if file.is_file() and file.read_text() != str(os.getpid()):
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Untraceable(Net):
    """Can be exported; but without gradients there is no graph to find the dependencies of channels in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().forward(x)


class OneLayer(nn.Module):
    """Its only layer gives the answer: there are no channels to take away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )  # fmt: skip


def pictures(n: int = 360, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    """Noise in one of three colours."""
    rng, rows = np.random.default_rng(seed), []
    for k in range(n):
        image = rng.integers(0, 150, (16, 16, 3)).astype(np.uint8)
        image[..., k % 3] += 40
        rows.append((image, k % 3))
    return rows


def trained(net: nn.Module, steps: int = 15) -> nn.Module:
    rows = pictures(240, seed=1)
    x = torch.from_numpy(normalize(np.stack([r[0] for r in rows]), HOW))
    y = torch.tensor([r[1] for r in rows])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module", autouse=True)
def eight_bits() -> Iterator[None]:
    """4-bit weights are rounded for seconds in each trial; here channels are to be the way out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scout, "bit_costs", lambda *a, **k: ())
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


def settings(out: Path, **changes: Any) -> lighten.Settings:
    given = {"formats": ("onnx",), "precisions": ("int8",), "isolate": False, "timing": QUICK, **changes}
    return lighten.Settings(name="run", out=out, **given)


class Heard:
    """Lines of one walk."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def kinds(folder: Path, *kinds_: str) -> list[Any]:
    """Values of the ledger's lines of these kinds, in order."""
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["kind"] in kinds_]


# --- a budget that needs it ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, Heard]:
    out, heard = tmp_path_factory.mktemp("runs"), Heard()
    result = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(out), log=heard)
    return result, out / "run", heard


Finished = tuple[Result, Path, Heard]


def test_the_winner_is_narrower_and_its_file_is_that_small(finished: Finished) -> None:
    result, folder, heard = finished
    assert result.verdict == "PASS", heard.text
    won = result.winning
    assert won.recipe.steps[0].method == "channel_prune"
    assert won.artifact is not None
    bytes_ = (folder / won.artifact.path).stat().st_size
    assert result.baseline.artifact is not None
    assert bytes_ <= 0.1 * (folder / result.baseline.artifact.path).stat().st_size
    assert bundle.verify(bundle.load(folder / "bundle"))[0]
    weights = (folder / "bundle" / "model.onnx").stat().st_size
    assert weights == bytes_


def test_channels_are_gone_from_the_network_beside_the_file(finished: Finished, model: nn.Module) -> None:
    result, folder, _ = finished
    won = result.winning
    assert won.artifact is not None
    saved = (folder / won.artifact.path).parent / "network.safetensors"
    again = lighten.load(saved, model=Net())
    kept = dict(reach.widths_of(won.recipe))
    assert kept
    for group, width in kept.items():
        assert again.get_submodule(group).out_channels == width
    assert {s.name: s.outputs for s in won.network if s.name in kept} == kept
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    rows = pictures(60, seed=5)
    x = normalize(np.stack([r[0] for r in rows]), HOW)
    with torch.no_grad():
        ours = again(torch.from_numpy(x)).numpy()
    file = get("formats", "onnx").load(folder / won.artifact.path, 1)(x)
    assert (ours.argmax(1) == file.argmax(1)).mean() >= 0.9
    assert np.corrcoef(ours.ravel(), file.ravel())[0, 1] > 0.9


def test_probes_come_before_the_long_training_of_the_best(finished: Finished) -> None:
    result, folder, _ = finished
    planned = [t for t in result.trials if reach.training_of(t.recipe)]
    assert [reach.is_probe(t.recipe) for t in planned] == [True] * (len(planned) - 1) + [False]
    assert len(planned) in (2, 3)
    assert reach.widths_of(planned[-1].recipe) in {reach.widths_of(t.recipe) for t in planned[:-1]}
    assert len(kinds(folder, "planned")) == len(planned)
    assert any("trained 10.0 epochs" in note for note in planned[-1].notes)


def test_each_was_predicted_and_the_prediction_of_its_bytes_is_near(finished: Finished) -> None:
    result, _, _ = finished
    for t in result.trials:
        assert t.failure is None
        assert (t.predicted is None) == (not reach.training_of(t.recipe))
        if t.predicted is not None:
            assert t.evidence is not None
            assert t.predicted.bytes == pytest.approx(t.evidence.size.bytes, rel=0.1)
            assert t.predicted.latency_ms is not None


def test_the_ledger_and_the_result_hold_what_was_measured_of_groups(finished: Finished) -> None:
    result, folder, _ = finished
    rows = kinds(folder, "width")
    assert len(rows) == len(result.widths) == 2 * len(result.groups) == 6
    assert {row["group"] for row in rows} == {"stem.0", "one.0", "two.0"}
    assert {g.name: g.channels for g in result.groups} == {"stem.0": 64, "one.0": 128, "two.0": 128}
    assert {name for name, _ in result.spent} >= {"weigh-in", "trials", "sensitivity", "probes", "training"}
    assert result.baseline.network == () or {s.name for s in result.baseline.network} == {
        "stem.0",
        "one.0",
        "two.0",
        "fc",
    }


def test_seconds_of_training_are_told_apart_from_the_rest(finished: Finished) -> None:
    long = next(t for t in finished[0].trials if reach.training_of(t.recipe) and not reach.is_probe(t.recipe))
    assert any(trials.TRAINED.match(note) for note in long.notes)
    told = dataclasses.replace(
        long, build_s=100.0, measure_s=3.0, notes=("trained 0.8 epochs in 72 s", "something else")
    )
    assert trials.untrained_s(told) == 31.0


def test_the_same_call_repeats_nothing(finished: Finished, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder, _ = finished
    before = (folder / "ledger.jsonl").read_bytes()
    for name in ("lighten.workshop.build", "lighten.bench.measure", "lighten.kit.channels.prune"):
        monkeypatch.setattr(name, lambda *a, name=name, **k: pytest.fail(f"{name} again"))
    again = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(folder.parent))
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert (again.winner, again.final, again.verdict) == (result.winner, result.final, result.verdict)


# --- more than one format -------------------------------------------------------------------------------


def test_before_the_long_training_a_probes_network_is_written_in_the_other_format_without_training_again(
    model: nn.Module, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first probe is taken for the best, so that another one was built since."""
    from lighten.kit import fit

    heard, real, trained = Heard(), fit._epoch, list[str]()

    def epoch(run: Any, *given: Any) -> Any:
        trained.append(heard.lines[-1])
        return real(run, *given)

    monkeypatch.setattr(fit, "_epoch", epoch)
    monkeypatch.setattr(reach, "_best", lambda trials: trials[0])
    monkeypatch.setattr(reach, "EPOCHS", 0.5)
    # Formats that are named have to keep the limits each, and OpenVINO's files are larger.
    device = dataclasses.replace(devices.load("this-machine"), formats=("onnx", "openvino"))
    result = lighten.compress(
        model, pictures(), SMALL, device, preprocess=HOW, settings=settings(tmp_path, formats=()), log=heard
    )
    assert all(t.failure is None for t in result.trials)
    *probes, extra, one, other = [t.recipe for t in narrowed(result)]
    assert len({r.format for r in probes}) == 1
    assert extra == dataclasses.replace(probes[0], format=extra.format)
    assert extra.format != probes[0].format
    assert {one.format, other.format} == {"onnx", "openvino"}
    assert {reach.plan_of(one), reach.plan_of(other)} == {reach.plan_of(extra)}
    assert len(set(trained)) == len(probes) + 1  # of the long ones the first alone
    (line,) = (ln for ln in heard.lines if ln.startswith(f"{extra.title}: ") and "training 1 epochs" in ln)
    assert line not in trained


# --- interrupted --------------------------------------------------------------------------------------


def cut(finished: Finished, out: Path, keep: Callable[[dict[str, Any], int], bool]) -> Path:
    """A copy of the finished run as it was before the first line of its ledger that is not to keep."""
    folder = out / "run"
    shutil.copytree(finished[1], folder)
    rows, planned = [], 0
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        planned += row["kind"] == "trial" and any(s["method"] == "distill" for s in row["value"]["recipe"]["steps"])
        if not keep(row, planned):
            break
        rows.append(line)
    (folder / "ledger.jsonl").write_text("".join(f"{r}\n" for r in rows))
    for name in ("bundle", "result.json", "report.html"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def narrowed(result: Result) -> list[Trial]:
    return [t for t in result.trials if reach.training_of(t.recipe)]


def test_after_an_interrupted_probe_the_same_recipes_are_tried(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None
) -> None:
    folder = cut(finished, tmp_path, lambda row, n: n == 0)
    planned = kinds(folder, "planned")
    assert planned

    def stop(line: str) -> None:
        if line.startswith("channel prune") and "top-1" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path), log=stop)
    assert kinds(folder, "planned") == planned
    (probe,) = [t for t in kinds(folder, "trial") if t["recipe"] in planned]
    assert probe["recipe"] == planned[0]
    heard = Heard()
    result = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path), log=heard)
    assert kinds(folder, "planned")[: len(planned)] == planned
    assert result.verdict == "PASS", heard.text
    ids = [json.dumps(t["recipe"], sort_keys=True) for t in kinds(folder, "trial")]
    assert len(ids) == len(set(ids))
    assert [t.recipe for t in narrowed(result)] == [t.recipe for t in narrowed(finished[0])]


def test_a_training_that_was_cut_goes_on_and_ends_in_the_same_network(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None
) -> None:
    count = len(narrowed(finished[0]))
    folder = cut(finished, tmp_path, lambda row, n: n < count)
    heard = Heard()

    def stop(what: str, done: int, total: int) -> None:
        if heard.lines and "training 10 epochs" in heard.lines[-1] and what.startswith("epoch 4"):
            raise KeyboardInterrupt

    def again(**given: Any) -> Result:
        return lighten.compress(
            model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path), log=heard, **given
        )

    with pytest.raises(KeyboardInterrupt):
        again(progress=stop)
    assert list((folder / "scratch").rglob("*.pt"))
    assert all(workshop.is_whole(from_json(Trial, t), folder) for t in kinds(folder, "trial"))
    seen: list[str] = []
    result = again(progress=lambda what, done, total: seen.append(what))
    epochs = [what for what in dict.fromkeys(seen) if what.startswith("epoch")]
    assert epochs[0].startswith("epoch 4"), epochs
    first, second = narrowed(finished[0])[-1], narrowed(result)[-1]
    assert first.recipe == second.recipe
    a, b = (
        lighten.load(f / "artifacts" / t.id / "network.safetensors", model=Net()).state_dict()
        for f, t in ((finished[1], first), (folder, second))
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (folder / "scratch").exists()


def test_a_damaged_file_of_a_narrowed_trial_is_made_again(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None
) -> None:
    folder = cut(finished, tmp_path, lambda row, n: True)
    probe = narrowed(finished[0])[0]
    assert probe.artifact is not None
    file = folder / probe.artifact.path
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    result = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path))
    assert len(file.read_bytes()) == pytest.approx(len(whole), rel=0.01)
    assert [t.recipe for t in narrowed(result)] == [t.recipe for t in narrowed(finished[0])]


def test_a_killed_worker_is_a_failed_trial_the_run_goes_on_and_the_best_so_far_ships(
    finished: Finished, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the first probe's training, and again in the long one."""
    cut(finished, tmp_path, lambda row, n: n == 0)
    death, heard = tmp_path / "death", Heard()
    monkeypatch.setenv(DEATH, str(death))
    death.write_text(str(os.getpid()))

    def log(line: str) -> None:
        heard(line)
        if "training 10 epochs" in line:
            death.write_text(str(os.getpid()))

    result = lighten.compress(
        model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path, isolate=True), log=log
    )
    assert not death.exists()
    first, second, long = narrowed(result)
    for trial in (first, long):
        assert trial.failure is not None, heard.text
        assert "killed" in trial.failure.reason
    assert result.winner == second.id
    assert any("trained" in note for note in second.notes)
    assert bundle.verify(bundle.load(tmp_path / "run" / "bundle"))[0]
    assert any("killed" in a.en for a in result.advice)


# --- a loss that is not finite ---------------------------------------------------------------------------


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Makes the loss NaN in those steps, of all that are trained from now on."""
    from lighten.kit import recover

    def spoil(at: Callable[[int], bool]) -> None:
        real, steps = recover._loss, itertools.count()

        def make(*given: Any) -> Any:
            loss = real(*given)
            return lambda *batch: loss(*batch) * (float("nan") if at(next(steps)) else 1.0)

        monkeypatch.setattr(recover, "_loss", make)

    return spoil


def test_a_loss_that_turns_nan_is_rolled_back_and_said(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None, spoiled: Callable[..., None]
) -> None:
    count = len(narrowed(finished[0]))
    cut(finished, tmp_path, lambda row, n: n < count)
    spoiled(lambda step: step == 7)
    heard = Heard()
    result = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path), log=heard)
    says = "The loss was NaN in epoch"
    assert heard.text.count(says) == 1
    assert "rolled back to step" in heard.text
    long = narrowed(result)[-1]
    assert [says in note for note in long.notes].count(True) == 1
    assert long.evidence is not None
    assert long.evidence.metric.value > 60  # of three classes
    assert says in (tmp_path / "run" / "report.md").read_text()


def test_a_loss_that_stays_nan_is_a_failed_trial_and_the_best_so_far_ships(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None, spoiled: Callable[..., None]
) -> None:
    count = len(narrowed(finished[0]))
    cut(finished, tmp_path, lambda row, n: n < count)
    spoiled(lambda step: step >= 7)
    result = lighten.compress(model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path))
    long = narrowed(result)[-1]
    assert long.failure is not None
    assert "NaN" in long.failure.reason
    assert reach.is_probe(result.winning.recipe)
    assert bundle.verify(bundle.load(tmp_path / "run" / "bundle"))[0]


# --- what cannot be -----------------------------------------------------------------------------------


def test_a_budget_that_no_width_can_meet_is_a_fail_with_advice(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None
) -> None:
    heard = Heard()
    result = lighten.compress(
        model, pictures(), Budget(min_shrink=99.9), preprocess=HOW, settings=settings(tmp_path), log=heard
    )
    assert result.verdict == "FAIL"
    assert "no channel widths are expected to meet the budget" in heard.text
    assert any("min_shrink is missed by" in a.en for a in result.advice)
    assert kinds(tmp_path / "run", "planned") == []
    assert (tmp_path / "run" / "report.html").exists()


def test_without_training_images_nothing_is_narrowed_and_that_is_said(
    model: nn.Module, tmp_path: Path, in_process: None
) -> None:
    data: Data = lighten.load_data(pictures())
    none = Split(data.train.images, np.zeros(0, np.int64))
    heard = Heard()
    result = lighten.compress(
        model, dataclasses.replace(data, train=none), SMALL, preprocess=HOW, settings=settings(tmp_path), log=heard
    )
    assert result.verdict == "FAIL"
    assert "there are no training images" in heard.text
    assert kinds(tmp_path / "run", "width", "planned") == []


def test_who_asks_for_no_narrowing_gets_none(model: nn.Module, tmp_path: Path, in_process: None) -> None:
    result = lighten.compress(
        model, pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path, narrow=False)
    )  # fmt: skip
    assert result.verdict == "FAIL"
    assert kinds(tmp_path / "run", "width", "planned") == []
    assert len(result.trials) == 1


@pytest.mark.parametrize(
    ("net", "says"),
    [(Untraceable, "the network is not narrowed"), (OneLayer, "no channel widths are expected to meet the budget")],
)
def test_a_network_that_cannot_be_narrowed_ends_with_its_quantized_file(
    net: type[nn.Module], says: str, tmp_path: Path, in_process: None
) -> None:
    heard = Heard()
    result = lighten.compress(
        net().eval(), pictures(), SMALL, preprocess=HOW, settings=settings(tmp_path), log=heard
    )  # fmt: skip
    assert says in heard.text
    assert result.verdict == "FAIL"
    assert result.winning.recipe.precision.weights == "int8"
    assert bundle.verify(bundle.load(tmp_path / "run" / "bundle"))[0]


# --- time ---------------------------------------------------------------------------------------------


def test_a_run_from_the_beginning_ends_within_its_time(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as much time again as all but training took in the run before, and some seconds to train in."""
    monkeypatch.setattr(reach, "LEAST_TRAINING_S", 1.0)
    monkeypatch.setattr(reach, "MOST_EPOCHS", 1e5)
    spent = dict(finished[0].spent)
    limit = 12.0 + 1.5 * sum(s for part, s in spent.items() if part not in ("probes", "training"))
    heard, began = Heard(), time.monotonic()
    budget = dataclasses.replace(SMALL, time_s=limit)
    result = lighten.compress(model, pictures(), budget, preprocess=HOW, settings=settings(tmp_path), log=heard)
    took = time.monotonic() - began
    assert took <= 1.1 * limit, heard.text
    assert any(not reach.is_probe(t.recipe) for t in narrowed(result)), heard.text
    assert took >= 0.5 * limit, heard.text  # what there was is trained in
    assert all(workshop.is_whole(t, tmp_path / "run") for t in (result.baseline, *result.trials))
    assert bundle.verify(bundle.load(tmp_path / "run" / "bundle"))[0]


def test_no_time_at_all_ends_with_what_was_weighed_in(model: nn.Module, tmp_path: Path, in_process: None) -> None:
    heard = Heard()
    budget = dataclasses.replace(SMALL, time_s=0.01)
    result = lighten.compress(model, pictures(), budget, preprocess=HOW, settings=settings(tmp_path), log=heard)
    assert "time is up after 1 trials" in heard.text
    assert (result.verdict, result.winner, result.trials) == ("FAIL", result.baseline.id, ())
    assert bundle.verify(bundle.load(tmp_path / "run" / "bundle"))[0]
    assert kinds(tmp_path / "run", "width", "planned") == []


def test_the_time_is_kept_and_trained_in(
    finished: Finished, model: nn.Module, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where everything is measured that planning needs; the answers of the finished run to the same question.

    The time is what the trials took there beside their training, twice, and some seconds to train in.
    """
    folder = cut(finished, tmp_path, lambda row, n: row["kind"] != "planned")
    fingerprint = kinds(folder, "run")[0]["fingerprint"]
    monkeypatch.setattr(walk, "question", lambda *_: fingerprint)
    monkeypatch.setattr(reach, "LEAST_TRAINING_S", 2.0)
    monkeypatch.setattr(reach, "MOST_EPOCHS", 1e5)  # so that time alone ends the training
    limit = 10.0 + 2 * sum(map(trials.untrained_s, narrowed(finished[0])))
    heard, began = Heard(), time.monotonic()
    result = lighten.compress(
        model,
        pictures(),
        dataclasses.replace(SMALL, time_s=limit),
        preprocess=HOW,
        settings=settings(tmp_path),
        log=heard,
    )
    took = time.monotonic() - began
    assert took <= 1.1 * limit, heard.text
    assert narrowed(result), heard.text
    for t in narrowed(result):
        seconds = reach.training_of(t.recipe)["seconds"]
        assert 0 < seconds < limit
        if not reach.is_probe(t.recipe):
            assert seconds >= 2.0
            assert t.build_s - trials.untrained_s(t) + t.measure_s == pytest.approx(seconds, abs=1.5)
    assert bundle.verify(bundle.load(folder / "bundle"))[0]
