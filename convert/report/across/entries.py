"""Every artifact of every report as an entry: judged, numbered, and with what it did at each place."""

from collections.abc import Sequence

from ...errors import TightfitError
from ...gates import Budget, evaluate
from .. import pictures, run_words, words
from ..runs import DeviceRun
from ..schema import GateResult, Result
from .gather import Given
from .schema import Entry, Judgement, Outcome, Place

MOST_LAYERS = 5
_OUTCOMES: dict[str, Outcome] = {"ran": "ran", "throttled": "throttled", "void": "void", "failed": "failed"}


def entries(given: Sequence[Given], budget: Budget | None) -> list[Entry]:
    """One entry per artifact, held to `budget`, or to the verdicts that its report holds; current ones come first.

    Raises TightfitError where the budget names what no report has, or has a gate that could not fail.
    """
    if budget is not None:
        budget.check_sections(r for one in given for r in one.report.results)
    found = [(one, result) for one in given for result in one.report.results]
    last = {_identity(one, result): index for index, (one, result) in enumerate(found)}
    newest = [last[_identity(one, result)] == index for index, (one, result) in enumerate(found)]
    order = sorted(range(len(found)), key=lambda index: not newest[index])
    return [_entry(number, *found[index], budget, current=newest[index]) for number, index in enumerate(order, start=1)]


def _identity(one: Given, result: Result) -> tuple[str, str, str, str]:
    """What makes two artifacts the same one, made at different times."""
    return one.report.model.name, result.device, result.target, result.recipe


def _entry(number: int, one: Given, result: Result, budget: Budget | None, current: bool) -> Entry:
    if budget is not None:
        try:
            result = result.model_copy(update={"gates": tuple(evaluate(result, budget))})
        except TightfitError as error:
            raise TightfitError(f"{one.folder}: {error}") from error
    reasons = _reasons(result)
    return Entry(
        number=number,
        folder=one.folder,
        model=one.report.model.name,
        device=result.device,
        target=result.target,
        recipe=result.recipe,
        artifact=result.artifact,
        bytes=result.bytes,
        float_bytes=result.float_bytes,
        accuracy=result.accuracy.artifact if result.accuracy else None,
        float_accuracy=result.accuracy.float_ if result.accuracy else None,
        fallbacks=len(result.placement.fallbacks),
        judgement=_judgement(result, reasons),
        reasons=tuple(reasons),
        gates=result.gates,
        current=current,
        places=(_host(result, one.report.environment.cpu), *(_place(run) for run in result.runs)),
        worst_layers=tuple(pictures.by_drift(result.drift)[:MOST_LAYERS]),
        estimate=result.estimate,
    )


def _reasons(result: Result) -> list[str]:
    """Why a result fails, the same reasons that its own report has; none when it does not."""
    found = [f"{_gate_name(gate, result)}: {gate.reason}" for gate in result.gates if not gate.passed]
    if not result.match.within_one_step:
        found.append(f"it differs from its simulation: {result.match.reason}")
    if words.slower(result):
        found.append("slower than float")
    return found


def _gate_name(gate: GateResult, result: Result) -> str:
    elsewhere = gate.subject.removeprefix(result.subject).strip() if gate.subject else ""
    return f"{gate.gate} {elsewhere}".rstrip()


def _judgement(result: Result, reasons: list[str]) -> Judgement:
    """That an artifact ran at an address is no limit that somebody set, so it alone does not meet a budget."""
    if reasons:
        return "fails"
    return "meets" if any(gate.gate != "runs" for gate in result.gates) else "unjudged"


def _host(result: Result, cpu: str) -> Place:
    counted = result.instructions
    own = counted if counted is not None and counted.where not in {run.on for run in result.runs} else None
    return Place(
        where="host",
        machine=cpu,
        emulated=False,
        outcome="ran",
        note=result.latency_note or "",
        executor=result.executor,
        drift=result.drift.artifact,
        latency=result.latency,
        instructions=own,
    )


def _place(run: DeviceRun) -> Place:
    return Place(
        where=run.on,
        machine=run.machine,
        emulated=run.emulated,
        outcome=_OUTCOMES[run_words.outcome(run)],
        note=run.failure or run.void or run_words.throttled(run) or run.latency_note or "",
        executor=run.executor,
        samples=run.samples or None,
        drift=run.drift,
        equal_to_host=run.host.share_equal if run.host else None,
        latency=run.latency,
        instructions=run.instructions,
        energy_mj=run.energy_mj,
        peak_rss_mib=run.peak_rss_mib,
    )
