"""The main job: one model, some samples, some devices -> a folder of checked artifacts and the report on them."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import targets
from convert import host, output
from convert.artifact import make
from convert.capture import Captured, capture
from convert.compress import Builder
from convert.data import hold_out, open_data, peek, synthetic_data
from convert.embedding_stage import embedded
from convert.errors import MissingDependency, TightfitError, user_errors
from convert.on_device import judged, left_here, on_devices, refuse_unreachable
from convert.options import Options, Run, Samples
from convert.out_folder import written_whole
from convert.progress import Progress, Silent
from convert.refusals import label_notes, refuse_contradictions, refuse_too_few
from convert.report import schema
from convert.report.views import write_views
from convert.warnings_of import warnings_of
from device_profiles import DeviceProfile, load

SYNTHETIC_SAMPLES = 64
EVALUATION_SHARE = 0.2


def convert(options: Options, progress: Progress | None = None) -> schema.Report:
    """Run the whole job and write `options.out`. Raises TightfitError; leaves nothing behind when it does."""
    progress = progress or Silent()
    started = time.perf_counter()
    pairs = _pairs(options)
    refuse_contradictions(options)
    _refuse_missing(sorted({t for _, t in pairs}))
    refuse_unreachable(options.on, [targets.find(t).suffix for _, t in pairs])
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
                results.append(make(run, profile, target, first=number == 1))
        results = judged(on_devices(run, results), options.budget)
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

    def tell(what: str, done: int, total: int | None = None) -> None:
        progress.advance(done, total, what)

    coded = embedded(captured, options.recipe, samples.calibration, tell, options.seed)
    captured = coded.captured if coded else captured
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
        builder=Builder(
            captured,
            samples.calibration,
            tell,
            options.effort,
            options.seed,
            batch,
        ),
        embedded=coded,
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
    notes = (*left_here(results, run.options.on), *captured.notes, *samples.notes)
    return report.model_copy(update={"warnings": tuple(warnings_of(report, notes))})


def peak_rss_mib() -> float:
    """Peak resident memory of this process and of the largest of its children, MiB."""
    unit = 1024 if sys.platform != "darwin" else 1
    own, children = (resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) * unit / 2**20
