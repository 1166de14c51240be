"""One artifact at an address: its outputs against float and against this machine, its instructions or its times."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrate.samples import Batch
from convert.drift import Drift
from convert.errors import TightfitError, user_errors
from convert.gates import Budget, evaluate
from convert.latency import summary
from convert.options import Run
from convert.progress import Progress
from convert.report.measures import Latency, Stage
from convert.report.runs import BoardState, DeviceRun, HostAgreement, Instructions, SustainedPoint
from convert.report.schema import Result
from targets.errands import Answer, Errand, Timing, carry_out
from targets.errands.pack import CARRIED, SOURCES, can_be_carried, can_compile
from targets.errors import TargetError
from targets.transports import Transport, opened

# Emulated float arithmetic takes seconds for 100 million multiplications; so many samples show what kernels do.
EMULATED_SAMPLES = 32
# Counts of one inference repeat to some hundredths of a percent; the median of three is not the one Python disturbed.
COUNTED = 3
QUICK = Timing(min_runs=100)


@dataclass(frozen=True)
class Subject:
    """What is carried: an artifact, its float twin, its inputs [n, ...] and what is known of its outputs [n, ...].

    `expected` are the float model's outputs, `outputs` the artifact's own on this machine. `classifies`: the first
    output is class scores.
    """

    path: Path
    twin: Path | None
    batch: int
    inputs: Batch
    expected: Batch
    outputs: Batch
    classifies: bool


def refuse_unreachable(addresses: Sequence[str], suffixes: Sequence[str]) -> None:
    """Raise TightfitError, or MissingDependency, where nothing can be run at an address now.

    Every address is opened and closed again: a wrong name, a missing emulator, or a board that does not answer is
    found before hours of work, not after. `suffixes` are those of the artifacts: one of them must be carried.
    """
    if not addresses:
        return
    twice = [address for address in addresses if addresses.count(address) > 1]
    if twice:
        raise TightfitError(f"--on {twice[0]} is given twice; leave one out.")
    if not set(suffixes) & set(CARRIED):
        kinds = ", ".join(CARRIED)
        raise TightfitError(f"--on {addresses[0]} has nothing to run: only {kinds} can be run elsewhere.")
    for address in addresses:
        with user_errors(), opened(address) as transport:
            if set(suffixes) & set(CARRIED) == {SOURCES}:
                can_compile(SOURCES, transport.processor)


def run_everywhere(
    addresses: Sequence[str],
    subjects: Mapping[str, Subject],
    *,
    threads: int,
    timing: Timing,
    progress: Progress,
) -> dict[str, list[DeviceRun]]:
    """Run every subject that a device can take at every address, {subject: its runs}.

    What fails there is a run with its failure in words. Raises TightfitError where an address cannot be reached.
    """
    runs: dict[str, list[DeviceRun]] = {name: [] for name in subjects}
    carried = {name: subject for name, subject in subjects.items() if can_be_carried(subject.path)}
    for address in addresses:
        progress.stage(f"on {address}")
        with user_errors(), opened(address) as transport:
            for name, subject in carried.items():
                progress.advance(0, None, name)
                runs[name].append(run_at(transport, subject, threads=threads, timing=timing, progress=progress))
    return runs


def run_at(transport: Transport, subject: Subject, *, threads: int, timing: Timing, progress: Progress) -> DeviceRun:
    """Run one subject on an open transport. An emulated device counts instructions, any other is timed."""
    emulated = transport.emulated
    inputs = _first(subject.inputs, EMULATED_SAMPLES, subject.batch) if emulated else subject.inputs
    errand = Errand(
        artifact=subject.path,
        twin=subject.twin,
        inputs=inputs,
        batch=subject.batch,
        threads=1 if emulated else threads,
        timing=None if emulated else timing,
        count=COUNTED if transport.counts else 0,
    )

    def advance(what: str, done: int | None, total: int | None) -> None:
        progress.advance(done or 0, total, what)

    try:
        answer = carry_out(transport, errand, advance)
        return _run_of(transport, subject, answer, threads)
    except TargetError as error:
        return DeviceRun(
            on=transport.address, emulated=emulated, failure=str(error), latency_note="it did not run", facts={}
        )


def with_runs(result: Result, runs: Sequence[DeviceRun]) -> Result:
    """The result with what devices showed: stages of the waterfall, runs, and the instructions that stand for it."""
    if not runs:
        return result
    stages = [s for s in result.drift.stages if s.on is None] + [r.drift for r in runs if r.drift is not None]
    counted = [r.instructions for r in runs if r.instructions is not None]
    own = [found for found in counted if found.where == f"emulated:{result.device}"]
    return result.model_copy(
        update={
            "drift": result.drift.model_copy(update={"stages": tuple(stages)}),
            "runs": tuple(runs),
            "instructions": next(iter(own or counted), None),
        }
    )


def on_devices(run: Run, results: Sequence[Result]) -> list[Result]:
    """The results of a conversion with their runs at every address that was asked for."""
    options = run.options
    if not options.on:
        return list(results)
    subjects = {
        result.subject: Subject(
            path=run.folder / result.artifact,
            twin=_twin(run.folder, result),
            batch=run.batch,
            inputs=run.reference.get("input"),
            expected=run.reference.get("float"),
            outputs=run.reference.get(f"artifact/{result.subject}"),
            classifies=result.drift.artifact.top1_agreement is not None,
        )
        for result in results
    }
    timing = QUICK if options.quick else Timing()
    runs = run_everywhere(options.on, subjects, threads=options.threads, timing=timing, progress=run.progress)
    return [with_runs(result, runs[result.subject]) for result in results]


def left_here(results: Sequence[Result], addresses: Sequence[str]) -> list[str]:
    """One sentence for each result that could not be run at the addresses asked for."""
    where = " and ".join(addresses)
    return [
        f"{r.subject}: not run at {where}: {Path(r.artifact).name} cannot be run elsewhere, only {', '.join(CARRIED)}."
        for r in results
        if addresses and not can_be_carried(r.artifact)
    ]


def judged(results: Sequence[Result], budget: Budget) -> list[Result]:
    """The results with the verdicts of `budget` on them, on what they did elsewhere too."""
    return [result.model_copy(update={"gates": tuple(evaluate(result, budget))}) for result in results]


def _twin(folder: Path, result: Result) -> Path:
    artifact = folder / result.artifact
    return artifact.parent / "float" / artifact.name


def _first(inputs: Batch, count: int, batch: int) -> Batch:
    whole = max(batch, count // batch * batch)
    return {name: array[:whole] for name, array in inputs.items()}


def _run_of(transport: Transport, subject: Subject, answer: Answer, threads: int) -> DeviceRun:
    count = len(next(iter(answer.artifact.outputs.values())))
    expected = {name: subject.expected[name][:count] for name in subject.expected}
    _demand_outputs(expected, answer.artifact.outputs)
    drift = Drift(subject.classifies)
    drift.add(expected, answer.artifact.outputs)
    latency, note = _latency(transport, answer, threads)
    counts, counts_note = _instructions(transport, answer)
    machine = answer.facts.get("machine", "")
    return DeviceRun(
        on=transport.address,
        machine=machine,
        emulated=transport.emulated,
        executor=answer.artifact.executor,
        samples=count,
        drift=Stage(
            stage=f"on {transport.address}",
            sqnr_db=drift.sqnr_db,
            cosine=drift.cosine if np.isfinite(drift.cosine) else None,
            max_abs=drift.max_abs if np.isfinite(drift.max_abs) else None,
            top1_agreement=drift.top1_agreement,
            on=transport.address,
            samples=count,
        ),
        host=_agreement({n: a[:count] for n, a in subject.outputs.items()}, answer.artifact.outputs),
        latency=latency,
        latency_note=note,
        void=answer.void,
        sustained=tuple(SustainedPoint.model_validate(point) for point in answer.sustained),
        energy_mj=answer.energy_mj,
        peak_rss_mib=answer.peak_rss_mib,
        instructions=counts,
        instructions_note=counts_note,
        board=tuple(BoardState.model_validate(state) for state in answer.board),
        facts={**transport.facts(), **answer.facts},
        warnings=answer.warnings,
    )


def _demand_outputs(expected: Batch, outputs: Batch) -> None:
    for name, array in expected.items():
        if name not in outputs or outputs[name].shape != array.shape:
            found = outputs[name].shape if name in outputs else "missing"
            raise TargetError(f"the output '{name}' came back as {found}, and should have the shape {array.shape}.")


def _agreement(host: Batch, there: Batch) -> HostAgreement | None:
    if not host:
        return None
    drift = Drift(False)
    drift.add(host, there)
    finite = np.isfinite(drift.max_abs)
    equal = all(np.array_equal(host[name], there[name]) for name in host)
    return HostAgreement(
        exact=equal, share_equal=drift.share_equal if finite else 0.0, max_abs=drift.max_abs if finite else None
    )


def _latency(transport: Transport, answer: Answer, threads: int) -> tuple[Latency | None, str | None]:
    if transport.emulated:
        return None, "emulated: its time says nothing about the device"
    if answer.void:
        return None, f"void: {answer.void}"
    if not answer.artifact.blocks:
        return None, "the device did not time it"
    before = next((state for state in answer.board if state.get("moment") == "before"), {})
    latency = summary(
        answer.artifact.blocks,
        answer.twin.blocks if answer.twin and answer.twin.blocks else None,
        threads=threads,
        where=transport.address,
        cpu=answer.facts.get("machine") or answer.facts.get("cpu", "unknown"),
        governor=before.get("governor"),
        load_ms=answer.artifact.load_ms,
        first_ms=answer.artifact.first_ms,
        others=answer.others,
    )
    return latency, None


def _instructions(transport: Transport, answer: Answer) -> tuple[Instructions | None, str | None]:
    if not answer.artifact.counts:
        built = transport.address.startswith("emulated:")
        why = "no compiler was there when the emulator was built" if built else "only an emulator reached here counts"
        return None, f"not counted: {why}"
    middle = _medians(answer.artifact.counts)
    totals = [count["all"] for count in answer.artifact.counts]
    twin = answer.twin
    return (
        Instructions.model_validate(
            {
                **middle,
                "where": transport.address,
                "inferences": len(totals),
                "spread": (max(totals) - min(totals)) / middle["all"],
                "float_all": _medians(twin.counts)["all"] if twin and twin.counts else None,
            }
        ),
        None,
    )


def _medians(counts: list[dict[str, int]]) -> dict[str, int]:
    """The median of each class that the report knows, over inferences."""
    known = [name for name in counts[0] if name in Instructions.model_fields]
    return {name: int(statistics.median_low(count[name] for count in counts)) for name in known}
