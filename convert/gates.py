"""Limits on what was measured, and their verdicts.

A gate whose metric was not measured fails and says so. A gate that could not fail is refused: a limit outside the
range of its metric, or a reference at its floor (a float model that guesses has no accuracy to lose).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from targets.errands.pack import can_be_carried

from .errors import TightfitError
from .report.runs import DeviceRun
from .report.schema import Accuracy, GateResult, Latency, Result

FLOOR_FACTOR = 1.5  # a classifier at or under 1.5 times chance is taken for one that guesses


@dataclass(frozen=True)
class Measured:
    """A metric's value. `judged` is what meets the limit: the pessimistic end where the value is unstable."""

    value: float
    judged: float
    note: str = ""


@dataclass(frozen=True)
class Gate:
    """A named limit. `low` < limit <= `high` is what fits the metric (`low` itself only where `low_fits`)."""

    name: str
    metric: str
    at_least: bool
    low: float
    high: float
    measure: Callable[[Result], Measured | str]
    whole: bool = False
    low_fits: bool = False
    hint: str = ""
    elsewhere: bool = False  # what a run at an address measures there

    def check_limit(self, limit: float) -> float:
        """`limit` itself; raises TightfitError when no value of the metric could ever pass or ever fail it."""
        fits = self.low < limit <= self.high or (self.low_fits and limit == self.low)
        if not fits or (self.whole and limit != int(limit)):
            bracket = "[" if self.low_fits else "("
            kind = "a whole number" if self.whole else "a number"
            hint = f" {self.hint}" if self.hint else ""
            raise TightfitError(
                f"the gate {self.name} = {limit:g} does not fit its metric, {self.metric}: "
                f"give {kind} in {bracket}{self.low:g}, {self.high:g}].{hint}"
            )
        return float(limit)


def _plain(value: float, note: str = "") -> Measured:
    return Measured(value, value, note)


def _sqnr(result: Result) -> Measured | str:
    stage = result.drift.artifact
    if stage.exact:
        return _plain(math.inf, "no difference at all")
    return stage.undefined or _plain(stage.sqnr_db if stage.sqnr_db is not None else math.nan)


def _cosine(result: Result) -> Measured | str:
    cosine = result.drift.artifact.cosine
    return "the cosine is undefined here" if cosine is None else _plain(cosine)


def _agreement(result: Result) -> Measured | str:
    agreement = result.drift.artifact.top1_agreement
    return "not a classifier: no top-1 agreement was measured" if agreement is None else _plain(agreement)


def _accuracy_drop(result: Result) -> Measured | str:
    if result.accuracy is None:
        return "no accuracy was measured: give labels"
    # Shares of whole samples: rounding keeps 0.9195 - 0.9145 from failing a limit of 0.005.
    return _plain(round(result.accuracy.float_ - result.accuracy.artifact, 12))


def _class_drop(result: Result) -> Measured | str:
    if result.accuracy is None:
        return "no accuracy was measured: give labels"
    drops = [
        (round(c.float_ - c.artifact, 12), c)
        for c in result.accuracy.per_class
        if c.float_ is not None and c.artifact is not None
    ]
    if not drops:
        return "the report has no accuracy class by class: convert again"
    drop, worst = max(drops, key=lambda pair: pair[0])
    return _plain(drop, f"class {worst.label}, of {worst.samples} samples")


def _instructions(result: Result) -> Measured | str:
    if result.instructions is None:
        return "no instructions were counted: give --on emulated:raspberry-pi-4b, or another emulated board"
    return _plain(result.instructions.all, f"counted at {result.instructions.where}")


def _latency(result: Result, value: Callable[[Latency], Measured | str]) -> Measured | str:
    if result.latency is None:
        return f"no latency was measured: {result.latency_note}"
    return value(result.latency)


def _speedup(result: Result) -> Measured | str:
    def value(latency: Latency) -> Measured | str:
        if latency.speedup is None or latency.ratio_interval is None:
            return "no float twin was timed"
        if latency.stable:
            return _plain(latency.speedup)
        low = latency.ratio_interval[0]
        return Measured(latency.speedup, low, f"unstable timing: judged by its interval's low end, {low:.2f}x")

    return _latency(result, value)


def _percentile(name: str) -> Callable[[Result], Measured | str]:
    def value(latency: Latency) -> Measured:
        milliseconds: float = getattr(latency, name)
        if latency.stable:
            return _plain(milliseconds)
        return Measured(milliseconds, latency.p99_ms, f"unstable timing: judged by p99, {latency.p99_ms:.4g} ms")

    return lambda result: _latency(result, value)


def _match(result: Result) -> Measured:
    match = result.match
    note = "" if match.within_one_step else f"differs from the simulation by {match.max_abs}: {match.reason}"
    return _plain(float(match.within_one_step), note)


_ACCURACY_HINT = "It is a share: 0.005 is half a percentage point."
_ALL = (
    Gate(
        "min_sqnr_db",
        "the SQNR of the artifact in dB (0 dB: as much noise as signal)",
        True,
        0,
        160,
        _sqnr,
        elsewhere=True,
    ),
    Gate("min_cosine", "the mean cosine with float", True, 0, 1, _cosine, elsewhere=True),
    Gate("min_agreement", "the share of samples with the same top-1", True, 0, 1, _agreement, elsewhere=True),
    Gate(
        "max_accuracy_drop",
        "float accuracy minus the artifact's",
        False,
        0,
        0.25,
        _accuracy_drop,
        low_fits=True,
        hint=_ACCURACY_HINT,
    ),
    Gate(
        "max_class_drop",
        "the largest loss of accuracy in one class",
        False,
        0,
        0.9,
        _class_drop,
        low_fits=True,
        hint="It is a share of the class's samples: 0.05 is five percentage points.",
    ),
    Gate("min_speedup", "float p50 / artifact p50", True, 0, 1000, _speedup, elsewhere=True),
    Gate(
        "max_fallbacks",
        "the number of nodes that do not run as wanted",
        False,
        0,
        1e6,
        lambda r: _plain(len(r.placement.fallbacks)),
        whole=True,
        low_fits=True,
    ),
    Gate("max_bytes", "the artifact's bytes", False, 0, 1e13, lambda r: _plain(r.bytes), whole=True),
    Gate(
        "max_size_ratio",
        "the artifact's bytes / the float twin's",
        False,
        0,
        2,
        lambda r: _plain(r.bytes / r.float_bytes),
    ),
    Gate("max_p50_ms", "the median latency in ms", False, 0, 1e7, _percentile("p50_ms"), elsewhere=True),
    Gate("max_p90_ms", "the 90th percentile of latency in ms", False, 0, 1e7, _percentile("p90_ms"), elsewhere=True),
    Gate("max_p99_ms", "the 99th percentile of latency in ms", False, 0, 1e7, _percentile("p99_ms"), elsewhere=True),
    Gate(
        "max_instructions",
        "instructions per inference, emulated",
        False,
        0,
        1e15,
        _instructions,
        whole=True,
        elsewhere=True,
    ),
    Gate(
        "require_match",
        "whether the artifact computes what the simulation does, within one output step (1: it does)",
        True,
        0,
        1,
        _match,
        whole=True,
    ),
)
GATES: Mapping[str, Gate] = {gate.name: gate for gate in _ALL}

Limits = Mapping[str, float | None]


@dataclass(frozen=True)
class Budget:
    """Limits by gate name: for all results, for a device, for a target on a device. None switches a gate off.

    The closest one counts. `on` holds limits on what is measured at an address, apart from those on this machine.
    Names and limits are checked here: raises TightfitError for an unknown gate or a limit that does not fit.
    """

    gates: Limits = field(default_factory=dict)
    devices: Mapping[str, Limits] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], Limits] = field(default_factory=dict)
    on: Mapping[str, Limits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for limits in (self.gates, *self.devices.values(), *self.targets.values(), *self.on.values()):
            for name, limit in limits.items():
                gate = find(name)
                if limit is not None:
                    gate.check_limit(limit)
        for address, limits in self.on.items():
            for name in limits:
                _refuse_here_only(GATES[name], address)

    def limits(self, device: str, target: str) -> dict[str, float]:
        """The limits that hold for one result, in the order of GATES."""
        merged: dict[str, float | None] = dict(self.gates)
        merged |= self.devices.get(device, {})
        merged |= self.targets.get((device, target), {})
        found = {}
        for name in GATES:
            limit = merged.get(name)
            if limit is not None:
                found[name] = limit
        return found

    def with_limits(self, **limits: float | None) -> "Budget":
        """The same budget with these limits for all results; None means not given (as from a CLI option)."""
        given = {name: limit for name, limit in limits.items() if limit is not None}
        return replace(self, gates={**self.gates, **given})

    def check_sections(self, results: Iterable[Result]) -> None:
        """Raise TightfitError when a device or target named here has no result: its limits would judge nothing."""
        results = list(results)
        there = {(r.device, r.target) for r in results}
        devices = {device for device, _ in there}
        missing = [name for name in self.devices if name not in devices]
        missing += [f"{device}.{target}" for device, target in self.targets if (device, target) not in there]
        if missing:
            have = ", ".join(sorted(f"{device}.{target}" for device, target in there))
            raise TightfitError(
                f"the budget names {', '.join(missing)}, for which there is no result; there are {have}. "
                "Correct the name, convert for it, or take the section out."
            )
        if self.on and not any(can_be_carried(r.artifact) for r in results):
            raise TightfitError(
                f"the budget limits what is measured at {next(iter(self.on))}, where none of these artifacts can be "
                "run; take the section out."
            )


def _refuse_here_only(gate: Gate, address: str) -> None:
    """Raise TightfitError for a limit at an address on what no run there measures: it would judge this machine."""
    if not gate.elsewhere:
        there = ", ".join(g.name for g in GATES.values() if g.elsewhere)
        raise TightfitError(
            f'[on."{address}"] has {gate.name}, which a run at an address does not measure ({gate.metric}); put it '
            f"under [gates]. What is measured there: {there}."
        )


def find(name: str) -> Gate:
    """The gate called `name`; raises TightfitError with the nearest name when there is none."""
    if name in GATES:
        return GATES[name]
    near = difflib.get_close_matches(name, GATES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(GATES)}."
    raise TightfitError(f"there is no gate '{name}'; {hint}")


def evaluate(result: Result, budget: Budget) -> list[GateResult]:
    """Judge `result` by every limit of `budget` that holds for it.

    Raises TightfitError for a gate that cannot fail because its reference is at its floor.
    """
    verdicts = []
    for name, limit in budget.limits(result.device, result.target).items():
        _refuse_floor(name, limit, result)
        verdicts.append(judge(GATES[name], limit, result))
    verdicts += [_ran(result, run) for run in result.runs]
    if can_be_carried(result.artifact):
        for address, limits in budget.on.items():
            verdicts += _verdicts_on(result, address, limits)
    return verdicts


def _ran(result: Result, run: DeviceRun) -> GateResult:
    """Whether the artifact ran at an address at all: asking for a run there is a gate of its own."""
    subject = f"{result.subject} on {run.on}"
    passed = run.failure is None
    return GateResult(
        gate="runs", limit=1, value=float(passed), passed=passed, reason=run.failure or "", subject=subject
    )


def _verdicts_on(result: Result, address: str, limits: Limits) -> list[GateResult]:
    """The limits on what is measured at `address`; where nothing was measured there, all of them fail."""
    run = next((run for run in result.runs if run.on == address), None)
    subject = f"{result.subject} on {address}"
    verdicts = []
    for name in (name for name in GATES if limits.get(name) is not None):
        limit = float(limits[name] or 0.0)
        if run is None or run.failure is not None:
            why = f"it did not run there; give --on {address}" if run is None else "it failed there"
            found = GateResult(gate=name, limit=limit, value=None, passed=False, reason=f"not measured: {why}")
        else:
            _refuse_floor(name, limit, result)
            found = judge(GATES[name], limit, at(result, run))
        verdicts.append(found.model_copy(update={"subject": subject}))
    return verdicts


def at(result: Result, run: DeviceRun) -> Result:
    """The result as if its numbers here were those of `run`: what gates on an address judge."""
    assert run.drift is not None, "a run that failed has no numbers to judge"
    stage = run.drift.model_copy(update={"on": None})
    return result.model_copy(
        update={
            "drift": result.drift.model_copy(update={"stages": (stage,), "first_jump": None}),
            "latency": run.latency,
            "latency_note": run.latency_note,
            "instructions": run.instructions,
        }
    )


def judge(gate: Gate, limit: float, result: Result) -> GateResult:
    """The verdict of one gate on one result."""
    measured = gate.measure(result)
    if isinstance(measured, str):
        reason = f"not measured: {measured}"
        return GateResult(gate=gate.name, limit=limit, value=None, passed=False, reason=reason, subject=result.subject)
    passed = measured.judged >= limit if gate.at_least else measured.judged <= limit
    wanted = "at least" if gate.at_least else "at most"
    missed = "" if passed else f"{measured.value:.10g}, wanted {wanted} {limit:g}"
    reason = "; ".join(part for part in (measured.note, missed) if part)
    value = measured.value if math.isfinite(measured.value) else None
    return GateResult(gate=gate.name, limit=limit, value=value, passed=passed, reason=reason, subject=result.subject)


def _refuse_floor(name: str, limit: float, result: Result) -> None:
    """Raise TightfitError when a model that guesses would pass `limit`."""
    if result.accuracy is None:
        return
    if name == "max_accuracy_drop":
        _refuse_guessing(limit, result.accuracy, result.subject)
    floor = FLOOR_FACTOR / result.accuracy.classes
    if name == "min_agreement" and limit <= floor:
        raise TightfitError(
            f"the gate min_agreement = {limit:g} on {result.subject} cannot fail for a good reason: with "
            f"{result.accuracy.classes} classes a model that guesses comes to {floor:.3g}. Raise the limit."
        )


def _refuse_guessing(limit: float, accuracy: Accuracy, subject: str) -> None:
    chance = 1 / accuracy.classes
    if accuracy.float_ <= FLOOR_FACTOR * chance:
        raise TightfitError(
            f"the gate max_accuracy_drop on {subject} has no reference: the float model is right on "
            f"{accuracy.float_:.1%} of the samples, and guessing among {accuracy.classes} classes on {chance:.1%}. "
            "Check that labels and preprocessing are those the model was trained with."
        )
    if accuracy.float_ - limit <= chance:
        raise TightfitError(
            f"the gate max_accuracy_drop = {limit:g} on {subject} would pass a model that guesses: "
            f"float is right on {accuracy.float_:.1%}, guessing on {chance:.1%}. {_ACCURACY_HINT}"
        )
