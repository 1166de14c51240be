"""The gate of a build: run the artifacts in OUT again and hold them to their record, a budget and a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import targets
from convert.baseline import Tolerances, compare
from convert.budget import read_budget
from convert.errors import TightfitError
from convert.gates import Budget, evaluate
from convert.latency import measure
from convert.on_device import QUICK, Subject, refuse_unreachable, run_everywhere, with_runs
from convert.progress import Progress
from convert.record import REPORT, Record, Recorded, read_record
from convert.report.runs import DeviceRun
from convert.report.schema import GateResult, Latency, Report, Result
from convert.report.store import read_report
from convert.rerun import Rerun, artifact_gates, rerun, stage
from convert.self_test import self_test as inject_faults
from targets.errands import Timing

TIMED = frozenset({"min_speedup", "max_p50_ms", "max_p90_ms", "max_p99_ms"})
# What only a conversion can measure: it takes the graph, or labelled samples.
AS_RECORDED = frozenset({"max_accuracy_drop", "max_class_drop", "max_fallbacks", "require_match"})


@dataclass(frozen=True)
class Checked:
    """The verdicts on one artifact, and its result with the size measured now; None when files are missing."""

    gates: tuple[GateResult, ...]
    result: Result | None


def check(
    out: Path,
    budget: Path | None,
    baseline: Path | None,
    *,
    self_test: bool,
    threads: int,
    progress: Progress,
    on: Sequence[str] = (),
    quick: bool = False,
    max_instructions: int | None = None,
    instruction_regression: float | None = None,
) -> list[GateResult]:
    """Every verdict on every artifact in `out`; with `self_test` also on copies with faults in them.

    `budget` is a TOML file, `baseline` an earlier OUT or its report.json. `on` are addresses where the artifacts run
    again too; `instruction_regression` is the share by which instructions may grow against the baseline. Raises
    TightfitError when one of them cannot be read or used, MissingDependency when a target's runtime is not installed.
    A damaged artifact raises nothing: it fails gates.
    """
    record = read_record(out)
    limits = _limits(budget, record.report.results).with_limits(max_instructions=max_instructions)
    tolerances = _tolerances(instruction_regression, baseline)
    refuse_unreachable(on, [recorded.path.suffix for recorded in record.artifacts])
    old = None if baseline is None else read_report(baseline / REPORT if baseline.is_dir() else baseline)
    runs = _runs(record, on, threads, quick, progress)
    checked = []
    for number, recorded in enumerate(record.artifacts, 1):
        progress.stage(f"check {recorded.result.subject} ({number} of {len(record.artifacts)})")
        checked.append(_checked(recorded, limits, threads, progress, on, runs[recorded.result.subject]))
    gates = [gate for found in checked for gate in found.gates]
    if old is not None:
        gates += compare(_report_now(record, checked), old, tolerances=tolerances)
    if self_test:
        gates += inject_faults(record.artifacts, gates, threads=threads, progress=progress)
    return gates


def _limits(budget: Path | None, results: Sequence[Result]) -> Budget:
    if budget is None:
        return Budget()
    limits = read_budget(budget)
    limits.check_sections(results)
    return limits


def _tolerances(instruction_regression: float | None, baseline: Path | None) -> Tolerances:
    if instruction_regression is None:
        return Tolerances()
    if baseline is None:
        raise TightfitError(
            "--max-instruction-regression compares with an earlier result: give it with --baseline OLD."
        )
    return Tolerances(instructions=instruction_regression)


def _runs(
    record: Record, on: Sequence[str], threads: int, quick: bool, progress: Progress
) -> dict[str, list[DeviceRun]]:
    """What every artifact does elsewhere: at the addresses in `on` now, on other emulated boards as recorded.

    An emulated run repeats, and `integrity` says that the file is the same; times of another day do not count.
    """
    there = [recorded for recorded in record.artifacts if recorded.path.exists() and recorded.twin.exists()]
    subjects = {
        recorded.result.subject: Subject(
            path=recorded.path,
            twin=recorded.twin,
            batch=recorded.batch,
            inputs=recorded.inputs,
            expected=recorded.expected,
            outputs=recorded.outputs,
            classifies=recorded.result.drift.artifact.top1_agreement is not None,
        )
        for recorded in there
    }
    timing = QUICK if quick else Timing()
    now = run_everywhere(on, subjects, threads=threads, timing=timing, progress=progress)
    kept = {r.result.subject: [k for k in r.result.runs if k.emulated and k.on not in on] for r in record.artifacts}
    return {subject: [*now.get(subject, ()), *recorded] for subject, recorded in kept.items()}


def _checked(
    recorded: Recorded, budget: Budget, threads: int, progress: Progress, on: Sequence[str], runs: Sequence[DeviceRun]
) -> Checked:
    again = rerun(recorded, threads)
    gates = artifact_gates(recorded, again)
    missing = [p for p in (recorded.path, recorded.twin) if not p.exists() or not targets.artifact_bytes(p)]
    if missing:
        gates += _not_measured(recorded.result, budget, f"{missing[0].name} is missing or empty")
        return Checked(tuple(gates), None)
    now = _result_now(recorded, again, budget, threads, progress, runs)
    verdicts = evaluate(now, budget)
    gates += [_marked(v, now, on) for v in verdicts]
    return Checked(tuple(gates), now)


def _not_measured(result: Result, budget: Budget, why: str) -> list[GateResult]:
    reason, subject = f"not measured: {why}", result.subject
    return [
        GateResult(gate=name, limit=limit, value=None, passed=False, reason=reason, subject=subject)
        for name, limit in budget.limits(result.device, result.target).items()
    ]


def _marked(verdict: GateResult, result: Result, on: Sequence[str]) -> GateResult:
    """The verdict with a word on where its value is from, when that is not from now."""
    place = verdict.subject.removeprefix(result.subject).removeprefix(" on ")
    if verdict.gate == "max_instructions" and not place and result.instructions is not None:
        place = result.instructions.where
    old = place not in on if place else verdict.gate in AS_RECORDED
    if not old or verdict.value is None:
        return verdict
    note = "as measured by the conversion"
    return verdict.model_copy(update={"reason": f"{verdict.reason} ({note})" if verdict.reason else note})


def _result_now(
    recorded: Recorded, again: Rerun, budget: Budget, threads: int, progress: Progress, runs: Sequence[DeviceRun]
) -> Result:
    """The report's result with drift, sizes, latency and runs elsewhere as they are now."""
    result = recorded.result
    here = [s for s in result.drift.stages if s.on is None]
    drift = result.drift.model_copy(update={"stages": (*here[:-1], stage(recorded, again))})
    timed = TIMED & budget.limits(result.device, result.target).keys()
    latency, note = _latency(recorded, again, threads, progress) if timed else (None, "no gate asks for it")
    result = result.model_copy(update={"runs": (), "instructions": None})
    now = with_runs(result.model_copy(update={"drift": drift}), runs)
    return now.model_copy(
        update={
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
        with_runs(recorded.result, found.result.runs).model_copy(update={"bytes": found.result.bytes})
        for recorded, found in zip(record.artifacts, checked, strict=True)
        if found.result is not None
    ]
    return record.report.model_copy(update={"results": tuple(results)})
