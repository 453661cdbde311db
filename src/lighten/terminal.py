"""What a person sees in the terminal: progress with an ETA, tables, verdicts."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lighten.types import Evidence, Result, Trial, shrink, speedup

# Piped output is for logs and other programs: wide enough that nothing is cut.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)
QUIET_S = 15.0
"""Seconds between progress lines where the output is no terminal."""


class Bar:
    """A progress callback: one bar for each kind of work, a line now and then where there is no terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.tasks, self.last = progress, {}, time.monotonic()  # type: ignore[var-annotated]

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.progress is None:
            if time.monotonic() - self.last > QUIET_S:
                self.last = time.monotonic()
                print(f"  {what}: {done} of {total}", flush=True)
            return
        key = what.split("(")[0] if not what.startswith("epoch") else "training"
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[key], description=escape(what), completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.tasks.pop(key))


@contextlib.contextmanager
def progress_bar() -> Iterator[Bar]:
    """Bars while the work lasts, nothing of them afterwards."""
    if not console.is_terminal:
        yield Bar(None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)


def say(line: str) -> None:
    """One line of the run's story; warnings stand out."""
    style = "yellow" if line.startswith("warning") else "dim" if "done before" in line else ""
    console.print(f"  {escape(line)}", style=style, soft_wrap=True)


def trials_table(result: Result) -> Table:
    """Original and each trial, the winner marked."""
    base = result.baseline.evidence
    assert base is not None
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 1))
    for name in ("", "recipe", "MB", "smaller", "top-1 %", "drop", "ms", "speed", "RAM MB"):
        table.add_column(name, justify="left" if name in ("", "recipe") else "right", no_wrap=name != "recipe")
    for trial in (result.baseline, *result.trials):
        mark = "★" if trial.id == result.winner else ""
        title = trial.recipe.title + (" (original)" if trial.id == result.baseline.id else "")
        table.add_row(mark, title, *_cells(trial, base), style="bold" if mark else "")
    return table


def _cells(trial: Trial, base: Evidence) -> list[str]:
    e = trial.evidence
    if e is None:
        return ["[red]failed[/]", "", "", "", "", "", ""]
    return [
        f"{e.size.mb:.2f}",
        f"{shrink(e, base):.0f} %",
        f"{e.metric.value:.2f} ±{e.metric.error:.2f}",
        f"{e.drop.value:+.2f}",
        f"{e.p50(1):.2f}",
        f"{speedup(e, base):.1f}x",
        f"{e.memory_mb:.0f}",
    ]


def print_result(result: Result, lang: str) -> None:
    """Table, what the report images said, advice, verdict, where the files are."""
    final, winner, base = result.final, result.winning, result.baseline.evidence
    assert winner.evidence is not None
    assert base is not None
    console.print()
    console.print(trials_table(result))
    console.print()
    for advice in result.advice:
        console.print(f"  [yellow]![/] {escape(advice.zh if lang == 'zh' else advice.en)}", soft_wrap=True)
    said = (
        f"{winner.recipe.title}: {shrink(winner.evidence, base):.1f} % smaller, {speedup(winner.evidence, base):.2f}x the speed, "
        f"top-1 {final.winner} % against {final.baseline} % (drop {final.drop} pt) on the {final.winner.n} report images"
    )
    if lang == "zh":
        said = (
            f"{winner.recipe.title}：缩小 {shrink(winner.evidence, base):.1f} %，速度为原来的 {speedup(winner.evidence, base):.2f} 倍，"
            f"在 {final.winner.n} 张报告图片上 top-1 {final.winner} %，原模型 {final.baseline} %（下降 {final.drop} 个百分点）"
        )
    color = "green" if result.passed else "red"
    console.print(f"[bold {color}]{result.verdict}[/]  {escape(said)}", soft_wrap=True)
    for miss in result.misses:
        console.print(f"  [red]✗[/] {escape(str(miss))}")
    for label, file in (("bundle", "bundle"), ("report", "report.html")):
        console.print(f"  {label}  {result.path}/{file}", soft_wrap=True)


def pairs(title: str, rows: dict[str, Any]) -> None:
    """Names and values in two columns."""
    table = Table(
        box=None,
        show_header=False,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    console.print(table)
    console.print()
