"""What the command line prints. Tables and progress for people on a terminal, JSON for machines."""

import json as json_module
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from convert.progress import Progress, Silent

if TYPE_CHECKING:
    from convert.bench import BenchResult
    from convert.inspection import Inspection
    from convert.report.measures import Latency
    from convert.report.runs import DeviceRun
    from convert.report.schema import GateResult, Report, Result

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


# Seconds of a piece of work before its speed says how long the rest takes.
SOON = 2.0


class Remaining:
    """How long a piece of work still takes, as far as its pace so far tells."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.what = clock, ""
        self.began, self.first = 0.0, 0

    def text(self, done: int, total: int | None, what: str) -> str:
        """ "about 40 s left", or "" while nobody can know."""
        now = self.clock()
        if what != self.what or done < self.first:
            self.what, self.began, self.first = what, now, done
        spent, made = now - self.began, done - self.first
        if total is None or made <= 0 or spent < SOON or done >= total:
            return ""
        left = spent * (total - done) / made
        return f"about {left:.0f} s left" if left < 100 else f"about {left / 60:.0f} min left"


class Shown:
    """Progress as a bar on a terminal, as one line per stage elsewhere."""

    def __init__(self, live: Any) -> None:
        self.live, self.task, self.text = live, None, ""
        self.remaining = Remaining()

    def stage(self, text: str) -> None:
        self.text = text
        if self.live is None:
            err.print(f"  {escape(text)}")
            return
        if self.task is not None:
            self.live.remove_task(self.task)
        self.task = self.live.add_task(escape(text), total=None, what="")

    def advance(self, done: int, total: int | None = None, what: str = "") -> None:
        if self.live is None:
            return
        if self.task is None:
            self.stage("")
        left = self.remaining.text(done, total, what)
        self.live.update(self.task, completed=done, total=total, what=f"{what}, {left}" if left else what)


@contextmanager
def working(quiet: bool = False) -> Iterator[Progress]:
    """Progress for the work inside: on the error stream, gone when it is done; none with `quiet`."""
    if quiet:
        yield Silent()
        return
    if not err.is_terminal:
        yield Shown(None)
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("[dim]{task.fields[what]}[/dim]"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=err, transient=True) as live:
        yield Shown(live)


def print_json(content: Any) -> None:
    """Strict JSON on standard output: NaN and infinity are refused."""
    sys.stdout.write(json_module.dumps(content, indent=2, allow_nan=False) + "\n")


def show_report(report: "Report", folder: Path, json: bool) -> None:
    """The table of results, what to beware of, and where the files are."""
    if json:
        print_json(report.model_dump(mode="json"))
        return
    _print_results(report)
    seconds = f"{report.convert_seconds:.0f} s, peak memory {report.peak_rss_mib:.0f} MiB"
    out.print(f"\n{seconds}. Look at [bold]{escape(str(folder / 'report.html'))}[/bold]")


def _print_results(report: "Report") -> None:
    """The table, what to beware of, and the gates that failed."""
    out.print(results_table(report))
    if any(r.latency is None for r in report.results):
        out.print("[dim]not timed: nothing on this machine runs it as the device would[/dim]")
    _print_runs(report)
    for warning in report.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}")
    from convert.report import words

    gates = [(gate.subject or result.subject, gate) for result in report.results for gate in result.gates]
    failed = [(subject, gate) for subject, gate in gates if not gate.passed]
    for subject, gate in failed:
        out.print(f"[red]gate failed[/red] {escape(subject)}: {gate.gate}: {escape(gate.reason)}")
    if gates and not failed:
        out.print(f"[green]all {len(gates)} gates passed[/green]")
    if not failed and any(words.result_failed(r) for r in report.results):
        out.print(f"[red]{escape(words.verdict(report))}[/red]")


def results_table(report: "Report") -> Table:
    """One row per artifact; 80 columns are enough."""
    title = f"{escape(report.model.name)}: {report.model.parameters:,} parameters"
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("artifact", overflow="fold")
    labelled = any(r.accuracy for r in report.results)
    for name in ("drift", "top-1 %" if labelled else "same top-1", "size", "speed", "int8 ops"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        table.add_row(*_row(result, labelled))
    return table


def _print_runs(report: "Report") -> None:
    """One line for everything that ran elsewhere, and for what it should take where nothing was timed."""
    from convert.report.run_words import estimated

    for result in report.results:
        if estimated(result):
            out.print(f"[dim]{escape(estimated(result))}, {escape(result.target)}[/dim]")
        for run in result.runs:
            out.print(f"[bold]{escape(result.subject)}[/bold] on {escape(run.on)}: {escape(run_line(run))}")


def run_line(run: "DeviceRun") -> str:
    """What one run showed, in a line."""
    if run.failure is not None or run.drift is None:
        return f"failed: {run.failure}"
    parts = ["exact against float" if run.drift.exact else f"{_decibels(run.drift.sqnr_db)} against float"]
    if run.host is not None:
        equal = "the same bits as here" if run.host.exact else f"{run.host.share_equal:.2%} of the values as here"
        parts.append(equal)
    if run.instructions is not None:
        count = run.instructions
        beside = "" if count.float_all is None else f", {count.all / count.float_all:.2f} of float's"
        dots = "" if count.dot is None else f", {count.dot:,} dot products"
        parts.append(f"{count.all:,} instructions{beside}{dots}")
    if run.latency is not None:
        speed = "" if run.latency.speedup is None else f", {run.latency.speedup:.2f}x of float's speed"
        parts.append(f"p50 {run.latency.p50_ms:.3f} ms{speed}")
    elif not run.emulated:
        parts.append(f"not timed: {run.latency_note}")
    return "; ".join(parts)


def _decibels(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} dB"


def say(text: str) -> None:
    """One line of plain words."""
    out.print(escape(text))


def _row(result: "Result", labelled: bool) -> list[str]:
    stage = result.drift.artifact
    drift = "exact" if stage.exact else f"{stage.sqnr_db:.1f} dB" if stage.sqnr_db is not None else "[red]none[/red]"
    same = "-" if stage.top1_agreement is None else f"{stage.top1_agreement:.2%}"
    if labelled:
        found = result.accuracy
        same = "-" if found is None else f"{100 * found.float_:.2f} → {100 * found.artifact:.2f}"
    placement = f"{result.placement.int8_ops}/{result.placement.int8_ops + result.placement.float_ops}"
    if result.placement.fallbacks:
        placement = f"[yellow]{placement}[/yellow]"
    return [
        f"{escape(result.device)}\n[dim]{result.target} {escape(result.recipe.removeprefix('auto: '))}[/dim]",
        drift,
        same,
        _sizes(result.float_bytes, result.bytes),
        _speed(result),
        placement,
    ]


def _sizes(before: int, after: int) -> str:
    """Two sizes on disk in the unit that suits the larger one."""
    unit, name = (1e6, "MB") if before >= 1e7 else (1e3, "kB")
    return f"{before / unit:.0f} → {after / unit:.0f} {name}"


def _speed(result: "Result") -> str:
    latency = result.latency
    if latency is None or latency.speedup is None:
        return "[dim]not timed[/dim]"
    text = f"{latency.speedup:.2f}x"
    if not latency.stable:
        return f"[yellow]~{text}[/yellow]"
    return f"[red]{text}[/red]" if latency.speedup < 1 else text


def show_gates(gates: "list[GateResult]", folder: Path, junit: Path | None, markdown: Path | None, json: bool) -> bool:
    """Print verdicts, write JUnit XML and Markdown, and say whether all passed."""
    from convert.report.gates_markdown import gates_markdown
    from convert.report.junit import junit as as_junit
    from convert.report.store import write_text

    passed = all(g.passed for g in gates)
    write_text(as_junit(gates), junit or folder / "check.xml")
    write_text(gates_markdown(gates), markdown or folder / "check.md")
    if json:
        print_json({"passed": passed, "gates": [g.model_dump(mode="json") for g in gates]})
        return passed
    _print_gates(gates)
    failed = sum(not g.passed for g in gates)
    out.print(
        f"[bold red]{failed} of {len(gates)} gates failed[/bold red]" if failed else f"all {len(gates)} gates passed"
    )
    return passed


def _print_gates(gates: "list[GateResult]") -> None:
    """One block per artifact; the columns stand where they stand in the others, the reason below its gate."""
    gate_width = max((len(g.gate) for g in gates), default=0)
    value_width = max((len(_number(g.value)) for g in gates), default=0)
    for subject in dict.fromkeys(g.subject for g in gates):
        out.print(f"[bold]{escape(subject)}[/bold]")
        for g in (g for g in gates if g.subject == subject):
            mark = "[green]pass[/green]" if g.passed else "[bold red]FAIL[/bold red]"
            numbers = f"{_number(g.value):>{value_width}}  [dim]limit {_number(g.limit)}[/dim]"
            out.print(f"  {mark}  {escape(g.gate.ljust(gate_width))}  {numbers}")
            if g.reason:
                out.print(Padding(f"[dim]{escape(g.reason)}[/dim]", (0, 0, 0, 8)))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() or 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def show_bench(found: "BenchResult", artifact: Path, json: bool) -> None:
    """The latency of one artifact beside its float twin."""
    if json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(f"[bold]{escape(str(artifact))}[/bold] on {escape(found.executor)}, input: {escape(found.inputs)}")
    for run in found.runs:
        out.print(f"on {escape(run.on)} ({escape(run.machine or 'no word on what it is')}, {escape(run.executor)}):")
        out.print(Padding(escape(run_line(run)), (0, 0, 0, 2)))
        if run.latency is not None:
            _print_latency(run.latency)
        for warning in run.warnings:
            out.print(f"[yellow]![/yellow] {escape(warning)}")
    latency = found.latency
    if latency is None:
        if not found.runs:
            out.print(escape(found.note or ""))
        return
    _print_latency(latency)


def _print_latency(latency: "Latency") -> None:
    """Times of artifact and float, the ratio, and where they were taken."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("p50 ms", "p90 ms", "p99 ms", "variation", "runs"):
        table.add_column(name, justify="right")
    table.add_row("artifact", *_times(latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.cv, latency.runs))
    float_ = (latency.float_p50_ms, latency.float_p90_ms, latency.float_p99_ms, latency.float_cv, latency.float_runs)
    if latency.float_p50_ms is not None:
        table.add_row("float", *_times(*float_))
    out.print(table)
    if latency.speedup is not None and latency.ratio_interval is not None:
        low, high = latency.ratio_interval
        verdict = "[red]slower than float[/red]" if latency.speedup < 1 else "faster than float"
        out.print(f"{verdict}: {latency.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f})")
    out.print(f"[dim]{escape(latency.cpu)}, {latency.threads} thread(s)[/dim]")
    for warning in latency.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}")


def _times(p50: float | None, p90: float | None, p99: float | None, cv: float | None, runs: int | None) -> list[str]:
    times = ["-" if t is None else f"{t:.3f}" for t in (p50, p90, p99)]
    return [*times, "-" if cv is None else f"{cv:.1%}", "-" if runs is None else f"{runs:,}"]


def show_inspection(found: "list[Inspection]", json: bool) -> None:
    """Operators, layers and what the device makes of them."""
    from convert.inspection_view import render

    if json:
        content = [i.model_dump(mode="json") for i in found]
        print_json(content[0] if len(content) == 1 else content)
        return
    for inspection in found:
        render(inspection, out)


def show_demo(reports: "dict[str, Report]", folder: Path, json: bool) -> None:
    """The tables of the demo's models."""
    if json:
        print_json({name: r.model_dump(mode="json") for name, r in reports.items()})
        return
    for name, report in reports.items():
        _print_results(report)
        out.print(f"Look at [bold]{escape(str(folder / name / 'report.html'))}[/bold]\n")
