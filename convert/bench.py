"""How long one artifact takes, here or on devices, in turns with its float twin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

import targets
from calibrate.samples import Array, Batch, InputSpec
from convert.drift import classifies
from convert.errors import MissingDependency, TightfitError
from convert.latency import measure
from convert.on_device import Subject, refuse_unreachable, run_everywhere
from convert.progress import Progress
from convert.record import MANIFEST, REFERENCE, ManifestArtifact, first_inputs, read_manifest, samples_of
from convert.report.runs import DeviceRun
from convert.report.schema import Latency
from convert.rerun import in_batches
from targets.errands import Timing
from targets.errors import MissingRuntime

STORED = "the stored reference samples"
RANDOM = "random numbers"
FLOAT_FOLDER = "float"


class BenchResult(BaseModel):
    """What `tightfit bench` found; `latency` is None where this machine's times say nothing, and `note` says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: str
    float_artifact: str | None = Field(description="The float twin timed in turns with it.")
    executor: str = Field(description="What ran it here, with its version.")
    inputs: str = Field(description="What it ran on, in words.")
    latency: Latency | None
    note: str | None = None
    runs: tuple[DeviceRun, ...] = Field(default=(), description="What it did at the addresses asked for.")

    @model_validator(mode="after")
    def _missing_latency_is_explained(self) -> Self:
        if self.latency is None and not self.note:
            raise ValueError("no latency, and no note that says why")
        return self


def bench(
    artifact: Path,
    float_: Path | None,
    timing: Timing,
    *,
    on: Sequence[str] = (),
    threads: int,
    progress: Progress,
) -> BenchResult:
    """Time `artifact`, and in turns with it its float twin, as `timing` says: here, or at the addresses in `on`.

    The twin is `float_`, else what the manifest beside the artifact names, else float/<its name>. Inputs are the
    stored reference samples of the conversion, else random. Raises TightfitError for a file that is missing, damaged
    or of no known format, MissingDependency when its runtime is not installed.
    """
    target = _target(artifact)
    entry = _entry(artifact)
    twin, note = _twin(artifact, float_, entry)
    if timing.sustained_minutes and not on:
        raise TightfitError("--sustained watches a device get warm: give it with --on, --on local for this machine.")
    refuse_unreachable(on, [artifact.suffix])
    progress.stage(f"load {artifact.name}")
    session = _open(target, artifact, threads)
    batch, inputs = _inputs(artifact, entry, session)
    run = _bound(session, batch, artifact)
    if on:
        subject = _subject(artifact, twin, entry, session, batch, threads)
        found = run_everywhere(on, {"": subject}, threads=threads, timing=timing, progress=progress)[""]
        return BenchResult(
            artifact=str(artifact),
            float_artifact=None if twin is None else str(twin),
            executor=session.executor,
            inputs=inputs,
            latency=None,
            note="not timed here, but where --on says",
            runs=tuple(found),
        )
    facts = {"artifact": str(artifact), "executor": session.executor, "inputs": inputs}
    if not session.measures_latency:
        why = f"not measured: {session.executor} shows numerics, its time says nothing about the device"
        return BenchResult.model_validate({**facts, "float_artifact": None, "latency": None, "note": why})
    float_run = None if twin is None else _bound(_open(target, twin, threads), batch, twin)
    progress.stage(f"time {artifact.name}")
    latency = measure(
        run,
        float_run,
        min_runs=timing.min_runs,
        min_seconds=timing.min_seconds,
        threads=threads,
        mind_others=True,
        progress=lambda share: progress.advance(round(share * 100), 100, "%"),
    )
    float_name = None if twin is None else str(twin)
    latency = latency.model_copy(update={"float_artifact": float_name})
    return BenchResult.model_validate({**facts, "float_artifact": float_name, "latency": latency, "note": note})


@dataclass(frozen=True)
class _Entry:
    """What the manifest beside an artifact says about it; `out` is the folder of the conversion."""

    out: Path
    manifest: ManifestArtifact


def _target(artifact: Path) -> targets.Target:
    known = {target.suffix: target for target in map(targets.find, targets.names())}
    if artifact.suffix not in known:
        raise TightfitError(f"{artifact} is no artifact: its name must end in {', '.join(sorted(known))}.")
    if not artifact.exists():
        raise TightfitError(f"there is no {artifact}. `tightfit convert` writes artifacts to OUT/<device>/.")
    return known[artifact.suffix]


def _entry(artifact: Path) -> _Entry | None:
    home = artifact.absolute().parent
    if not (home / MANIFEST).is_file():
        return None
    entries = read_manifest(home.parent, home.name).artifacts.values()
    found = next((entry for entry in entries if entry.file == artifact.name), None)
    return None if found is None else _Entry(home.parent, found)


def _twin(artifact: Path, given: Path | None, entry: _Entry | None) -> tuple[Path | None, str | None]:
    """The float twin, or None and a note that there is none."""
    if given is not None:
        if given.suffix != artifact.suffix:
            raise TightfitError(f"{given} is no float twin of {artifact.name}: both must end in {artifact.suffix}.")
        if not given.exists():
            raise TightfitError(f"there is no {given}. Leave --float out to time {artifact.name} alone.")
        return given, None
    name = entry.manifest.float_file if entry else f"{FLOAT_FOLDER}/{artifact.name}"
    twin = artifact.parent / name
    return (twin, None) if twin.exists() else (None, f"no float twin was timed: there is no {twin}")


def _open(target: targets.Target, path: Path, threads: int) -> targets.Session:
    try:
        return target.open(path, threads=threads)
    except MissingRuntime as error:
        raise MissingDependency(str(error)) from error
    except ImportError as error:
        command = target.missing() or f"pip install {error.name}"
        raise MissingDependency(f"{path.name} cannot be run: {error}. Install it: {command}") from error
    except Exception as error:  # runtimes share no base class for what a damaged file does to them
        raise TightfitError(f"{path} cannot be loaded: {error}. Convert the model again.") from error


def _bound(session: targets.Session, batch: Batch, path: Path) -> Callable[[], object]:
    """A call that runs once; called here for the first time, so that what cannot run is an error and no measurement."""
    try:
        run = session.bind(batch)
        run()
    except Exception as error:  # as above
        raise TightfitError(f"{path} does not run: {error}") from error
    return run


def _subject(
    artifact: Path, twin: Path | None, entry: _Entry | None, session: targets.Session, batch: Batch, threads: int
) -> Subject:
    """What is carried to devices: with the conversion's samples and float outputs where there are any.

    Without them the float twin, run here, says what is right, and where there is none either, the artifact itself.
    """
    size = len(next(iter(batch.values())))
    if entry is not None and (entry.out / REFERENCE).is_file():
        inputs, expected = samples_of(entry.out, entry.manifest)
    else:
        reference = session if twin is None else _open(_target(twin), twin, threads)
        inputs, expected = batch, reference.run(batch)
    outputs = in_batches(session, inputs, size)
    return Subject(artifact, twin, size, inputs, expected, outputs, classifies(expected, None))


def _inputs(artifact: Path, entry: _Entry | None, session: targets.Session) -> tuple[Batch, str]:
    if entry is not None and (entry.out / REFERENCE).is_file():
        return first_inputs(entry.out, entry.manifest), STORED
    try:
        specs = session.inputs
    except Exception as error:  # as above
        raise TightfitError(f"the inputs of {artifact} cannot be made up: {error}") from error
    return random_inputs(specs), RANDOM


def random_inputs(specs: tuple[InputSpec, ...]) -> Batch:
    """One batch for each input [as the artifact takes it]: floats standard normal, integers and bools 0 or 1.

    Integers are often indices, for which any larger number may be out of range. The same specs give the same numbers.
    """
    generator = np.random.default_rng(0)
    return {spec.name: _random(spec, generator) for spec in specs}


def _random(spec: InputSpec, generator: np.random.Generator) -> Array:
    if np.dtype(spec.dtype).kind == "f":
        return generator.standard_normal(spec.shape).astype(spec.dtype)
    return generator.integers(0, 2, spec.shape).astype(spec.dtype)
