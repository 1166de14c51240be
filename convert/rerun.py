"""Run a recorded artifact again and judge it by its record: four gates that need no budget.

`integrity`: its files are the bytes that were written. `runs`: it loads, runs, and every output is finite.
`reproduces`: its outputs are those it gave when it was made. `record`: they are no farther from the float model's.
"""

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import targets
from calibrate.samples import Batch
from convert.drift import Drift
from convert.errors import MissingDependency, TightfitError, user_errors
from convert.output import file_hashes
from convert.record import Recorded
from convert.report.schema import GateResult, Stage
from targets.errors import MissingRuntime

LOSS_DB = 1.0
# Above this SQNR two float results differ by rounding only, and by how much is the processor's business.
ROUNDING_DB = 90.0
# Spacing of half-precision numbers relative to their size: a value that leaves in float16 is rounded on the way.
HALF_SPACING = 2.0**-10


@dataclass(frozen=True)
class Rerun:
    """An artifact that was run again on its reference samples, or the reason why that failed."""

    outputs: Batch
    failure: str = ""
    session: targets.Session | None = None


def rerun(recorded: Recorded, threads: int) -> Rerun:
    """Load the artifact and run it on the stored inputs, batch by batch.

    Whatever a damaged file makes a runtime raise becomes `failure`. Raises MissingDependency when it is not
    installed, TightfitError for a target that does not exist.
    """
    with user_errors(recorded.result.subject):
        target = targets.find(recorded.result.target)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # ONNX Runtime prints on stdout when a load fails
            session = target.open(recorded.path, threads=threads)
            outputs = in_batches(session, recorded.inputs, recorded.batch)
    except MissingRuntime as error:
        raise MissingDependency(f"{recorded.result.subject}: {error}") from error
    except ImportError as error:
        command = target.missing() or f"pip install {error.name}"
        raise MissingDependency(f"{recorded.result.subject} cannot be run: {error}. Install it: {command}") from error
    except Exception as error:  # runtimes share no base class for what a damaged file does to them
        return Rerun({}, _first_line(error))
    return _examined(recorded, outputs, session)


def artifact_gates(recorded: Recorded, again: Rerun) -> list[GateResult]:
    """The verdicts of the four gates, in the order above."""
    return [integrity(recorded), runs(recorded, again), reproduces(recorded, again), record(recorded, again)]


def integrity(recorded: Recorded) -> GateResult:
    """Counts the files of artifact and float twin that changed, are missing or were added; limit 0."""
    wrong = _changes(recorded.path, recorded.hashes) + _changes(recorded.twin, recorded.twin_hashes)
    reason = "" if not wrong else f"not as written: {', '.join(wrong[:5])}{', ...' * (len(wrong) > 5)}"
    return _verdict(recorded, "integrity", 0, len(wrong), not wrong, reason)


def runs(recorded: Recorded, again: Rerun) -> GateResult:
    """1 when the artifact ran and all it gave is finite, else 0; limit 1."""
    return _verdict(recorded, "runs", 1, float(not again.failure), not again.failure, again.failure)


def reproduces(recorded: Recorded, again: Rerun) -> GateResult:
    """The largest difference between outputs now and then; the limit is the output's step.

    On one machine it is 0. Elsewhere kernels add in another order, and a value between two codes may fall to the
    other one; the rounding of an output that passes through half precision comes on top.
    """
    step = recorded.result.match.output_step or 0.0
    limit = step + HALF_SPACING * _largest_float(recorded.outputs)
    if again.failure:
        return _verdict(recorded, "reproduces", limit, None, False, "not measured: the artifact did not run")
    difference = _drift(recorded.outputs, again.outputs).max_abs
    if not math.isfinite(difference):
        return _verdict(recorded, "reproduces", limit, None, False, "not measured: the stored outputs are not finite")
    passed = difference <= limit
    reason = "the same to the last bit" if difference == 0 else "within one output step of when it was made"
    if not passed:
        reason = f"differs from when it was made by {difference:.6g}; one output step is {step:.6g}"
        reason += _elsewhere(recorded, again)
    return _verdict(recorded, "reproduces", limit, difference, passed, reason)


def record(recorded: Recorded, again: Rerun) -> GateResult:
    """SQNR in dB against the stored float outputs; the limit is what it was on the same samples, less LOSS_DB."""
    before = min(_drift(recorded.expected, recorded.outputs).sqnr_db, ROUNDING_DB)
    if not math.isfinite(before):
        return _verdict(recorded, "record", 0, None, False, "not measured: the stored outputs have no SQNR")
    limit = before - LOSS_DB
    if again.failure:
        return _verdict(recorded, "record", limit, None, False, "not measured: the artifact did not run")
    now = min(_drift(recorded.expected, again.outputs).sqnr_db, ROUNDING_DB)
    passed = now >= limit
    reason = ""
    if not passed:
        reason = f"{now:.1f} dB against float on the reference samples, where it had {before:.1f} dB"
        reason += _elsewhere(recorded, again)
    return _verdict(recorded, "record", limit, now if math.isfinite(now) else None, passed, reason)


def stage(recorded: Recorded, again: Rerun) -> Stage:
    """The drift of the artifact as it ran now, on the reference samples, in place of the report's last stage."""
    old = recorded.result.drift.artifact
    if again.failure:
        return Stage(stage=old.stage, sqnr_db=None, undefined="the artifact did not run", cosine=None, max_abs=None)
    drift = _drift(recorded.expected, again.outputs, classifies=old.top1_agreement is not None)
    return Stage(
        stage=old.stage,
        sqnr_db=drift.sqnr_db,
        cosine=_finite(drift.cosine),
        max_abs=_finite(drift.max_abs),
        top1_agreement=drift.top1_agreement,
    )


def in_batches(session: targets.Session, inputs: Batch, batch: int) -> Batch:
    """Run [samples, ...] in slices of `batch`, of which samples are a multiple; outputs [samples, ...] by name."""
    samples = len(next(iter(inputs.values())))
    parts = [
        session.run({name: array[start : start + batch] for name, array in inputs.items()})
        for start in range(0, samples, batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _examined(recorded: Recorded, outputs: Batch, session: targets.Session) -> Rerun:
    """The run with what is wrong with its outputs: names, shapes, values that are not finite."""
    wrong = []
    for name, then in recorded.outputs.items():
        if name not in outputs:
            wrong.append(f"the output {name} is gone; there are {', '.join(outputs)}")
        elif outputs[name].shape != then.shape:
            wrong.append(f"the output {name} has the shape {outputs[name].shape[1:]}, not {then.shape[1:]}")
        elif not np.isfinite(outputs[name]).all():
            bad = int((~np.isfinite(outputs[name])).sum())
            wrong.append(f"{bad} of {outputs[name].size} values of the output {name} are not finite")
    return Rerun(outputs, "; ".join(wrong), session)


def _changes(path: Path, hashes: dict[str, str]) -> list[str]:
    try:
        found = file_hashes(path) if path.exists() else {}
    except OSError as error:
        raise TightfitError(f"cannot read {error.filename or path}: {error.strerror or error}.") from error
    changes = [f"{name} is missing" for name in hashes if name not in found]
    changes += [f"{name} is new" for name in found if name not in hashes]
    changes += [f"{name} changed" for name in hashes if name in found and found[name] != hashes[name]]
    place = f"{path.parent.name}/" if path.parent.name == "float" else ""
    return [place + change for change in changes]


def _largest_float(outputs: Batch) -> float:
    """The largest finite magnitude among floating-point outputs; 0 without any."""
    floats = [np.abs(v[np.isfinite(v)]) for v in outputs.values() if v.dtype.kind == "f"]
    return max((float(v.max(initial=0.0)) for v in floats), default=0.0)


def _elsewhere(recorded: Recorded, again: Rerun) -> str:
    """What else may explain a difference: another runtime than the one that made the record."""
    now, then = again.session.executor if again.session else "", recorded.result.executor
    return "" if now == then else f"; run by {now}, recorded by {then}"


def _drift(reference: Batch, value: Batch, classifies: bool = False) -> Drift:
    drift = Drift(classifies)
    drift.add(reference, value)
    return drift


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _verdict(recorded: Recorded, gate: str, limit: float, value: float | None, passed: bool, reason: str) -> GateResult:
    subject = recorded.result.subject
    return GateResult(gate=gate, limit=limit, value=value, passed=passed, reason=reason, subject=subject)
