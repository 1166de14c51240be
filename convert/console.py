"""What the command line prints. Tables and progress for people on a terminal, JSON for machines."""

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from convert.progress import Progress, Silent

if TYPE_CHECKING:
    from convert.bench import BenchResult
    from convert.inspection import Inspection
    from convert.report.schema import GateResult, Report, Result

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Shown:
    """Progress as a bar on a terminal, as one line per stage elsewhere."""

    def __init__(self, live: Any) -> None:
        self.live, self.task, self.text = live, None, ""

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
        self.live.update(self.task, completed=done, total=total, what=what)


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


def _print_json(content: Any) -> None:
    sys.stdout.write(json_module.dumps(content, indent=2, allow_nan=False) + "\n")


def show_report(report: "Report", folder: Path, json: bool) -> None:
    """The table of results, what to beware of, and where the files are."""
    if json:
        _print_json(report.model_dump(mode="json"))
        return
    out.print(results_table(report))
    for warning in report.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}")
    for result in report.results:
        for gate in result.gates:
            if not gate.passed:
                out.print(f"[red]gate failed[/red] {escape(result.subject)}: {gate.gate}: {escape(gate.reason)}")
    seconds = f"{report.convert_seconds:.0f} s, peak memory {report.peak_rss_mib:.0f} MiB"
    out.print(f"\n{seconds}. Look at [bold]{escape(str(folder / 'report.html'))}[/bold]")


def results_table(report: "Report") -> Table:
    """One row per artifact; 80 columns are enough."""
    title = f"{escape(report.model.name)}: {report.model.parameters:,} parameters"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("artifact", overflow="fold")
    labelled = any(r.accuracy for r in report.results)
    for name in ("drift", "top-1 %" if labelled else "same top-1", "size", "speed", "int8 ops"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        table.add_row(*_row(result, labelled))
    return table


def _row(result: "Result", labelled: bool) -> list[str]:
    stage = result.drift.artifact
    drift = "exact" if stage.exact else f"{stage.sqnr_db:.1f} dB" if stage.sqnr_db is not None else "[red]none[/red]"
    same = "-" if stage.top1_agreement is None else f"{stage.top1_agreement:.2%}"
    if labelled:
        found = result.accuracy
        same = "-" if found is None else f"{100 * found.float_:.2f} → {100 * found.artifact:.2f}"
    placement = f"{result.placement.int8_ops} of {result.placement.int8_ops + result.placement.float_ops}"
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
    """Two sizes in the unit that suits the larger one."""
    unit, name = (2**20, "MiB") if before >= 10 * 2**20 else (2**10, "KiB")
    return f"{before / unit:.0f} → {after / unit:.0f} {name}"


def _speed(result: "Result") -> str:
    latency = result.latency
    if latency is None or latency.speedup is None:
        return "[dim]not here[/dim]"
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
        _print_json({"passed": passed, "gates": [g.model_dump(mode="json") for g in gates]})
        return passed
    table = Table()
    for name in ("", "artifact", "gate"):
        table.add_column(name, overflow="fold")
    for name in ("limit", "value"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for g in gates:
        mark = "[green]pass[/green]" if g.passed else "[bold red]FAIL[/bold red]"
        value = "-" if g.value is None else f"{g.value:.5g}"
        table.add_row(mark, escape(g.subject.replace("/", "\n")), g.gate, f"{g.limit:.5g}", value, escape(g.reason))
    out.print(table)
    failed = sum(not g.passed for g in gates)
    out.print(
        f"[bold red]{failed} of {len(gates)} gates failed[/bold red]" if failed else f"all {len(gates)} gates passed"
    )
    return passed


def show_bench(found: "BenchResult", artifact: Path, json: bool) -> None:
    """The latency of one artifact beside its float twin."""
    if json:
        _print_json(found.model_dump(mode="json"))
        return
    out.print(f"[bold]{escape(str(artifact))}[/bold] on {escape(found.executor)}, input: {escape(found.inputs)}")
    latency = found.latency
    if latency is None:
        out.print(escape(found.note or ""))
        return
    table = Table()
    for name in ("", "p50 ms", "p90 ms", "p99 ms", "variation", "runs"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "artifact",
        f"{latency.p50_ms:.3f}",
        f"{latency.p90_ms:.3f}",
        f"{latency.p99_ms:.3f}",
        f"{latency.cv:.1%}",
        str(latency.runs),
    )
    if latency.float_p50_ms is not None and latency.float_p90_ms is not None and latency.float_p99_ms is not None:
        table.add_row(
            "float",
            f"{latency.float_p50_ms:.3f}",
            f"{latency.float_p90_ms:.3f}",
            f"{latency.float_p99_ms:.3f}",
            f"{latency.float_cv:.1%}",
            str(latency.float_runs),
        )
    out.print(table)
    if latency.speedup is not None and latency.ratio_interval is not None:
        low, high = latency.ratio_interval
        verdict = "[red]slower than float[/red]" if latency.speedup < 1 else "faster than float"
        out.print(f"{verdict}: {latency.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f})")
    out.print(f"[dim]{escape(latency.cpu)}, {latency.threads} thread(s)[/dim]")
    for warning in latency.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}")


def show_inspection(found: "list[Inspection]", json: bool) -> None:
    """Operators, layers and what the device makes of them."""
    from convert.inspection_view import render

    if json:
        content = [i.model_dump(mode="json") for i in found]
        _print_json(content[0] if len(content) == 1 else content)
        return
    for inspection in found:
        render(inspection, out)


def show_devices(json: bool) -> None:
    """All devices, one line each."""
    from device_profiles import names, title

    if json:
        _print_json([{"name": n, "title": title(n)} for n in names()])
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names():
        table.add_row(f"[bold]{name}[/bold]", escape(title(name)))
    out.print(table)
    out.print("\n[dim]One in full: tightfit devices NAME. Your own: --device ./my-board.toml[/dim]")


def show_device(name: str, json: bool) -> None:
    """One device: facts with sources, and its rules for every target."""
    from convert.errors import user_errors
    from device_profiles import load

    with user_errors():
        profile = load(name)
    if json:
        content = profile.model_dump(mode="json")
        content["rules"] = {t: profile.rules(t).model_dump(mode="json") for t in ("coreml", "onnx", "tflite")}
        _print_json(content)
        return
    out.print(
        Panel(
            f"{escape(profile.summary)}\nDefault target: [bold]{profile.default_target}[/bold]",
            title=escape(profile.title),
        )
    )
    facts = Table("fact", "value", "source", box=None, padding=(0, 2, 0, 0))
    values = profile.model_dump(mode="json")
    for field in profile.facts():
        value: Any = values
        for part in field.split("."):
            value = value[part]
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if not field.startswith("targets."):
            facts.add_row(field, escape(shown), f"[dim]{escape(profile.source(field) or '')}[/dim]")
    out.print(facts)
    rules = Table(
        "target", "runtime", "network", "auto picks", "why", title="What auto does here", title_justify="left"
    )
    for target in sorted({"coreml", "onnx", "tflite"}):
        r = profile.rules(target)
        for sort in ("cnn", "transformer", "other"):
            rules.add_row(
                target if sort == "cnn" else "",
                r.runtime if sort == "cnn" else "",
                sort,
                getattr(r.recipe, sort),
                escape(getattr(r.recipe_reason, sort)),
            )
    out.print(rules)


def first_line(package: str, name: str) -> str:
    """The first line of a module's docstring, read from its file: nothing is imported."""
    import ast
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / f"{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _listed(package: str) -> list[str]:
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_") and p.stem != "errors")


def show_steps(json: bool) -> None:
    """Steps and recipes."""
    import tomllib

    from convert.recipes import FOLDER

    steps = {name: first_line("calibrate.steps", name) for name in _listed("calibrate.steps")}
    recipes = {p.stem: tomllib.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.toml"))}
    if json:
        _print_json({"steps": steps, "recipes": recipes})
        return
    table = Table("step", "what it does", title="Steps", title_justify="left")
    for name, text in steps.items():
        table.add_row(name, escape(text))
    out.print(table)
    table = Table("recipe", "steps", "what comes out", title="Recipes", title_justify="left")
    table.add_row(
        "auto", "", "the device's profile picks one of these by the kind of network; see tightfit devices NAME"
    )
    for name, recipe in recipes.items():
        table.add_row(name, ", ".join(recipe["steps"]), escape(recipe["summary"]))
    out.print(table)


def show_targets(json: bool) -> None:
    """Targets, and whether they can be used here."""
    from targets import find, names

    rows = [{"name": n, "summary": first_line("targets", n), "missing": find(n).missing()} for n in names()]
    if json:
        _print_json(rows)
        return
    table = Table("target", "what it is", "state")
    for row in rows:
        state = (
            "[green]ready[/green]"
            if row["missing"] is None
            else f"[yellow]missing:[/yellow] {escape(str(row['missing']))}"
        )
        table.add_row(row["name"], escape(str(row["summary"])), state)
    out.print(table)


def show_doctor(json: bool) -> bool:
    """What is installed; True when everything the core needs is there."""
    from convert.doctor import diagnose

    found = diagnose()
    fine = all(f.state == "ok" for f in found if f.kind == "core")
    if json:
        _print_json({"ok": fine, "findings": [f.model_dump(mode="json") for f in found]})
        return fine
    table = Table("", "what", "version", "note")
    marks = {"ok": "[green]ok[/green]", "missing": "[yellow]missing[/yellow]", "unsuitable": "[red]unsuitable[/red]"}
    for f in found:
        table.add_row(
            marks[f.state], escape(f.name), f.version or "-", escape(" ".join(filter(None, (f.note, f.command))))
        )
    out.print(table)
    return fine


def show_demo(reports: "dict[str, Report]", folder: Path, json: bool) -> None:
    """The tables of the demo's models."""
    if json:
        _print_json({name: r.model_dump(mode="json") for name, r in reports.items()})
        return
    for name, report in reports.items():
        out.print(results_table(report))
        for warning in report.warnings:
            out.print(f"[yellow]![/yellow] {escape(warning)}")
        out.print(f"Look at [bold]{escape(str(folder / name / 'report.html'))}[/bold]\n")
