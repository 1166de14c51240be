"""The report as a pull-request comment: a verdict, one table, what failed, what to know."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from . import run_words, words
from .comment import MOST_ROWS, fitting, plain, rest
from .schema import DeviceRun, GateResult, Report, Result

_T = TypeVar("_T")  # type parameters in brackets need Python 3.12


def markdown(report: Report) -> str:
    """The report in GitHub's Markdown, always under COMMENT_LIMIT characters; report.json has what is cut."""
    failed = [gate for r in report.results for gate in r.gates if not gate.passed]
    bad = any(words.result_failed(r) for r in report.results)
    judged = any(r.gates for r in report.results)
    sign = "❌" if bad else "✅" if judged else "➖"
    parts = [f"### {sign} {plain(report.model.name)}: {plain(words.verdict(report))}", ""]
    parts += _results(report.results)
    parts += _runs([(r, run) for r in report.results for run in r.runs])
    parts += _section("Failed gates", failed, _failure)
    parts += _section("Warnings", report.warnings, plain)
    parts += ["", f"{report.convert_seconds:.0f} s, {report.peak_rss_mib:.0f} MiB, {plain(report.environment.cpu)}"]
    return fitting(parts)


def _results(results: Sequence[Result]) -> list[str]:
    head = [
        "| | Device | Target | Recipe | Drift | Accuracy | Size | Speed | int8 / float / fallbacks | Simulation |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    # Failures first: where the table is cut, they are what is left.
    ordered = sorted(results, key=lambda r: not words.result_failed(r))
    return head + [_result_row(r) for r in ordered[:MOST_ROWS]] + rest(len(ordered))


def _result_row(r: Result) -> str:
    sign = "❌" if words.result_failed(r) else "✅" if r.gates else "➖"
    accuracy = "–"
    if r.accuracy is not None:
        accuracy = f"{words.percent(r.accuracy.artifact)} ({words.points(r.accuracy)})"
    facts = r.placement
    cells = [
        sign,
        plain(r.device),
        plain(r.target),
        plain(r.recipe),
        words.sqnr(r.drift.artifact),
        accuracy,
        f"{words.size(r.bytes)} ({r.bytes / r.float_bytes:.2f}){words.memory(r)}",
        words.speed(r.latency),
        f"{facts.int8_ops} / {facts.float_ops} / {len(facts.fallbacks)}",
        words.match(r),
    ]
    return f"| {' | '.join(cells)} |"


def _runs(runs: Sequence[tuple[Result, DeviceRun]]) -> list[str]:
    """What happened elsewhere: one row per artifact and address."""
    if not runs:
        return []
    head = [
        "",
        "**On devices**",
        "",
        "| | Device | Target | Ran at | Against float | As here | p50 | Instructions |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    ordered = sorted(runs, key=lambda pair: run_words.outcome(pair[1]) == "ran")
    return head + [_run_row(*pair) for pair in ordered[:MOST_ROWS]] + rest(len(ordered))


def _run_row(r: Result, run: DeviceRun) -> str:
    if run.failure is not None or run.drift is None:
        cells = [
            "❌",
            plain(r.device),
            plain(r.target),
            plain(run.on),
            f"failed: {plain(run.failure or '')}",
            "",
            "",
            "",
        ]
        return f"| {' | '.join(cells)} |"
    counted = run.instructions
    outcome = run_words.outcome(run)
    here = "–" if run.host is None else "the same bits" if run.host.exact else words.percent(run.host.share_equal)
    time = f"{words.milliseconds(run.latency.p50_ms)} ({words.speed(run.latency)})" if run.latency else "–"
    cells = [
        "✅" if outcome == "ran" else f"❌ {outcome}",
        plain(r.device),
        plain(r.target),
        plain(run.on),
        words.sqnr(run.drift),
        here,
        time if outcome != "void" else "void",
        "–" if counted is None else f"{run_words.count(counted.all)} {run_words.against_float(counted)}".rstrip(),
    ]
    return f"| {' | '.join(cells)} |"


def _failure(gate: GateResult) -> str:
    return f"{plain(gate.subject)} `{gate.gate}`: {plain(gate.reason)}"


def _section(title: str, items: Sequence[_T], line: Callable[[_T], str]) -> list[str]:
    if not items:
        return []
    return ["", f"**{title}**", "", *(f"- {line(item)}" for item in items[:MOST_ROWS]), *rest(len(items))]
