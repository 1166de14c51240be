"""The main job: one model, some samples, some devices -> a folder of checked artifacts and the report on them."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import targets
from calibrate.samples import CalibrationSet, InputSpec
from convert import host, output
from convert.capture import Captured, capture
from convert.compress import Compressed, compress
from convert.data import hold_out, open_data, peek, synthetic_data
from convert.errors import MissingDependency, TightfitError, user_errors
from convert.evaluation import Judged, judge
from convert.gates import Budget, evaluate
from convert.latency import measure
from convert.out_folder import written_whole
from convert.planning import Decision, decide
from convert.progress import Progress, Silent
from convert.refusals import label_notes, refuse_contradictions, refuse_too_few
from convert.report import schema
from convert.report.views import write_views
from convert.results import accuracy_of, drift_of, match_of, reason_of
from convert.warnings_of import warnings_of
from device_profiles import DeviceProfile, load

SYNTHETIC_SAMPLES = 64
EVALUATION_SHARE = 0.2


@dataclass(frozen=True)
class Options:
    """Everything `tightfit convert` was asked; see its --help for the meaning."""

    model: str
    devices: tuple[str, ...]
    out: Path
    calibration: str | None = None
    evaluation: str | None = None
    labels: str | None = None
    targets: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # (device, target), instead of every device with every target
    recipe: str = "auto"
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    preprocessing: Path | None = None
    samples: int | None = None
    batch: int | None = None
    threads: int = 1
    seed: int = 0
    synthetic: bool = False
    python: Path | None = None
    search_path: Path | None = None  # where a module:function may be found besides PYTHONPATH
    force: bool = False
    name: str | None = None
    budget: Budget = field(default_factory=Budget)
    command: str = "tightfit convert"


@dataclass(frozen=True)
class Samples:
    """Calibration and evaluation samples, disjoint, and where the latter come from."""

    calibration: CalibrationSet
    evaluation: CalibrationSet
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What the conversions of one command share."""

    options: Options
    captured: Captured
    samples: Samples
    folder: Path
    twins: Path
    reference: output.Reference
    progress: Progress
    batch: int
    reference_samples: int


def convert(options: Options, progress: Progress | None = None) -> schema.Report:
    """Run the whole job and write `options.out`. Raises TightfitError; leaves nothing behind when it does."""
    progress = progress or Silent()
    started = time.perf_counter()
    pairs = _pairs(options)
    refuse_contradictions(options)
    _refuse_missing(sorted({t for _, t in pairs}))
    import torch

    torch.set_num_threads(options.threads)
    with written_whole(options.out, options.force) as folder:
        work = folder / ".work"
        work.mkdir()
        run = _prepare(options, folder, work, progress)
        results = []
        for number, (profile, target) in enumerate(pairs, 1):
            progress.stage(f"{profile.name} / {target} ({number} of {len(pairs)})")
            with user_errors(f"{options.model} for {profile.name} ({target})"):
                results.append(_one(run, profile, target, first=number == 1))
        run.reference.write(folder / "reference.npz")
        shutil.rmtree(work)
        report = _report(run, results, time.perf_counter() - started)
        write_views(report, folder)
    return report


def _profile(name: str) -> DeviceProfile:
    with user_errors():
        return load(name)


def _pairs(options: Options) -> list[tuple[DeviceProfile, str]]:
    if options.pairs:
        return [(_profile(device), target) for device, target in options.pairs]
    profiles = [_profile(name) for name in dict.fromkeys(options.devices)]
    return [(p, t) for p in profiles for t in _targets(p, options)]


def _targets(profile: DeviceProfile, options: Options) -> tuple[str, ...]:
    with user_errors():
        for name in options.targets:
            targets.find(name)
    return tuple(dict.fromkeys(options.targets)) or (profile.default_target,)


def _refuse_missing(names: Sequence[str]) -> None:
    for name in names:
        with user_errors():
            command = targets.find(name).missing()
        if command:
            raise MissingDependency(f"the {name} target needs packages that are not installed. Install them: {command}")


def _prepare(options: Options, folder: Path, work: Path, progress: Progress) -> Run:
    progress.stage("capture")
    examples = None
    if options.calibration is not None:
        examples = peek(
            options.calibration,
            labels=None if options.evaluation else options.labels,
            python=options.python,
            work=work,
            preprocessing=options.preprocessing,
        )
    with user_errors():
        captured = capture(
            options.model,
            weights=options.weights,
            inputs=options.inputs,
            examples=examples,
            python=options.python,
            work=work,
            search_path=options.search_path,
        )
    if options.name:
        captured = replace(captured, name=options.name)
    samples = _samples(options, captured, work)
    batch = _batch(options, captured)
    refuse_too_few(captured, samples.calibration, samples.evaluation, batch)
    unused = label_notes(captured, samples.evaluation, batch, asked=options.labels is not None)
    samples = replace(samples, notes=(*samples.notes, *unused))
    sample_bytes = sum(math.prod(i.sample_shape) * 8 for i in captured.inputs)
    return Run(
        options=options,
        captured=captured,
        samples=samples,
        folder=folder,
        twins=work / "float",
        reference=output.Reference.empty(),
        progress=progress,
        batch=batch,
        reference_samples=output.reference_count(sample_bytes, len(samples.evaluation), batch),
    )


def _samples(options: Options, captured: Captured, work: Path) -> Samples:
    if options.synthetic:
        data = synthetic_data(captured.inputs, samples=options.samples or SYNTHETIC_SAMPLES, seed=options.seed)
        calibration, evaluation = hold_out(data, EVALUATION_SHARE, seed=options.seed)
        return Samples(calibration, evaluation, "random numbers", data.notes)
    assert options.calibration is not None
    keywords = {"python": options.python, "work": work, "preprocessing": options.preprocessing}
    if options.evaluation is None:
        data = open_data(
            options.calibration,
            captured.inputs,
            labels=options.labels,
            limit=options.samples,
            **keywords,  # type: ignore[arg-type]
        )
        calibration, evaluation = hold_out(data, EVALUATION_SHARE, seed=options.seed)
        return Samples(calibration, evaluation, "a fifth of the calibration data, set aside", data.notes)
    data = open_data(options.calibration, captured.inputs, limit=options.samples, **keywords)  # type: ignore[arg-type]
    held = open_data(options.evaluation, captured.inputs, labels=options.labels, **keywords)  # type: ignore[arg-type]
    notes = list(dict.fromkeys((*data.notes, *held.notes)))
    if data.fingerprint == held.fingerprint:
        notes.append("evaluation and calibration samples are the same: drift on them flatters the result")
    # The name alone: a report that is passed on tells nothing about folders, and two runs make the same one.
    return Samples(data, held, Path(options.evaluation).name, tuple(notes))


def _batch(options: Options, captured: Captured) -> int:
    dynamic = all(i.dynamic_batch for i in captured.inputs)
    fixed = captured.inputs[0].shape[0]
    if dynamic:
        return options.batch or 1
    if options.batch not in (None, fixed):
        raise TightfitError(
            f"the model was captured with a fixed batch of {fixed}, so --batch {options.batch} can't be made. "
            f"Leave --batch out, or export the model with a dynamic batch axis."
        )
    return fixed


def _one(run: Run, profile: DeviceProfile, target_name: str, first: bool) -> schema.Result:
    """Compress, lower, run, compare and time one artifact."""
    options, captured, progress = run.options, run.captured, run.progress
    target = targets.find(target_name)
    decision = decide(captured.graph, profile, target_name, options.recipe)
    progress.advance(0, None, "calibrate")
    made = compress(captured, decision, run.samples.calibration, lambda what, done: progress.advance(done, None, what))
    home = run.folder / profile.name
    home.mkdir(exist_ok=True)
    path = home / f"{captured.name}{target.suffix}"
    job = _job(run, decision, made)
    progress.advance(0, None, "lower")
    target.lower(job, path)
    twin = _twin(run, target, job, decision)
    kept_twin = home / "float" / path.name
    _copy(twin, kept_twin)
    placement = target.placement(path, job)
    session = target.open(path, threads=options.threads)
    judged = _judged(run, made, session, profile, target_name, first)
    latency, note = _latency(run, target, session, kept_twin)
    result = _result(
        run, profile, target_name, path, kept_twin, made, placement, session.executor, judged, latency, note
    )
    result = result.model_copy(update={"gates": tuple(evaluate(result, options.budget))})
    _manifest(run, home, result, path, kept_twin)
    return result


def _job(run: Run, decision: Decision, made: Compressed) -> targets.Job:
    inputs = tuple(InputSpec(i.name, (run.batch, *i.sample_shape), i.dtype, False) for i in run.captured.inputs)
    return targets.Job(
        name=run.captured.name,
        graph=made.graph,
        inputs=inputs,
        outputs=run.captured.outputs,
        rules=decision.rules,
        compute=decision.compute,
    )


def _twin(run: Run, target: targets.Target, job: targets.Job, decision: Decision) -> Path:
    """The float32 artifact of the same target, lowered once for all devices whose rules agree."""
    rules = decision.rules
    folder = run.twins / f"{rules.target}-{rules.opset}-{rules.deployment_target}-{rules.runtime}"
    path = folder / f"{run.captured.name}{target.suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run.progress.advance(0, None, "lower float twin")
        target.lower(replace(job, graph=run.captured.graph, compute="float32"), path)
    return path


def _copy(source: Path, destination: Path) -> None:
    """Copy a file or a folder. Not by copytree, whose error hides why a file could not be written."""
    destination.parent.mkdir(exist_ok=True)
    if source.is_dir():
        destination.mkdir()
        for inner in sorted(source.iterdir()):
            _copy(inner, destination / inner.name)
    else:
        shutil.copyfile(source, destination)


def _judged(
    run: Run, made: Compressed, session: targets.Session, profile: DeviceProfile, target_name: str, first: bool
) -> Judged:
    total = len(run.samples.evaluation)
    kept: dict[str, int] = {}

    def keep(what: str, batch: dict) -> None:
        """Keep the first samples: inputs and float outputs once, every artifact's own outputs."""
        if what != "artifact" and not first:
            return
        room = run.reference_samples - kept.get(what, 0)
        count = min(room, len(next(iter(batch.values()))))
        if count > 0:
            prefix = f"artifact/{profile.name}/{target_name}" if what == "artifact" else what
            run.reference.add(prefix, {k: v[:count] for k, v in batch.items()})
            kept[what] = kept.get(what, 0) + count

    return judge(
        run.captured,
        made,
        session,
        run.samples.evaluation,
        run.batch,
        lambda done: run.progress.advance(done, total, "compare"),
        keep,
    )


def _latency(
    run: Run, target: targets.Target, session: targets.Session, twin: Path
) -> tuple[schema.Latency | None, str | None]:
    if not session.measures_latency:
        return None, f"not measured: {session.executor} shows numerics, its time says nothing about the device"
    run.progress.advance(0, None, "time")
    sample = next(iter(run.samples.evaluation.batches(run.batch)))
    count = len(next(iter(sample.values())))
    if count < run.batch:
        return None, f"not measured: fewer than {run.batch} evaluation samples, the artifact's batch"
    float_session = target.open(twin, threads=run.options.threads)
    found = measure(session.bind(sample), float_session.bind(sample), threads=run.options.threads)
    return found, None


def _result(
    run: Run,
    profile: DeviceProfile,
    target: str,
    path: Path,
    twin: Path,
    made: Compressed,
    placement: targets.Placement,
    executor: str,
    judged: Judged,
    latency: schema.Latency | None,
    note: str | None,
) -> schema.Result:
    if latency is not None:
        latency = latency.model_copy(update={"float_artifact": twin.relative_to(run.folder).as_posix()})
    return schema.Result(
        device=profile.name,
        target=target,
        artifact=path.relative_to(run.folder).as_posix(),
        bytes=targets.artifact_bytes(path),
        float_bytes=targets.artifact_bytes(twin),
        recipe=made.decision.recipe,
        recipe_reason=reason_of(made),
        executor=executor,
        drift=drift_of(run.captured, judged),
        match=match_of(made, judged),
        accuracy=accuracy_of(judged),
        latency=latency,
        latency_note=note,
        placement=schema.PlacementFacts(
            int8_ops=placement.int8_ops,
            float_ops=placement.float_ops,
            conversions=placement.conversions,
            fallbacks=tuple(schema.FallbackFact(node=f.node, reason=f.reason) for f in placement.fallbacks),
            kinds=dict(placement.kinds),
        ),
        ledger=tuple(
            schema.LedgerEntry(step=e.step, layer=e.layer, action=e.action, reason=e.reason) for e in made.ledger
        ),
    )


def _manifest(run: Run, home: Path, result: schema.Result, path: Path, twin: Path) -> None:
    """Write or extend OUT/<device>/manifest.json: what each artifact is, its hashes, and how to make it again."""
    place = home / "manifest.json"
    content: dict[str, Any] = {"version": output.MANIFEST_VERSION, "artifacts": {}}
    if place.exists():
        content = output.read_json(place)
    preprocessing = getattr(run.samples.calibration, "preprocessing", None)
    content["artifacts"][result.target] = {
        "file": path.name,
        "sha256": output.file_hashes(path),
        "bytes": result.bytes,
        "float_file": twin.relative_to(home).as_posix(),
        "float_sha256": output.file_hashes(twin),
        "recipe": result.recipe,
        "inputs": [
            {"name": i.name, "shape": [run.batch, *i.sample_shape], "dtype": i.dtype} for i in run.captured.inputs
        ],
        "outputs": list(run.captured.outputs),
        "executor": result.executor,
    }
    content.update(
        device=result.device,
        command=run.options.command,
        seed=run.options.seed,
        versions=host.versions(),
        model={"name": run.captured.name, "fingerprint": run.captured.fingerprint},
        calibration={
            "fingerprint": run.samples.calibration.fingerprint,
            "samples": len(run.samples.calibration),
            "synthetic": run.samples.calibration.synthetic,
            "preprocessing": preprocessing.to_dict() if preprocessing else None,
        },
    )
    output.write_json(content, place)


def _report(run: Run, results: list[schema.Result], seconds: float) -> schema.Report:
    samples, captured = run.samples, run.captured
    report = schema.Report(
        command=run.options.command,
        seed=run.options.seed,
        model=schema.ModelFacts(name=captured.name, parameters=captured.parameters, fingerprint=captured.fingerprint),
        calibration=schema.Calibration(
            samples=len(samples.calibration),
            fingerprint=samples.calibration.fingerprint,
            synthetic=samples.calibration.synthetic,
        ),
        evaluation=schema.Evaluation(
            samples=len(samples.evaluation),
            fingerprint=samples.evaluation.fingerprint,
            source=samples.source,
            labelled=samples.evaluation.labels is not None,
        ),
        environment=schema.Environment(
            python=sys.version.split()[0], packages=host.versions(), os=host.system(), cpu=host.cpu_name()
        ),
        results=tuple(results),
        convert_seconds=seconds,
        peak_rss_mib=peak_rss_mib(),
    )
    return report.model_copy(update={"warnings": tuple(warnings_of(report, (*captured.notes, *samples.notes)))})


def peak_rss_mib() -> float:
    """Peak resident memory of this process and of the largest of its children, MiB."""
    unit = 1024 if sys.platform != "darwin" else 1
    own, children = (resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) * unit / 2**20
