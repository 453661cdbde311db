"""kill -9 at ten random moments: the same command finishes, repeats no finished trial, and gives the same result.

python benchmarks/kill.py [--kills 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

COMMAND = ("compress", "demo", "--device", "this-machine", "--max-drop", "1", "--min-shrink", "70")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        began = time.monotonic()
        finish(Path(room), "whole")
        length = time.monotonic() - began
        want = answer(Path(room) / "whole")
        rng, rows = random.Random(args.seed), []
        for k in range(args.kills):
            at = rng.uniform(0.03, 0.97) * length
            rows.append(one_kill(Path(room), f"kill{k}", at, want))
            print(rows[-1], flush=True)
    head = f"A whole run takes {length:.0f} s; its winner is {want['winner']}, verdict {want['verdict']}.\n\n"
    common.put(
        "kill", head + common.table(("killed after s", "trials kept", "repeated", "finished", "same result"), rows)
    )


def one_kill(room: Path, name: str, at: float, want: dict[str, Any]) -> list[str]:
    """Start, kill -9, look at the ledger, start again, compare."""
    child = subprocess.Popen(command(room, name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(at)
    child.kill()
    child.wait()
    kept = trials(room / name)
    finished = finish(room, name) == 0
    after = trials(room / name)
    repeated = (after[: len(kept)] != kept) + len(after) - len({t["recipe_id"] for t in after})
    return [
        f"{at:.1f}",
        str(len(kept)),
        str(repeated),
        "yes" if finished else "NO",
        "yes" if answer(room / name) == want else "NO",
    ]


def command(room: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "lighten.cli", *COMMAND, "--out", str(room), "--name", name]


def finish(room: Path, name: str) -> int:
    return subprocess.run(command(room, name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def trials(folder: Path) -> list[dict[str, Any]]:
    """The trials in the order they were recorded, with their raw evidence: a repeated one would differ in its times."""
    file = folder / "ledger.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{"recipe_id": json.dumps(r["value"]["recipe"]), **r["value"]} for r in rows if r["kind"] == "trial"]


def answer(folder: Path) -> dict[str, Any]:
    """What must be the same whatever happened: everything that is not a time."""
    result = json.loads((folder / "result.json").read_text())
    shown = [
        (t["recipe"], t["artifact"]["sha256"], t["evidence"]["metric"], t["evidence"]["size"]["bytes"])
        for t in result["trials"]
    ]
    return {"winner": result["winner"], "verdict": result["verdict"], "final": result["final"], "trials": shown}


if __name__ == "__main__":
    main()
