"""The gate of a build: run the artifacts in OUT again and hold them to their record, a budget and a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import targets
from convert.baseline import compare
from convert.budget import read_budget
from convert.gates import Budget, evaluate
from convert.latency import measure
from convert.progress import Progress
from convert.record import REPORT, Record, Recorded, read_record
from convert.report.schema import GateResult, Latency, Report, Result
from convert.report.store import read_report
from convert.rerun import Rerun, artifact_gates, rerun, stage
from convert.self_test import self_test as inject_faults

TIMED = frozenset({"min_speedup", "max_p50_ms", "max_p90_ms", "max_p99_ms"})
# What only a conversion can measure: it takes the graph, or labelled samples.
AS_RECORDED = frozenset({"max_accuracy_drop", "max_fallbacks", "require_match"})


@dataclass(frozen=True)
class Checked:
    """The verdicts on one artifact, and its result with the size measured now; None when files are missing."""

    gates: tuple[GateResult, ...]
    result: Result | None


def check(
    out: Path, budget: Path | None, baseline: Path | None, *, self_test: bool, threads: int, progress: Progress
) -> list[GateResult]:
    """Every verdict on every artifact in `out`; with `self_test` also on copies with faults in them.

    `budget` is a TOML file, `baseline` an earlier OUT or its report.json. Raises TightfitError when one of them
    cannot be read or used, MissingDependency when a target's runtime is not installed. A damaged artifact raises
    nothing: it fails gates.
    """
    record = read_record(out)
    limits = _limits(budget, record.report.results)
    old = None if baseline is None else read_report(baseline / REPORT if baseline.is_dir() else baseline)
    checked = []
    for number, recorded in enumerate(record.artifacts, 1):
        progress.stage(f"check {recorded.result.subject} ({number} of {len(record.artifacts)})")
        checked.append(_checked(recorded, limits, threads, progress))
    gates = [gate for found in checked for gate in found.gates]
    if old is not None:
        gates += compare(_report_now(record, checked), old)
    if self_test:
        gates += inject_faults(record.artifacts, gates, threads=threads, progress=progress)
    return gates


def _limits(budget: Path | None, results: Sequence[Result]) -> Budget:
    if budget is None:
        return Budget()
    limits = read_budget(budget)
    limits.check_sections(results)
    return limits


def _checked(recorded: Recorded, budget: Budget, threads: int, progress: Progress) -> Checked:
    again = rerun(recorded, threads)
    gates = artifact_gates(recorded, again)
    missing = [p for p in (recorded.path, recorded.twin) if not p.exists() or not targets.artifact_bytes(p)]
    if missing:
        gates += _not_measured(recorded.result, budget, f"{missing[0].name} is missing or empty")
        return Checked(tuple(gates), None)
    now = _result_now(recorded, again, budget, threads, progress)
    verdicts = evaluate(now, budget)
    gates += [_marked(v) for v in verdicts]
    return Checked(tuple(gates), now)


def _not_measured(result: Result, budget: Budget, why: str) -> list[GateResult]:
    reason, subject = f"not measured: {why}", result.subject
    return [
        GateResult(gate=name, limit=limit, value=None, passed=False, reason=reason, subject=subject)
        for name, limit in budget.limits(result.device, result.target).items()
    ]


def _marked(verdict: GateResult) -> GateResult:
    """The verdict with a word on where its value is from, when that is not from now."""
    if verdict.gate not in AS_RECORDED or verdict.value is None:
        return verdict
    note = "as measured by the conversion"
    return verdict.model_copy(update={"reason": f"{verdict.reason} ({note})" if verdict.reason else note})


def _result_now(recorded: Recorded, again: Rerun, budget: Budget, threads: int, progress: Progress) -> Result:
    """The report's result with drift, sizes and latency as they are now."""
    result = recorded.result
    drift = result.drift.model_copy(update={"stages": (*result.drift.stages[:-1], stage(recorded, again))})
    timed = TIMED & budget.limits(result.device, result.target).keys()
    latency, note = _latency(recorded, again, threads, progress) if timed else (None, "no gate asks for it")
    return result.model_copy(
        update={
            "drift": drift,
            "bytes": targets.artifact_bytes(recorded.path),
            "float_bytes": targets.artifact_bytes(recorded.twin),
            "latency": latency,
            "latency_note": note,
        }
    )


def _latency(recorded: Recorded, again: Rerun, threads: int, progress: Progress) -> tuple[Latency | None, str | None]:
    if again.failure or again.session is None:
        return None, "the artifact did not run"
    if not again.session.measures_latency:
        return None, f"{again.session.executor} shows numerics, its time says nothing about the device"
    sample = {name: array[: recorded.batch] for name, array in recorded.inputs.items()}
    try:
        float_run = targets.find(recorded.result.target).open(recorded.twin, threads=threads).bind(sample)
    except Exception as error:  # runtimes share no base class for what a damaged file does to them
        return None, f"the float twin does not run: {error}"
    progress.advance(0, None, "time")
    return measure(again.session.bind(sample), float_run, threads=threads), None


def _report_now(record: Record, checked: Sequence[Checked]) -> Report:
    """The report with sizes as they are now.

    Drift stays as the conversion measured it, on all evaluation samples: the baseline's is too, and the reference
    samples are fewer. That it still holds is what the gates `integrity`, `reproduces` and `record` say.
    """
    results = [
        recorded.result.model_copy(update={"bytes": found.result.bytes})
        for recorded, found in zip(record.artifacts, checked, strict=True)
        if found.result is not None
    ]
    return record.report.model_copy(update={"results": tuple(results)})
