"""Compare a report with an older one: what got worse is a failed gate."""

import math
from dataclasses import dataclass

from .errors import TightfitError
from .report.schema import GateResult, Report, Result

EXACT_DB = 120.0  # differences above this SQNR are float32 rounding; "exact" counts as this much


@dataclass(frozen=True)
class Tolerances:
    """How much worse than the baseline a result may be.

    `sqnr_db` in dB, `accuracy` and `agreement` as shares, `size` as a share of the old bytes, `fallbacks` as a count,
    `instructions` as a share of the old count at the same emulated board.
    """

    sqnr_db: float = 1.0
    accuracy: float = 0.005
    agreement: float = 0.005
    size: float = 0.05
    fallbacks: int = 0
    instructions: float = 0.02

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise TightfitError(f"the tolerance {name} = {value} must be a finite number, not below zero.")


def compare(new: Report, old: Report, *, tolerances: Tolerances | None = None) -> list[GateResult]:
    """Judge each result of `old` by its successor in `new`; a metric or a result that is gone is a failure.

    Raises TightfitError when the two are no comparison: another model by name, or other evaluation samples.
    """
    if new.model.name != old.model.name:
        raise TightfitError(
            f"the baseline is of the model '{old.model.name}', this report of '{new.model.name}': "
            "compare reports of the same model."
        )
    if new.evaluation.fingerprint != old.evaluation.fingerprint:
        raise TightfitError(
            "the baseline was judged on other evaluation samples than this report; drift on different samples is no "
            "comparison. Convert again with the same --evaluation, or make a new baseline."
        )
    allowed = tolerances or Tolerances()
    successors = {r.subject: r for r in new.results}
    verdicts: list[GateResult] = []
    for before in old.results:
        after = successors.get(before.subject)
        verdicts += [_missing(before)] if after is None else _verdicts(after, before, allowed)
    return verdicts


def _missing(before: Result) -> GateResult:
    return GateResult(
        gate="baseline_result",
        limit=1,
        value=0,
        passed=False,
        reason="the baseline has this result, the new report does not",
        subject=before.subject,
    )


def _verdicts(after: Result, before: Result, allowed: Tolerances) -> list[GateResult]:
    """One verdict for every metric that the baseline measured."""
    rows: list[tuple[str, float | None, float | None, float, bool]] = [
        ("sqnr_db", _sqnr(after), _sqnr(before), allowed.sqnr_db, True),
        ("accuracy", _accuracy(after), _accuracy(before), allowed.accuracy, True),
        ("agreement", _agreement(after), _agreement(before), allowed.agreement, True),
        ("bytes", after.bytes, before.bytes, allowed.size * before.bytes, False),
        ("fallbacks", _fallbacks(after), _fallbacks(before), allowed.fallbacks, False),
    ]
    rows += [
        (f"instructions on {where}", _counted(after).get(where), then, allowed.instructions * then, False)
        for where, then in _counted(before).items()
    ]
    return [
        _verdict(f"baseline_{name}", now, then, slack, higher_is_better, after.subject)
        for name, now, then, slack, higher_is_better in rows
        if then is not None
    ]


def _verdict(
    gate: str, now: float | None, then: float, slack: float, higher_is_better: bool, subject: str
) -> GateResult:
    limit = then - slack if higher_is_better else then + slack
    if now is None:
        reason = f"not measured: the baseline has {then:.6g}"
        return GateResult(gate=gate, limit=limit, value=None, passed=False, reason=reason, subject=subject)
    # Shares are differences of floats: 0.9 - 0.005 must not fail 0.895 by rounding.
    rounding = 1e-9 * max(abs(limit), 1.0)
    passed = now >= limit - rounding if higher_is_better else now <= limit + rounding
    reason = "" if passed else f"worse than the baseline: {then:.6g} became {now:.6g}"
    return GateResult(gate=gate, limit=limit, value=now, passed=passed, reason=reason, subject=subject)


def _sqnr(result: Result) -> float | None:
    stage = result.drift.artifact
    if stage.exact:
        return EXACT_DB
    return None if stage.sqnr_db is None else min(stage.sqnr_db, EXACT_DB)


def _accuracy(result: Result) -> float | None:
    return None if result.accuracy is None else result.accuracy.artifact


def _agreement(result: Result) -> float | None:
    return result.drift.artifact.top1_agreement


def _counted(result: Result) -> dict[str, float]:
    """Instructions per inference by the board that they were counted on."""
    counts = [run.instructions for run in result.runs] + [result.instructions]
    return {found.where: float(found.all) for found in counts if found is not None}


def _fallbacks(result: Result) -> float:
    return len(result.placement.fallbacks)
