"""`tightfit inspect`: what a model holds and what a device makes of it, before any work; with data, a diagnosis."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import BaseModel, ConfigDict
from torch.fx import GraphModule

from calibrate import qdq, steps
from calibrate.graph import clone, constant, kind, layer_name
from calibrate.placement import place
from calibrate.plan import Entry, Plan
from calibrate.samples import CalibrationSet, InputSpec
from calibrate.weights import quantize_weight
from convert.capture import Captured, capture
from convert.compress import FEW, Builder
from convert.costs import Cost, costs
from convert.data import open_data, peek
from convert.errors import user_errors
from convert.planning import Decision, decide, family
from convert.progress import Progress, Silent
from device_profiles import DeviceProfile, load


class Facts(BaseModel):
    """A part of an inspection: immutable."""

    model_config = ConfigDict(frozen=True)


class Layer(Facts):
    """One operator of the float graph; `shape` of its output at batch 1, `macs` per sample, None where not counted."""

    name: str
    kind: str
    operator: str
    shape: tuple[int, ...]
    parameters: int
    macs: int | None


class Fate(Facts):
    """What a step of the plan will do to a layer, or why it leaves it alone."""

    step: str
    layer: str
    action: str
    reason: str


class Limited(Facts):
    """A kind of operator that the device does not run on its fast path ("unsupported"), or runs slowly ("costly")."""

    kind: str
    verdict: str
    reason: str
    layers: tuple[str, ...]


class Outlook(Facts):
    """One device and target: the plan, layer by layer, and what stands in its way.

    `int8_macs`: those of layers that will compute on codes. `estimated_bytes`: an estimate of the artifact's size, the
    bytes of its constants alone. `notes`: what is decided only with data.
    """

    device: str
    target: str
    runtime: str
    recipe: str
    reason: str
    compute: str
    steps: tuple[str, ...]
    fates: tuple[Fate, ...]
    limits: tuple[Limited, ...]
    int8_macs: int
    estimated_bytes: int
    notes: tuple[str, ...]


class Inspection(Facts):
    """A model's layers and totals, and the outlook on one device where one was named.

    `parameters` are trained numbers, shared ones once (those that capture folded into others are in no layer);
    `float_bytes` the bytes of all constants as captured; `findings`: what calibration samples show that int8 would
    break, and the step that helps, None where no samples were given; `operators` how many there are of each kind;
    `uncounted` the layers whose multiply-accumulates are missing from `macs`.
    """

    model: str
    source: str
    family: str
    inputs: tuple[str, ...]
    parameters: int
    macs: int
    uncounted: tuple[str, ...]
    float_bytes: int
    operators: dict[str, int]
    layers: tuple[Layer, ...]
    outlook: Outlook | None = None
    findings: tuple[Fate, ...] | None = None


def inspect_model(
    model: str,
    devices: Sequence[str],
    target: str | None = None,
    recipe: str = "auto",
    *,
    weights: Path | None = None,
    inputs: Sequence[InputSpec] = (),
    python: Path | None = None,
    calibration: str | None = None,
    preprocessing: Path | None = None,
    progress: Progress | None = None,
) -> list[Inspection]:
    """Capture `model` and inspect it, once per device; without devices the model alone. With `calibration` samples the
    model is diagnosed too. Raises TightfitError."""
    progress = progress or Silent()
    with user_errors():
        profiles: list[DeviceProfile | None] = [load(name) for name in devices] or [None]
    progress.stage("capture")
    with tempfile.TemporaryDirectory() as work, user_errors():
        where = {"python": python, "work": Path(work), "preprocessing": preprocessing}
        examples = peek(calibration, labels=None, **where) if calibration else None  # type: ignore[arg-type]
        captured = capture(model, weights=weights, inputs=inputs, examples=examples, python=python, work=Path(work))
        findings = None
        if calibration:
            progress.stage("diagnose")
            data = open_data(calibration, captured.inputs, limit=FEW, **where)  # type: ignore[arg-type]
            findings = diagnosis(captured, data)
    progress.stage("inspect")
    found = [inspect(captured, profile, target, recipe) for profile in profiles]
    return [f.model_copy(update={"findings": findings}) for f in found]


def diagnosis(captured: Captured, data: CalibrationSet) -> tuple[Fate, ...]:
    """What the samples show that int8 would break, each with the step that is made for it."""
    entries = Builder(captured, data).look("diagnose", Plan(steps=("fold_batchnorm", "fuse_activations")))
    return tuple(_fate(e) for e in entries)


def _fate(entry: Entry) -> Fate:
    return Fate(step=entry.step, layer=entry.layer, action=entry.action, reason=entry.reason)


def inspect(
    captured: Captured, profile: DeviceProfile | None, target: str | None = None, recipe: str = "auto"
) -> Inspection:
    """Look at a captured model, and with a profile at what `recipe` would do to it on that device for `target`
    (the profile's own when None). Raises TightfitError for a recipe or target the device does not have."""
    found = costs(captured.graph, captured.inputs)
    outlook = None
    if profile is not None:
        with user_errors():
            outlook = _outlook(captured.graph, found, profile, target or profile.default_target, recipe)
    return Inspection(
        model=captured.name,
        source=captured.source,
        family=family(captured.graph),
        inputs=tuple(f"{i.name}: {i.dtype} {list(i.shape)}" for i in captured.inputs),
        parameters=captured.parameters,
        macs=sum(c.macs or 0 for c in found),
        uncounted=tuple(c.name for c in found if c.macs is None),
        float_bytes=constant_bytes(captured.graph),
        operators=dict(sorted(Counter(c.kind for c in found).items())),
        layers=tuple(Layer(**vars(c)) for c in found),
        outlook=outlook,
    )


def _outlook(graph: GraphModule, found: list[Cost], profile: DeviceProfile, target: str, recipe: str) -> Outlook:
    decision = decide(graph, profile, target, recipe)
    result = clone(graph)
    notes: list[str] = []
    fates: list[Entry] = []
    for name in decision.plan.steps:
        if name == "quantize_static":
            fates += _foresee_static(result, decision.plan)
            notes.append("A layer that reads a mask's sentinels stays float too: calibration data will tell.")
            continue
        if steps.refines(name):
            notes.append(f"{name} improves the codes with calibration data.")
            continue
        try:
            fates += steps.apply(name, result, steps.Context(decision.plan, _no_data, _no_data))
        except _NeedsData:
            notes.append(f"What {name} does depends on the calibration data.")
    if decision.floor_db is not None:
        notes.append(
            f"Layers go back to float where the simulation falls below {decision.floor_db:.0f} dB against float."
        )
    on_codes = {e.layer for e in fates if e.step in ("quantize_static", "quantize_dynamic") and _computes(e)}
    return Outlook(
        device=profile.name,
        target=target,
        runtime=decision.rules.runtime,
        recipe=decision.recipe,
        reason=decision.reason,
        compute=decision.compute,
        steps=decision.plan.steps,
        fates=tuple(_fate(e) for e in fates),
        limits=tuple(_limits(graph, decision, fates)),
        int8_macs=sum(c.macs or 0 for c in found if c.name in on_codes),
        estimated_bytes=_estimate(result, decision),
        notes=tuple(notes),
    )


def _computes(entry: Entry) -> bool:
    """Whether a layer multiplies codes: it was quantized, and is no table."""
    return not entry.action.startswith("left") and not entry.action.endswith("table")


class _NeedsData(Exception):
    """A step asked for calibration samples."""


def _no_data() -> NoReturn:
    raise _NeedsData


def _foresee_static(graph: GraphModule, plan: Plan) -> Iterator[Entry]:
    """Where static int8 would put codes, by the graph alone; the weights of those layers become codes in place."""
    sites = place(graph, plan)
    for node in list(graph.graph.nodes):
        if node.name in sites.layers:
            if kind(node) in ("conv", "linear"):
                quantize_weight(graph, node, plan)
            yield Entry("quantize_static", sites.layers[node.name], "int8", kind(node))
    for layer, reason in sites.left.items():
        yield Entry("quantize_static", layer, "left float", reason)


def _limits(graph: GraphModule, decision: Decision, fates: list[Entry]) -> Iterator[Limited]:
    gone = {e.layer for e in fates if e.action == "folded"}
    for verdict in ("unsupported", "costly"):
        for limit in getattr(decision.rules, verdict):
            layers = [layer_name(n) for n in graph.graph.nodes if kind(n) == limit.op and layer_name(n) not in gone]
            if layers:
                yield Limited(kind=limit.op, verdict=verdict, reason=limit.reason, layers=tuple(layers))


def constant_bytes(graph: GraphModule) -> int:
    """The bytes of every constant the graph reads, each once."""
    names = {str(n.target): n for n in graph.graph.nodes if n.op == "get_attr" and n.users}
    return sum(constant(graph, n).nbytes for n in names.values())


def _estimate(graph: GraphModule, decision: Decision) -> int:
    """Constants as the artifact will store them; the zero points of symmetric weights take no room, float32 becomes
    float16 where the artifact computes in it."""
    names = {str(n.target): n for n in graph.graph.nodes if n.op == "get_attr" and n.users}
    total = 0
    for node in names.values():
        value = constant(graph, node)
        if all("dequantize_per_channel" in str(u.target) and u.args[2] is node for u in node.users):
            continue
        if value.dtype == torch.int8:
            total += value.numel() * min(qdq.code_bits(u) or 8 for u in node.users) // 8
            continue
        halved = decision.compute == "float16" and str(value.dtype) == "torch.float32"
        total += value.nbytes // 2 if halved else value.nbytes
    return total
