"""Put known faults into copies of artifacts and demand that the check notices every one."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import convert.rerun as rerunning
from calibrate.samples import Batch
from convert.errors import MissingDependency, TightfitError, user_errors
from convert.progress import Progress
from convert.record import Recorded
from convert.report.schema import GateResult
from targets import faults
from targets.errors import MissingRuntime, TargetError

# Enough samples to see a fault; fewer make it harder to see, never easier.
SAMPLES = 16


@dataclass(frozen=True)
class _Outcome:
    """What became of a fault: what was done (or why it could not be), and the gates that noticed it."""

    text: str
    injected: bool
    tripped: tuple[str, ...] = ()


def self_test(
    artifacts: Sequence[Recorded], gates: Sequence[GateResult], *, threads: int, progress: Progress
) -> list[GateResult]:
    """One verdict `self-test/<fault>` for each artifact and fault: passed when a gate tripped on it.

    The value is how many gates tripped, the limit is 1. Only hashes can notice a flipped bit; for all other faults
    the gate `integrity` is not counted, since it sees any change and would hide that the numbers say nothing. A fault
    for which an artifact has no place is passed without a value, and its reason says so. `gates` are the verdicts on
    the unmodified artifacts: where they failed, tripping proves nothing, and that is the one verdict given.
    """
    verdicts = []
    for number, recorded in enumerate(artifacts, 1):
        progress.stage(f"self-test {recorded.result.subject} ({number} of {len(artifacts)})")
        before = _failed(gates, recorded)
        verdicts += [_useless(recorded, before)] if before else _on_one(recorded, threads, progress)
    return verdicts


def _failed(gates: Sequence[GateResult], recorded: Recorded) -> list[str]:
    """The gates of the check itself that fail without any fault; a budget's or baseline's limits do not matter here."""
    own = {"integrity", "runs", "reproduces", "record"}
    return [g.gate for g in gates if g.subject == recorded.result.subject and g.gate in own and not g.passed]


def _useless(recorded: Recorded, failed: Sequence[str]) -> GateResult:
    reason = f"the unmodified artifact fails {', '.join(failed)} already, so no fault can be told from it"
    return _verdict(recorded, "unmodified", None, False, reason)


def _on_one(recorded: Recorded, threads: int, progress: Progress) -> list[GateResult]:
    fewer = _first(recorded, SAMPLES)
    baseline = _tripped(fewer, threads)
    if baseline:
        return [_useless(recorded, baseline)]
    with user_errors(recorded.result.subject):
        known = faults.find(recorded.result.target)
    verdicts = []
    for done, (name, inject) in enumerate(known.items()):
        progress.advance(done, len(known) + 1, name)
        verdicts.append(_judged(recorded, name, _with_fault(fewer, inject, threads)))
    progress.advance(len(known), len(known) + 1, "shuffled-inputs")
    verdicts.append(_judged(recorded, "shuffled-inputs", _with_shuffled_inputs(fewer, threads)))
    if all(v.value is None for v in verdicts):
        verdicts.append(_verdict(recorded, "any-fault", 0, False, "no fault could be injected: nothing was tested"))
    return verdicts


def _first(recorded: Recorded, samples: int) -> Recorded:
    """The same record with its first samples only, a multiple of the batch."""
    count = max(samples // recorded.batch, 1) * recorded.batch

    def cut(batch: Batch) -> Batch:
        return {name: array[:count] for name, array in batch.items()}

    inputs, expected, outputs = map(cut, (recorded.inputs, recorded.expected, recorded.outputs))
    return replace(recorded, inputs=inputs, expected=expected, outputs=outputs)


def _tripped(recorded: Recorded, threads: int) -> tuple[str, ...]:
    """The gates that fail on something they measured."""
    again = rerunning.rerun(recorded, threads)
    verdicts = rerunning.artifact_gates(recorded, again)
    return tuple(v.gate for v in verdicts if not v.passed and not v.reason.startswith("not measured"))


def _with_fault(recorded: Recorded, inject: faults.Fault, threads: int) -> _Outcome:
    """Copy the artifact, inject the fault, and run the check's own gates on the copy."""
    with tempfile.TemporaryDirectory(prefix="tightfit-self-test-") as folder:
        copy = Path(folder) / recorded.path.name
        _copy(recorded.path, copy)
        try:
            text = inject(copy)
        except MissingRuntime as error:
            raise MissingDependency(f"{recorded.result.subject}: {error}") from error
        except TargetError as error:
            return _Outcome(str(error), injected=False)
        return _Outcome(text, True, _tripped(replace(recorded, path=copy), threads))


def _with_shuffled_inputs(recorded: Recorded, threads: int) -> _Outcome:
    """The unmodified artifact on inputs that are one sample further than the outputs they are compared with."""
    rolled = {name: np.roll(array, 1, 0) for name, array in recorded.inputs.items()}
    if all(np.array_equal(rolled[name], array) for name, array in recorded.inputs.items()):
        return _Outcome("all reference samples are the same", injected=False)
    text = "gave every sample the inputs of the one before"
    return _Outcome(text, True, _tripped(replace(recorded, inputs=rolled), threads))


def _copy(source: Path, destination: Path) -> None:
    try:
        if source.is_dir():
            shutil.copytree(source, destination)
        else:
            shutil.copyfile(source, destination)
    except OSError as error:
        raise TightfitError(
            f"cannot copy {source} for the self-test: {error.strerror or error}. "
            "Free some space in the temporary folder."
        ) from error


def _judged(recorded: Recorded, fault: str, outcome: _Outcome) -> GateResult:
    if not outcome.injected:
        return _verdict(recorded, fault, None, True, f"not injected: {outcome.text}")
    counts = {"integrity"} if fault in faults.SEEN_BY_HASH_ONLY else {"runs", "reproduces", "record"}
    noticed = [gate for gate in outcome.tripped if gate in counts]
    if noticed:
        return _verdict(recorded, fault, len(noticed), True, f"{outcome.text}; noticed by {', '.join(noticed)}")
    return _verdict(recorded, fault, 0, False, f"{outcome.text}; no gate noticed")


def _verdict(recorded: Recorded, fault: str, value: float | None, passed: bool, reason: str) -> GateResult:
    subject = recorded.result.subject
    return GateResult(gate=f"self-test/{fault}", limit=1, value=value, passed=passed, reason=reason, subject=subject)
