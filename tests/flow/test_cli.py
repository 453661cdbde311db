"""The command line through its real entry point: what a person types, what comes back, with which exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten import cli
from lighten.bench import Timing
from lighten.errors import EXIT_BUDGET, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_PASS

LIGHTEN = [sys.executable, "-m", "lighten.cli"]
QUICK = ["--formats", "onnx", "--precisions", "int8"]


def lighten(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one command and return it, with stdout and stderr together."""
    return subprocess.run(
        [*LIGHTEN, *map(str, args)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        cwd=cwd,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the embedded demo."""
    out = tmp_path_factory.mktemp("runs")
    done = lighten("compress", "demo", *QUICK, "--max-drop", 2, "--min-shrink", 60, "--out", out, "--name", "demo")
    assert done.returncode == EXIT_PASS, done.stdout
    assert "PASS" in done.stdout
    return out / "demo"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders, 60 small images of three colours."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for k in range(60):
            array = rng.integers(0, 90, (40, 50, 3)).astype(np.uint8)
            array[..., c] += 120
            Image.fromarray(array).save(root / name / f"{k}.png")
    return root


def test_demo_leaves_a_complete_run_folder(demo: Path) -> None:
    for name in (
        "ledger.jsonl",
        "result.json",
        "report.html",
        "report.md",
        "bundle/manifest.json",
        "bundle/golden.npz",
        "bundle/run.py",
        "bundle/README.md",
        "bundle/labels.txt",
        "bundle/model.onnx",
    ):
        assert (demo / name).stat().st_size > 0, name
    result = json.loads((demo / "result.json").read_text())
    assert result["verdict"] == "PASS"
    assert result["final"]["baseline"]["value"] >= 90


def test_run_labels_images_in_english_and_chinese(demo: Path, tmp_path: Path) -> None:
    from lighten.data import demo as embedded

    report = embedded.data().report
    right = 0
    for k in range(12):
        Image.fromarray(report.images.read(int(report.rows[k]))).save(tmp_path / f"{k:02d}.png")
    english = lighten("run", demo / "bundle", tmp_path, "--top", 1)
    chinese = lighten("run", demo / "bundle", tmp_path, "--top", 1, "--lang", "zh")
    assert english.returncode == chinese.returncode == EXIT_PASS
    data = embedded.data()
    for k, (en, zh) in enumerate(zip(english.stdout.splitlines(), chinese.stdout.splitlines(), strict=True)):
        truth = int(report.labels[k])
        right += data.classes[truth] in en
        assert (data.classes[truth] in en) == (data.classes_zh[truth] in zh)
    assert right >= 9


def test_verify_passes_and_then_fails_on_a_changed_file(demo: Path, tmp_path: Path) -> None:
    assert lighten("verify", demo / "bundle").returncode == EXIT_PASS
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(demo / "bundle", copy)
    file = copy / "model.onnx"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    changed = lighten("verify", copy)
    assert changed.returncode == EXIT_INPUT
    assert "model.onnx" in changed.stdout
    assert "sha256" in changed.stdout


def test_bench_measures_and_writes_raw_samples(demo: Path, tmp_path: Path) -> None:
    done = lighten("bench", demo / "bundle", "--out", tmp_path / "bench.json")
    assert done.returncode == EXIT_PASS
    assert "p95" in done.stdout
    readings = json.loads((tmp_path / "bench.json").read_text())
    assert len(readings["latency"][0]["samples_ms"]) >= 10


def test_report_is_rebuilt_in_chinese_without_measuring(demo: Path) -> None:
    (demo / "report.html").unlink()
    assert lighten("report", demo, "--lang", "zh").returncode == EXIT_PASS
    assert "结论" in (demo / "report.html").read_text("utf-8")


def test_doctor_names_processor_and_backends() -> None:
    done = lighten("doctor")
    assert done.returncode == EXIT_PASS
    assert "onnxruntime" in done.stdout
    assert "integer kernels" in done.stdout


def test_inspect_shows_model_formats_and_what_is_wrong_with_data(photos: Path, tmp_path: Path) -> None:
    done = lighten("inspect", "demo", "--data", "demo")
    assert done.returncode == EXIT_PASS, done.stdout
    assert "0.27 million" in done.stdout
    assert "openvino" in done.stdout


def test_a_model_of_ones_own_ends_in_a_bundle_and_a_missed_budget_in_exit_3(photos: Path, tmp_path: Path) -> None:
    import torch

    from lighten.models.resnet import resnet20

    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in resnet20(3).state_dict().items()}}, tmp_path / "w.pth")
    done = lighten(
        "compress",
        tmp_path / "w.pth",
        "--arch",
        "lighten:resnet20",
        "--data",
        photos,
        "--input-size",
        32,
        *QUICK,
        "--min-shrink",
        99,
        "--no-narrow",
        "--out",
        tmp_path / "runs",
        "--name",
        "own",
    )
    assert done.returncode == EXIT_BUDGET, done.stdout
    assert "FAIL" in done.stdout
    assert "min_shrink: wanted 99 %" in done.stdout
    assert "prefix 'module.' was taken off" in done.stdout
    assert "state_dict" in done.stdout
    manifest = json.loads((tmp_path / "runs/own/bundle/manifest.json").read_text())
    assert [row["name"] for row in manifest["labels"]] == ["blue", "green", "red"]
    assert (manifest["preprocessing"]["height"], manifest["preprocessing"]["mode"]) == (32, "stretch")


def test_init_writes_a_file_that_compress_reads(tmp_path: Path) -> None:
    assert lighten("init", cwd=tmp_path).returncode == EXIT_PASS
    done = lighten("compress", "--config", "lighten.yaml", cwd=tmp_path)
    assert done.returncode == EXIT_INPUT
    assert "model.safetensors does not exist" in done.stdout
    assert lighten("init", cwd=tmp_path).returncode == EXIT_INPUT


def test_every_key_of_the_example_is_an_option() -> None:
    import re

    from lighten.frontdesk import EXAMPLE, KEYS

    keys = set(re.findall(r"^(?:# )?([a-z_]+):", EXAMPLE, re.MULTILINE))
    assert keys - {"Settings"} <= set(KEYS)
    assert set(KEYS) - keys <= {"fresh", "trust_code", "out"}


@pytest.mark.parametrize(("args", "says"), [
    (["compress", "no.pth", "--arch", "torchvision:resnet18", "--data", "cifar10"], "no.pth does not exist"),
    (["compress", "demo", "--device", "raspbery-pi-5"], "Did you mean raspberry-pi-5"),
    (["compress", "demo", "--formats", "onx"], "Did you mean onnx"),
    (["compress", "demo", "--precisions", "int9"], "int9"),
        (["compress", "demo", "--ranges", "kl"], "ranges is 'kl'"),
        (["compress", "demo", "--formats", "openvino", "--device", "raspberry-pi-4"], "does not take openvino"),
    (["compress", "demo", "--max-drop", "-1"], "max_drop"),
    (["compress", "demo", "--max-drop", "nan"], "max_drop"),
    (["compress", "demo", "--min-shrink", "100"], "min_shrink"),
    (["compress", "demo", "--time", "soon"], "time is 'soon'"),
    (["compress", "demo", "--lang", "fr"], "en or zh"),
    (["compress"], "Not given: model, data"),
    (["compress", "x.pth"], "Not given: data"),
    (["inspect", "demo", "--data", "no-such-folder"], "no-such-folder is not a folder"),
    (["data", "cifar11"], "Did you mean cifar10"),
    (["run", "nowhere", "x.jpg"], "not a bundle"),
    (["report", "nowhere"], "nowhere"),
    (["train", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    (["comprss"], "comprss"),
])  # fmt: skip
def test_a_mistake_exits_2_and_says_what_to_do(args: list[str], says: str, tmp_path: Path) -> None:
    done = lighten(*args, cwd=tmp_path)
    assert done.returncode == EXIT_INPUT, done.stdout
    assert says in done.stdout
    assert "Traceback" not in done.stdout


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    done = lighten(
        "compress",
        "no.pth",
        "--arch",
        "torchvision:resnet18",
        "--data",
        "demo",
        "--device",
        "toaster",
        "--max-drop",
        "-1",
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_INPUT
    for part in ("3 problems", "no.pth", "toaster", "max_drop"):
        assert part in done.stdout


def test_a_pickle_with_code_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    done = lighten("compress", tmp_path / "evil.pth", "--arch", "lighten:resnet20", "--data", "demo", "--out", tmp_path)
    assert done.returncode == EXIT_INPUT
    assert not (tmp_path / "ran").exists()


def test_code_of_the_user_runs_only_with_trust_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("open('ran', 'w').close()\nfrom lighten.models.resnet import resnet20 as net\n")
    done = lighten("inspect", "w.pth", "--arch", "net.py:net", cwd=tmp_path)
    assert done.returncode == EXIT_INPUT
    assert not (tmp_path / "ran").exists()


def test_unreadable_images_are_counted_or_refused_by_strict(photos: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from lighten.models.resnet import resnet20

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for file in sorted((root / "red").iterdir())[:30]:
        file.write_bytes(file.read_bytes()[:200])
    torch.save(resnet20(3).state_dict(), tmp_path / "w.pth")
    base = [
        "compress",
        tmp_path / "w.pth",
        "--arch",
        "lighten:resnet20",
        "--data",
        root,
        "--input-size",
        32,
        *QUICK,
        "--out",
        tmp_path,
    ]
    refused = lighten(*base, "--strict", "--name", "a")
    assert refused.returncode == EXIT_INPUT, refused.stdout
    assert "truncated" in refused.stdout
    told = lighten(*base, "--max-drop", 90, "--name", "b")
    assert told.returncode == EXIT_PASS, told.stdout
    assert "cannot be read" in told.stdout or "unreadable" in told.stdout


def test_neither_interrupt_nor_kill_9_loses_a_finished_trial(tmp_path: Path) -> None:
    command = [*LIGHTEN, "compress", "demo", *QUICK, "--max-drop", "2", "--out", str(tmp_path), "--name", "k"]
    ledger, rng = tmp_path / "k" / "ledger.jsonl", random.Random(int(time.time()))
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a CI in the background ignores SIGINT
    )
    wait_for(lambda: ledger.exists() and ledger.read_text().count("\n") >= 2)
    child.send_signal(signal.SIGINT)
    text = child.communicate(timeout=60)[0]
    assert child.returncode == EXIT_INTERRUPTED, text
    assert "same command" in text
    kept = ledger.read_text().splitlines()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(5, 20))
    child.kill()
    child.wait()
    done = lighten(*command[3:])
    assert done.returncode == EXIT_PASS, done.stdout
    assert "done before" in done.stdout
    after = ledger.read_text().splitlines()
    assert after[: len(kept)] == kept
    trials = [json.loads(row)["value"]["recipe"] for row in after if json.loads(row)["kind"] == "trial"]
    assert len({json.dumps(t) for t in trials}) == len(trials) == 2


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "x").mkdir()
    with (tmp_path / "x" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = lighten("compress", "demo", *QUICK, "--out", tmp_path, "--name", "x")
    assert done.returncode == EXIT_INPUT
    assert "Another lighten works in" in done.stdout


def wait_for(ready: object, seconds: float = 120) -> None:
    """Until `ready()` is true."""
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def test_train_writes_a_checkpoint_that_inspect_reads(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "arch: lighten:resnet20\ndata: demo\nout: out\npreprocess: {height: 32, width: 32}\nfit: {epochs: 1, batch: 64, lr: 0.05}\n"
    )
    done = lighten("train", "t.yaml", cwd=tmp_path)
    assert done.returncode == EXIT_PASS, done.stdout
    assert "report: top-1" in done.stdout
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["fit"]["epochs"] == 1
    seen = lighten("inspect", "out/model.safetensors", "--arch", "lighten:resnet20", "--input-size", 32, cwd=tmp_path)
    assert seen.returncode == EXIT_PASS, seen.stdout
    assert "0.27 million" in seen.stdout


# --- one method, in this process ----------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, in_process: None, tmp_path: Path) -> Callable[..., int]:
    """Runs a command here, and gives its exit code; of the demo's images few are left, and times are taken quickly."""
    from lighten import walk
    from lighten.data import demo

    whole, real = demo.data(), walk.compress
    few = {k: s.take(n) for (k, s), n in zip(whole.splits.items(), (64, 48, 60, 60))}

    def compress(*args: Any, settings: Any, **given: Any) -> Any:
        timing = Timing(warmup=1, runs=3, least=2, seconds=0.1)
        return real(*args, settings=dataclasses.replace(settings, timing=timing, isolate=False), **given)

    monkeypatch.setattr(demo, "data", lambda: dataclasses.replace(whole, **few))
    monkeypatch.setattr(walk, "compress", compress)
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in args])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's network is one with three blocks instead of nine, which is exported in a third of the time."""
    import torch
    from safetensors.torch import save_file

    from lighten.data import demo
    from lighten.models import resnet

    monkeypatch.setattr(resnet, "resnet20", lambda num_classes=10, channels=3: resnet.ResNet(1, num_classes, channels))
    torch.manual_seed(0)
    save_file(resnet.resnet20().state_dict(), tmp_path / "shallow.safetensors")
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path / "shallow.safetensors")


def outcome(folder: Path) -> tuple[dict[str, Any], Path]:
    """The one trial of a run, and its folder."""
    (trial,) = json.loads((folder / "result.json").read_text())["trials"]
    assert trial["failure"] is None, trial["failure"]
    return trial, (folder / trial["artifact"]["path"]).parent


@pytest.mark.parametrize(
    ("command", "methods", "code"),
    [
        ("prune demo --ratio 0.3 --epochs 0.05", ["channel_prune", "distill"], EXIT_PASS),
        ("distill demo --epochs 0.05 --teacher-share 1 --loss dkd --student lighten:resnet20", ["distill"], EXIT_PASS),
        ("finetune demo --epochs 0.05", ["finetune"], EXIT_PASS),
        ("sparsify demo --pattern 2:4 --min-shrink 90", ["sparsify"], EXIT_BUDGET),
        ("factorize demo --energy 0.6", ["low_rank"], EXIT_PASS),
    ],
)
def test_each_method_alone_ends_in_a_file_and_its_network(
    command: str, methods: list[str], code: int, typed: Callable[..., int], shallow: None, tmp_path: Path
) -> None:
    import torch

    import lighten
    from lighten.data import demo
    from lighten.plugins import get

    assert typed(*command.split(), "--formats", "onnx", "--name", "one") == code
    trial, folder = outcome(tmp_path / "runs" / "one")
    assert [s["method"] for s in trial["recipe"]["steps"]] == methods
    x = demo.data().select.take(8).inputs(demo.PREPROCESS)
    with torch.no_grad():
        network = lighten.load(folder / "network.safetensors")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(get("formats", "onnx").load(folder / "model.onnx", 1)(x), network, atol=1e-3)


def test_what_was_pruned_is_smaller_and_goes_on_without_its_architecture_being_named(
    typed: Callable[..., int], shallow: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lighten

    assert typed("prune", "demo", "--ratio", 0.4, "--epochs", 0, "--formats", "onnx", "--name", "p") == EXIT_PASS
    trial, folder = outcome(tmp_path / "runs" / "p")
    result = json.loads((tmp_path / "runs/p/result.json").read_text())
    assert trial["evidence"]["size"]["bytes"] < 0.8 * result["baseline"]["evidence"]["size"]["bytes"]
    kept = folder / "network.safetensors"
    assert typed("inspect", kept) == EXIT_PASS
    shown = capsys.readouterr().out
    assert "lighten:resnet20" in shown
    assert f"{sum(p.numel() for p in lighten.load(kept).parameters()) / 1e6:.2f} million" in shown
    assert typed("compress", kept, "--data", "demo", *QUICK, "--max-drop", 50, "--name", "q") == EXIT_PASS
    again = json.loads((tmp_path / "runs/q/result.json").read_text())
    assert again["preprocess"]["height"] == 32
    assert again["baseline"]["evidence"]["size"]["bytes"] == pytest.approx(trial["evidence"]["size"]["bytes"], rel=0.01)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("prune", "demo", "--ratio", 0), "a ratio of 0 removes nothing"),
        (("prune", "demo", "--ratio", 1), "a ratio of 1 removes everything"),
        (("prune", "demo", "--ratio", "half"), "should be a valid number"),
        (("prune", "demo", "--keep", "layer9"), "no layer named 'layer9'"),
        (("prune", "demo", "--energy", 0.9), "--energy"),
        (("sparsify", "demo", "--ratio", 1), "above 0 and under 1"),
        (("sparsify", "demo", "--pattern", "4:2"), "4:2"),
        (("factorize", "demo", "--energy", 0), "energy is 0"),
        (("distill", "demo", "--student", "resnet18"), "does not say where the architecture comes from"),
        (("distill", "demo", "--student", "lighten:resnet21"), "Did you mean"),
        (("distill", "demo", "--temperature", -1), "temperature"),
        (("finetune", "demo", "--epochs", -1), "epochs"),
        (("distill", "five.pth", "--arch", "lighten:resnet20", "--data", "demo", "--input-size", 32), "5 classes"),
        (("compress", "demo", "--min-shrink", 100), "min_shrink"),
        (("compress", "demo", "--min-shrink", -5), "min_shrink"),
        (("compress", "demo", "--min-speedup", -2), "min_speedup"),
        (("compress", "demo", "--held-out", "none.txt"), "none.txt cannot be read"),
    ],
)
def test_a_mistake_about_methods_exits_2(
    command: tuple[object, ...],
    says: str,
    typed: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from lighten.models.resnet import resnet20

    torch.save(resnet20(5).state_dict(), tmp_path / "five.pth")
    assert typed(*command) == EXIT_INPUT
    told = capsys.readouterr()
    assert says in told.err + told.out
    assert "bug of lighten" not in told.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/result.json"))
