"""What a person sees in the terminal: progress with an ETA, tables, verdicts."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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

from lighten.search.reach import is_probe
from lighten.types import Evidence, Result, Trial, metric_title, shrink, speedup

if TYPE_CHECKING:
    from lighten.exports import Row
    from lighten.runs import Beside, Comparison, Standing

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


def trials_table(result: Result, lang: str = "en") -> Table:
    """Original and each trial; the winner is marked, and so is a short trial: its accuracy is not its recipe's."""
    base = result.baseline.evidence
    assert base is not None
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 1))
    metric = f"{metric_title(base.metric_name)} %"
    for name in ("", "recipe", "MB", "smaller", metric, "drop", "ms", "speed", "RAM MB"):
        table.add_column(name, justify="left" if name in ("", "recipe") else "right", no_wrap=name != "recipe")
    for trial in (result.baseline, *result.trials):
        mark = "★" if trial.id == result.winner else ""
        title = trial.recipe.title + (" (original)" if trial.id == result.baseline.id else "")
        short = is_probe(trial.recipe)
        title += f" ({_word('short trial', lang)})" if short else ""
        table.add_row(mark, title, *_cells(trial, base), style="bold" if mark else "dim" if short else "")
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
    console.print(trials_table(result, lang))
    if any(is_probe(t.recipe) for t in result.trials):
        console.print(f"  {_word(_short_trials(base), lang)}", style="dim", soft_wrap=True)
    console.print()
    for advice in result.advice:
        console.print(f"  [yellow]![/] {escape(advice.zh if lang == 'zh' else advice.en)}", soft_wrap=True)
    metric = metric_title(base.metric_name)
    said = (
        f"{winner.recipe.title}: {shrink(winner.evidence, base):.1f} % smaller, {speedup(winner.evidence, base):.2f}x the speed, "
        f"{metric} {final.winner} % against {final.baseline} % (drop {final.drop} pt) on the {final.winner.n} report images"
    )
    if lang == "zh":
        said = (
            f"{winner.recipe.title}：缩小 {shrink(winner.evidence, base):.1f} %，速度为原来的 {speedup(winner.evidence, base):.2f} 倍，"
            f"在 {final.winner.n} 张报告图片上 {metric} {final.winner} %，原模型 {final.baseline} %（下降 {final.drop} 个百分点）"
        )
    color = "green" if result.passed else "red"
    console.print(f"[bold {color}]{result.verdict}[/]  {escape(said)}", soft_wrap=True)
    for miss in result.misses:
        console.print(f"  [red]✗[/] {escape(str(miss))}")
    for line in detector_lines(result, lang):
        console.print(f"  {line}", soft_wrap=True)
    for line in winner.notes:
        console.print(f"  {escape(line)}", style="dim", soft_wrap=True)
    if result.spent:
        minutes = f"{sum(seconds for _, seconds in result.spent) / 60:.1f}"
        allowed = f"{result.budget.time_s / 60:.1f}" if result.budget.time_s else "—"
        spent = f"用时 {minutes} 分钟（允许 {allowed}）" if lang == "zh" else f"took {minutes} min (allowed: {allowed})"
        console.print(f"  {spent}")
    for label, file in (("bundle", "bundle"), ("report", "report.html")):
        console.print(f"  {label}  {result.path}/{file}", soft_wrap=True)


def _short_trials(base: Evidence) -> str:
    return SHORT_DETECTORS if base.metric_name == "mAP" else SHORT_TRIALS


def detector_lines(result: Result, lang: str) -> list[str]:
    """Of a detector: its other metrics on the report images, before and after, and what became of its boxes."""
    winner = result.winning.evidence
    if winner is None or winner.metric_name != "mAP":
        return []
    final, old = result.final, dict(result.final.extra_before)
    rows = [f"{name} {old[name].value:.2f} → {e.value:.2f}" for name, e in final.extra if name in old]
    lines = [" · ".join(rows)] if rows else []
    b = winner.drift.boxes
    if b is None:
        return lines
    if not math.isfinite(b.iou):
        none = (
            "boxes: none of the original's has a partner" if b.n or not b.matched else "boxes: neither side shows any"
        )
        return [*lines, _word(none, lang)]
    said = "boxes: {partner} % keep a partner, overlap {iou} %, score difference {score} (compression)"
    numbers = {"partner": f"{b.matched:.1f}", "iou": f"{100 * b.iou:.1f}", "score": f"{b.score:.3f}"}
    return [*lines, _word(said, lang, **numbers)]


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


# --- runs beside each other ---------------------------------------------------------------------------

MARKS = {
    "PASS": "[bold green]PASS[/]",
    "FAIL": "[bold red]FAIL[/]",
    "unfinished": "[yellow]…[/]",
    "damaged": "[red]✗[/]",
}
CLASSES_SHOWN = 20
SHORT_TRIALS = "A short trial trains only long enough to tell plans apart: its accuracy is not that of its recipe."
SHORT_DETECTORS = "A short trial trains only long enough to tell plans apart: its mAP is not that of its recipe."
ZH = {
    "short trial": "短训练试验",
    SHORT_TRIALS: "短训练试验只训练到能分出方案优劣为止，它的精度不代表该方案的最终精度。",
    SHORT_DETECTORS: "短训练试验只训练到能分出方案优劣为止，它的 mAP 不代表该方案的最终 mAP。",
    "boxes: {partner} % keep a partner, overlap {iou} %, score difference {score} (compression)": (
        "检测框：{partner} % 配对成功，重叠 {iou} %，得分差 {score}（压缩）"
    ),
    "boxes: none of the original's has a partner": "检测框：原始模型的框没有一个能配对",
    "boxes: neither side shows any": "检测框：双方都没有显示任何框",
    "run": "运行",
    "smaller": "缩小",
    "drop": "下降",
    "speed": "加速",
    "best of {n} trials so far, drop on the select images": "{n} 次试验中目前最好的，下降来自选择图片",
    "unfinished, {n} trials, none beside the original": "未完成，{n} 次试验，除原模型外尚无结果",
    "breaks": "超出预算",
    "No runs in {folder}.": "{folder} 中没有运行。",
    "recipe": "配方",
    "The recipes are the same.": "两个配方相同。",
    "budget": "预算",
    "measured": "实测",
    "classes on the report images, {metric} %": "各类别在报告图片上的 {metric} %",
    "B − A": "B − A",
    "{n} more classes with smaller changes: --json shows all.": "另有 {n} 个类别变化更小：--json 可显示全部。",
    "± are standard errors as if both were measured on different images: on the same ones they are smaller. "
    "Green: B is better; red: A is better; by more than two errors, or exactly.": (
        "± 为标准误，按两者在不同图片上测量计算；在相同图片上误差更小。绿色：B 更好；红色：A 更好（相差超过两倍误差，或精确值不同）。"
    ),
    "report metric": "报告图片 {metric}",
    "report drop": "报告图片下降",
    "select metric": "选择图片 {metric}",
    "select drop": "选择图片下降",
    "bytes": "文件",
    "gzip": "gzip 后",
    "shrink": "缩小",
    "speedup": "加速",
    "memory": "内存峰值",
    "latency": "延迟，{n} 线程",
    "format": "格式",
    "weights": "权重",
    "activations": "激活",
    "steps": "步骤",
    "none": "无",
}
EN = {
    "report metric": "{metric}, report images",
    "report drop": "drop, report images",
    "select metric": "{metric}, select images",
    "select drop": "drop, select images",
    "bytes": "file",
    "shrink": "smaller",
    "speedup": "speed",
    "memory": "peak memory",
    "latency": "latency, {n} threads",
}


def _word(text: str, lang: str, **blanks: Any) -> str:
    return (ZH if lang == "zh" else EN).get(text, text).format(**blanks)


def print_runs(rows: Sequence[Standing], folder: str, lang: str) -> None:
    """The leaderboard: who, from what, and what it cost; three lines a run, so that 80 columns hold it."""
    if not rows:
        console.print(_word("No runs in {folder}.", lang, folder=escape(folder)), soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 1, 1))
    table.add_column("", no_wrap=True)
    table.add_column(_word("run", lang), overflow="fold")
    for name in ("drop", "smaller", "speed", "MB", "ms"):
        table.add_column(_word(name, lang), justify="right", no_wrap=True)
    for row in rows:
        drop = None if row.drop is None else row.drop.value
        numbers = (drop, row.shrink, row.speedup, row.size_mb, row.latency_ms)
        forms = ("{:+.2f}", "{:.1f} %", "{:.1f}x", "{:.2f}", "{:.2f}")
        cells = ["" if value is None else form.format(value) for value, form in zip(numbers, forms)]
        table.add_row(MARKS.get(row.verdict, escape(row.verdict)), _who(row, lang), *cells)
    console.print(table)


def _who(row: Standing, lang: str) -> str:
    lines = [f"[bold]{escape(row.name)}[/]"]
    lines += [escape(" · ".join(filter(None, (row.model, row.data, row.device))))] if row.model else []
    lines += [escape(row.recipe)] if row.recipe else []
    lines += [f"[red]{_word('breaks', lang)}: {escape(', '.join(row.missed))}[/]"] if row.missed else []
    if row.verdict == "unfinished":
        said = "best of {n} trials so far, drop on the select images"
        said = said if row.recipe else "unfinished, {n} trials, none beside the original"
        lines.append(f"[yellow]{_word(said, lang, n=row.trials)}[/]")
    lines += [f"[red]{escape(row.reason)}[/]"] if row.reason else []
    return "\n".join([*lines, f"[dim]{row.when}[/]"])


def print_comparison(c: Comparison, lang: str) -> None:
    """What must not be compared, first; then recipes, budgets, figures and classes."""
    for letter, name, verdict, title in zip("AB", (c.a, c.b), c.verdicts, c.titles):
        console.print(f"[bold]{letter}[/]  {MARKS.get(verdict, '')}  [bold]{escape(name)}[/]  {escape(title)}")
    for warning in c.warnings:
        console.print(f"[bold yellow]![/] [yellow]{escape(warning.zh if lang == 'zh' else warning.en)}[/]")
    console.print()
    if not c.recipe:
        console.print(_word("The recipes are the same.", lang) + "\n")
    for title, rows in (("recipe", c.recipe), ("budget", c.budget)):
        if rows:
            table = _beside(_word(title, lang), "A", "B")
            for row in rows:
                table.add_row(*(escape(_word(text, lang)) or "—" for text in (row.what, row.a, row.b)))
            console.print(table, "")
    table = _beside(_word("measured", lang), "A", "B", "B − A", "", right=True)
    for figure in c.figures:
        table.add_row(_figure(figure.what, c.metric, lang), *_numbers(figure), figure.unit)
    console.print(table, "")
    _print_classes(c, lang)
    console.print(
        _word(
            "± are standard errors as if both were measured on different images: on the same ones they are smaller. "
            "Green: B is better; red: A is better; by more than two errors, or exactly.",
            lang,
        ),
        style="dim",
    )


def _print_classes(c: Comparison, lang: str) -> None:
    if not c.classes:
        return
    title = _word("classes on the report images, {metric} %", lang, metric=metric_title(c.metric))
    table = _beside(title, "A", "B", "B − A", right=True)
    for row in c.classes[:CLASSES_SHOWN]:
        sure = abs(row.difference) > 2 * row.error
        color = ("green" if row.difference > 0 else "red") if sure else ""
        gap = f"{row.difference:+.2f}" + (f" ±{row.error:.2f}" if math.isfinite(row.error) else "")
        name = escape(row.name_zh if lang == "zh" else row.name)
        table.add_row(name, f"{row.a:.2f}", f"{row.b:.2f}", f"[{color}]{gap}[/]" if color else gap)
    console.print(table)
    if (more := len(c.classes) - CLASSES_SHOWN) > 0:
        console.print(_word("{n} more classes with smaller changes: --json shows all.", lang, n=more), style="dim")
    console.print()


def _figure(what: str, metric: str, lang: str) -> str:
    if what.startswith("latency "):
        return _word("latency", lang, n=what.split()[1]).replace(" 1 threads", " 1 thread")
    name = f"select {what}" if what in ("drop", "metric") else what
    return _word(name, lang, metric=metric_title(metric))


def _numbers(row: Beside) -> tuple[str, str, str]:
    digits = 3 if row.what in ("bytes", "gzip") else 2
    gap = f"{row.difference:+.{digits}f}" + (f" ±{row.error:.2f}" if row.error is not None else "")
    color = {"a": "red", "b": "green"}.get(row.better)
    return f"{row.a:.{digits}f}", f"{row.b:.{digits}f}", f"[{color}]{gap}[/]" if color else gap


def _beside(title: str, *names: str, right: bool = False) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(name, justify="right" if right and name else "left", overflow="fold")
    return table


EXPORT_COLUMNS = {
    "en": ("format", "precision", "MB", "of float32", "same answer", "{metric}", "drop", "ms", "memory MB", ""),
    "zh": ("格式", "精度", "MB", "占 float32", "答案一致", "{metric}", "损失", "毫秒", "内存 MB", ""),
}
FOUND_AGAIN = {"en": "boxes again", "zh": "框一致"}
"""What "same answer" is of a detector."""
STATUS = {"PASS": "green", "FAIL": "red", "failed": "red"}


def print_exports(rows: Sequence[Row], title: str, lang: str = "en") -> None:
    """Format x precision: what every exported file costs, or why there is none."""
    table = Table(title=escape(title), title_justify="left")
    metric = next((row.evidence.metric_name for row in rows if row.evidence), "top1")
    for k, name in enumerate(EXPORT_COLUMNS[lang]):
        name = FOUND_AGAIN[lang] if k == 4 and metric == "mAP" else name.format(metric=metric_title(metric))
        table.add_column(name, justify="left" if k in (0, 1, 9) else "right", overflow="fold")
    for row in rows:
        words = "; ".join([w for w in (row.reason, ", ".join(row.fallbacks)) if w])
        status = f"[{STATUS.get(row.status, 'yellow')}]{row.status}[/] {escape(words)}".rstrip()
        table.add_row(row.format, row.title, *_export_figures(row), status)
    console.print(table)


def _export_figures(row: Row) -> tuple[str, ...]:
    size = f"{row.bytes / 1e6:.2f}" if row.bytes else "-"
    share = f"{100 * row.bytes / row.original_bytes:.1f} %" if row.bytes and row.original_bytes else "-"
    if row.evidence is None:
        return size, share, "-", "-", "-", "-", "-"
    e = row.evidence
    same, metric = f"{e.fidelity.same_top1:.1f} %", f"{e.metric.value:.2f} %"
    return size, share, same, metric, f"{e.drop.value:+.2f}", f"{e.p50(1):.2f}", f"{e.memory_mb:.0f}"
