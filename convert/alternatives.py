"""What `auto` turns to when a plan was measured slower than float."""

import platform
from collections.abc import Iterator

from convert import recipes
from convert.capture import Captured
from convert.costs import costs
from convert.planning import Decision, decide, keeping_float, planned
from device_profiles import DeviceProfile

# A layer with less than this share of the model's work gains less from integer kernels than its conversions cost.
LITTLE_WORK = 0.01
MACHINES = {"aarch64": ("aarch64", "arm64"), "x86_64": ("x86_64", "AMD64"), "armv7": ("armv7l",)}


def alternatives(captured: Captured, profile: DeviceProfile, target: str, recipe: str) -> Iterator[Decision]:
    """The decision asked for; after one of `auto`'s, what else could be faster, float32 last."""
    first = decide(captured.graph, profile, target, recipe)
    yield first
    if not first.automatic or first.floor_db is None:
        return
    if "quantize_static" in first.plan.steps:
        small = _little_work(captured)
        if small:
            yield keeping_float(first, small)
        if first.rules.dynamic_scheme != "none":
            yield _instead(captured, profile, first, recipe, "int8-dynamic")
    yield _instead(captured, profile, first, recipe, "float32")


def _instead(captured: Captured, profile: DeviceProfile, first: Decision, recipe: str, name: str) -> Decision:
    """`first` with another recipe where it said `auto`; what it does to tokens stays."""
    reason = "What the profile prefers was measured slower than float here."
    chosen = recipes.load(recipes.resolved(recipe, name))
    return planned(captured.graph, chosen, first.rules, profile, reason, automatic=True)


def _little_work(captured: Captured) -> dict[str, str]:
    """Layers that do next to nothing (the gates of squeeze-and-excitation), with the reason to keep them float."""
    found = [c for c in costs(captured.graph, captured.inputs) if c.macs and c.kind in ("conv", "linear")]
    total = sum(c.macs or 0 for c in found)
    reason = "so little of the model's work that conversions to int8 cost more than they save"
    small = {c.name: reason for c in found if (c.macs or 0) < LITTLE_WORK * total}
    return small if len(small) < len(found) else {}


def run_like_device(profile: DeviceProfile, decision: Decision) -> bool:
    """Whether a time on this machine speaks for the device: its architecture, and a runtime that runs here as there."""
    here = platform.machine() in MACHINES.get(profile.cpu.arch, ())
    return here and decision.rules.runtime in ("onnxruntime", "litert")
