"""One artifact: a plan is applied, lowered, placed, run, compared, timed, and written down."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import targets
from calibrate.packed_codes import KERNEL
from calibrate.samples import InputSpec
from convert import host, mixed, output
from convert.alternatives import alternatives, run_like_device
from convert.automatic import improve
from convert.compress import Compressed
from convert.errors import TightfitError
from convert.estimate import estimate
from convert.evaluation import Judged, judge
from convert.latency import measure
from convert.options import Run
from convert.planning import AUTO_FLOOR_DB, Decision, decide
from convert.refusals import spends_on_tokens
from convert.report import schema
from convert.resident import resident_bytes
from convert.results import accuracy_of, drift_of, match_of, reason_of
from convert.token_picture import token_facts
from convert.token_stage import meets_budget, with_fewer_tokens, within_budget
from device_profiles import DeviceProfile


@dataclass(frozen=True)
class Lowered:
    """One plan's artifact on disk, what it was made from, and its time beside float's.

    `slower`: than float, surely, as far as a time here tells.
    """

    made: Compressed
    job: targets.Job
    session: targets.Session
    twin: Path
    latency: schema.Latency | None
    note: str | None
    slower: bool


def make(run: Run, profile: DeviceProfile, target_name: str, first: bool) -> schema.Result:
    """Compress, lower, run, compare and time one artifact."""
    captured = run.captured
    target = targets.find(target_name)
    home = run.folder / profile.name
    home.mkdir(exist_ok=True)
    path = home / f"{captured.name}{target.suffix}"
    run, lowered = _within(run, profile, target_name, path)
    made, session = lowered.made, lowered.session
    kept_twin = home / "float" / path.name
    _copy(lowered.twin, kept_twin)
    if run.embedded is not None:
        shutil.copyfile(KERNEL, home / KERNEL.name)
    placement = target.placement(path, lowered.job)
    judged = _judged(run, made, session, profile, target_name, first)
    latency, note = lowered.latency, lowered.note
    result = _result(
        run, profile, target_name, path, kept_twin, made, placement, session.executor, judged, latency, note
    )
    result = _with_memory(result, run, path, lowered.twin)
    result = _with_estimate(result, run, lowered.job, placement, profile)
    _manifest(run, home, result, path, kept_twin)
    run.builder.forget_trials(made.decision.plan.steps)
    return result


def _with_estimate(
    result: schema.Result, run: Run, job: targets.Job, placement: targets.Placement, profile: DeviceProfile
) -> schema.Result:
    """The result, with what the artifact should take on the device, or why nobody can say."""
    found = estimate(job, run.captured.graph, placement, profile, run.options.threads)
    key = "estimate_note" if isinstance(found, str) else "estimate"
    return result.model_copy(update={key: found})


def _within(run: Run, profile: DeviceProfile, target_name: str, path: Path) -> tuple[Run, Lowered]:
    """The artifact, and the run it was made in: with fewer tokens, where the recipe removes any."""
    decision = decide(run.captured.graph, profile, target_name, run.options.recipe)
    if not meets_budget(run, decision):
        run = with_fewer_tokens(run, decision)
        return run, _with_what_was_before(run, _fastest(run, profile, target_name, path))
    lowered: Lowered | None = None

    def milliseconds(trial: Run) -> float:
        nonlocal lowered
        lowered = _with_what_was_before(trial, _fastest(trial, profile, target_name, path))
        if lowered.latency is None:
            raise TightfitError(f"--budget-ms can't be met: {lowered.note}.")
        return lowered.latency.p50_ms

    run = within_budget(run, decision, milliseconds)
    assert lowered is not None
    return run, lowered


def _with_what_was_before(run: Run, lowered: Lowered) -> Lowered:
    """What was made, with what was done before all steps: bits of embeddings, and the removal of tokens."""
    pruned, made = run.pruned, lowered.made
    if run.embedded is not None:
        made = replace(made, ledger=(*run.embedded.ledger, *made.ledger))
        lowered = replace(lowered, made=made)
    if pruned is None:
        return lowered
    made = replace(
        made,
        tokens=pruned.captured.graph,
        ledger=(*pruned.ledger, *made.ledger),
        notes=(pruned.how, *made.notes),
    )
    return replace(lowered, made=made)


def _fastest(run: Run, profile: DeviceProfile, target_name: str, path: Path) -> Lowered:
    """The artifact of the plan asked for; with `auto`, where times here count, the first not slower than float."""
    slow: list[str] = []
    asked = _budgets(run) != mixed.Budgets()  # a budget says what is wanted: no other plan takes its place
    for decision in alternatives(run.model, profile, target_name, run.options.recipe):
        found = _lowered(run, target_name, _compressed(run, decision, path), path)
        latency = found.latency
        if slow:
            note = f"Instead of what the profile prefers: {'; '.join(slow)}."
            found = replace(found, made=replace(found.made, notes=(*found.made.notes, note)))
        counts = decision.automatic and not asked and run_like_device(profile, decision)
        if not counts or latency is None or not found.slower:
            break
        label = decision.recipe.removeprefix("auto: ")
        slow.append(f"{label} was measured at {latency.speedup:.2f}x of float's speed here")
    return found


def _budgets(run: Run) -> mixed.Budgets:
    on_tokens = spends_on_tokens(run.options.recipe)
    return mixed.Budgets(run.options.budget_mib, None if on_tokens else run.options.budget_ms)


def _compressed(run: Run, decision: Decision, path: Path) -> Compressed:
    """Apply a decision: as it stands, improved where it is `auto`'s, layer by layer under a budget."""
    options, target_name = run.options, decision.rules.target
    run.progress.advance(0, None, "calibrate")
    limits = options.budget.limits(path.parent.name, target_name)
    goal = max(AUTO_FLOOR_DB, limits.get("min_sqnr_db", 0.0))
    if mixed.quantizes_mixed(decision, _budgets(run)):

        def trial(made: Compressed, timed: bool) -> mixed.Trial:
            found = _lowered(run, target_name, made, path, timed)
            if timed and found.latency is None:
                raise TightfitError(f"--budget-ms can't be met: {found.note}.")
            return mixed.Trial(targets.artifact_bytes(path), found.latency.p50_ms if found.latency else None)

        return mixed.search(run.builder, mixed.mixed_decision(decision), _budgets(run), goal, trial)
    if decision.floor_db is None:
        return run.builder.build(decision)
    return improve(run.builder, decision, goal, options.effort)


def _lowered(run: Run, target_name: str, made: Compressed, path: Path, timed: bool = True) -> Lowered:
    """Write the artifact to `path`, in place of an earlier one, open it and, where `timed`, time it beside float."""
    target = targets.find(target_name)
    _remove(path)
    job = _job(run, made.decision, made)
    run.progress.advance(0, None, "lower")
    target.lower(job, path)
    twin = _twin(run, target, job, made.decision)
    session = target.open(path, threads=run.options.threads)
    latency, note, slower = _latency(run, target, session, twin) if timed else (None, "not asked for", False)
    return Lowered(made, job, session, twin, latency, note, slower)


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


def _remove(path: Path) -> None:
    """Take away an earlier artifact, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
) -> tuple[schema.Latency | None, str | None, bool]:
    """The time, or why there is none, and whether the artifact is surely slower than float.

    An unstable time is taken twice: a disturbance passes. Of two unstable ones both have to say that it is slower.
    """
    if not session.measures_latency:
        return None, f"not measured: {session.executor} shows numerics, its time says nothing about the device", False
    run.progress.advance(0, None, "time")
    sample = next(iter(run.samples.evaluation.batches(run.batch)))
    count = len(next(iter(sample.values())))
    if count < run.batch:
        return None, f"not measured: fewer than {run.batch} evaluation samples, the artifact's batch", False
    float_session = target.open(twin, threads=run.options.threads)
    calls = session.bind(sample), float_session.bind(sample)
    found = measure(*calls, threads=run.options.threads)
    slower = found.surely_slower
    if not found.stable:
        run.progress.advance(0, None, "time again")
        again = measure(*calls, threads=run.options.threads)
        slower = again.surely_slower and (again.stable or slower)
        found = again
    return found, None, slower


def _with_memory(result: schema.Result, run: Run, path: Path, twin: Path) -> schema.Result:
    """The result, with what artifact and float twin keep in memory, or why that is not known."""
    run.progress.advance(0, None, "measure memory")
    found = resident_bytes(result.target, (path, twin), run.options.threads)
    if isinstance(found, str):
        return result.model_copy(update={"resident_note": found})
    return result.model_copy(update={"resident": schema.Resident(bytes=found[0], float_bytes=found[1])})


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
        tokens=token_facts(run.pruned, run.samples.evaluation) if run.pruned else None,
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
    if result.tokens is not None:
        content["artifacts"][result.target]["tokens"] = result.tokens.model_dump(mode="json", exclude={"samples"})
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
