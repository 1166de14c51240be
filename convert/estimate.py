"""How long an artifact will take on a device that is not at hand: an estimate with its interval, never a latency.

A roofline per operator (`estimate_fit.py`) with factors fitted on public measurements of well-known networks. How far
such a fit was off where it had not seen the device, or the network on it, is the interval. Where peaks, bandwidth or
measurements are missing there is no estimate, but a reason.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from torch.fx import GraphModule

import targets
from calibrate.graph import kind, layer_name
from convert import estimate_fit as fits
from convert.estimate_data import measured_bandwidths
from convert.estimate_machine import Processor, processor
from convert.estimate_work import FORMATS, Work, work
from convert.report.runs import Estimate
from device_profiles import DeviceProfile

CONFIDENCE = 0.9
# The overhead of an operator may be this many times more or less than assumed: it was measured nowhere.
_OVERHEAD_SPREAD = 3.0
_FEWEST = 3


def estimate(
    job: targets.Job,
    float_graph: GraphModule,
    placement: targets.Placement,
    profile: DeviceProfile,
    threads: int,
) -> Estimate | str:
    """The estimate for what `job` became, and for its float model, or why there is none.

    `placement` is what the artifact, read back, computes: layers it lists as fallbacks count as float, and conversions
    that the graph does not show are added. `threads` is for processors; accelerators take what they take.
    """
    where = _family(job, profile)
    stayed = {f.node for f in placement.fallbacks}
    if where != "processors" and (lost := _leaves(job, profile, stayed)):
        return f"no estimate: {lost}, and what leaves the accelerator is slower than any rule foresees"
    chip = processor(profile, measured_bandwidths().get(profile.name)) if where == "processors" else None
    if isinstance(chip, str):
        return f"no estimate: {chip}"
    if chip is None and not (_rates(where, profile.name)):
        return f"no estimate: nothing of {job.rules.runtime} on {profile.name} was measured in public that we know"
    try:
        done = work(job.graph, job.inputs, _float_format(job, chip), stayed)
        plain = work(float_graph, job.inputs, "float32" if chip is not None else "float16")
    except ValueError as error:
        return f"no estimate: {error}"
    if chip is not None:  # accelerators take conversions between their own operators in
        done += _hidden_conversions(done, placement)
    unknown = {one.format for one in done} - set(FORMATS)
    if unknown:
        return f"no estimate: no public figure for {', '.join(sorted(unknown))} arithmetic"
    return _estimate(job, profile, chip, where, done, plain, threads)


def _family(job: targets.Job, profile: DeviceProfile) -> str:
    """ "processors", or the runtime whose accelerator computes."""
    runtime, extra = job.rules.runtime, profile.accelerator
    if runtime in ("coreml", "tensorrt", "edgetpu") or (runtime == "litert" and extra and extra.kind == "npu"):
        return runtime
    return "processors"


def _leaves(job: targets.Job, profile: DeviceProfile, stayed: Collection[str]) -> str | None:
    """Why part of the artifact does not run on the accelerator, None where all of it does."""
    limits = {limit.op for limit in job.rules.unsupported}
    for node in job.graph.graph.nodes:
        if kind(node) in limits:
            return f"'{layer_name(node)}' ({kind(node)}) does not run there"
    takes_float = profile.accelerator is None or profile.accelerator.fp16 is not False
    if stayed and not takes_float:
        return f"{len(stayed)} layers are float"
    return None


def _rates(where: str, device: str) -> list[str]:
    """The formats measured on an accelerator, where there are enough pairs to know how wrong the fit is."""
    members = fits.members(where)
    if len(members) < _FEWEST:
        return []
    return sorted({p.format for p in members if p.device == device})


def _float_format(job: targets.Job, chip: Processor | None) -> str:
    """What computes numbers without codes: our runtimes compute float32 on processors, whatever the file holds."""
    return "float16" if chip is None else "float32"


def _hidden_conversions(done: list[Work], placement: targets.Placement) -> list[Work]:
    """Conversions that stand in the file and not in the graph: their number is known, and not their size."""
    more = placement.conversions - sum(one.conversion for one in done)
    return [Work("float32", False, False, 0, 0.0, 0, conversion=True, count=more)] if more > 0 else []


def _estimate(
    job: targets.Job,
    profile: DeviceProfile,
    chip: Processor | None,
    where: str,
    done: list[Work],
    plain: list[Work],
    threads: int,
) -> Estimate | str:
    runtime = job.rules.runtime
    known = set(FORMATS) if chip is not None else set(_rates(where, profile.name))
    missing = {one.format for one in done if not one.conversion} - known
    if missing:
        return f"no estimate: {' and '.join(sorted(missing))} was not measured on {profile.name}"
    fitted = fits.fitted(where)

    def case(items: list[Work]) -> fits.Case:
        if chip is None:
            return fits.on_accelerator([_at_rate(one, known) for one in items], profile.name)
        return fits.on_processor(items, chip, runtime, threads)

    found = case(done)
    seconds = fitted.seconds(found)
    classes = {chip.number_class(one.format) if chip else one.format for one in done if one.macs}
    errors, unseen = _errors(where, profile.name, runtime, classes)
    spread = interval_factor(errors, fitted.overhead(found) / seconds)
    float_seconds = fitted.seconds(case(plain)) if {one.format for one in plain} <= known else None
    return Estimate(
        low_ms=seconds * 1e3 / spread,
        mid_ms=seconds * 1e3,
        high_ms=seconds * 1e3 * spread,
        float_mid_ms=None if float_seconds is None else float_seconds * 1e3,
        threads=None if chip is None else min(threads, chip.cores),
        fitted_on=len(fits.members(where)),
        basis=_basis(where, runtime, chip, classes, len(errors), unseen, fitted.overhead(found) / seconds, profile),
    )


def _at_rate(one: Work, known: Collection[str]) -> Work:
    """A conversion moves bytes at the rate of a format that was measured."""
    return one if one.format in known else replace(one, format=min(known))


def _errors(where: str, device: str, runtime: str, classes: Collection[str]) -> tuple[list[float], str]:
    """Logarithms of predicted / measured on pairs the fit had not seen, as far from it as this device is."""
    members = fits.members(where)
    same = [p for p in members if p.runtime == runtime and number_class(p) in classes]
    unseen = "network"
    if where == "processors" and all(p.device != device for p in members):
        unseen = "device"
    if len(same) < _FEWEST and where == "processors":
        unseen = "runtime"
    off = [(p, math.log(guess / p.ms)) for p, guess in fits.held_out(where, unseen)]
    alike = [error for p, error in off if number_class(p) in classes]
    return (alike if len(alike) >= _FEWEST else [error for _, error in off]), unseen


def number_class(pair: fits.Pair) -> str:
    return pair.processor.number_class(pair.format) if pair.processor else pair.format


def interval_factor(errors: list[float], overhead_share: float) -> float:
    """The factor that the interval reaches up and down: the t quantile of log-normal errors, and of the overhead."""
    from scipy.stats import t

    mean_square = sum(e * e for e in errors) / len(errors)
    width = math.sqrt(mean_square) * float(t.ppf((1 + CONFIDENCE) / 2, len(errors)))
    return math.exp(math.hypot(width, overhead_share * math.log(_OVERHEAD_SPREAD)))


def _basis(
    where: str,
    runtime: str,
    chip: Processor | None,
    classes: Collection[str],
    errors: int,
    unseen: str,
    overhead_share: float,
    profile: DeviceProfile,
) -> str:
    members = fits.members(where)
    own = sum(p.runtime == runtime and number_class(p) in classes for p in members)
    words = ", ".join(sorted(classes)) or "no arithmetic"
    parts = [f"An estimate, not a measurement: a roofline per operator ({words})"]
    if chip is None:
        parts.append(
            f"rates fitted on {len(members)} public measurements with {runtime}, all layers on the accelerator"
        )
    else:
        parts.append(f"efficiencies fitted on {len(members)} public measurements, {own} of them with {runtime}")
        narrow = any(name.startswith("int8") for name in classes)
        parts += [words for words in chip.derived if narrow or not words.startswith("int8")]
    share = f"{CONFIDENCE:.0%}".replace("%", " %")
    parts.append(f"the {share} interval is from {errors} errors on a {unseen} that the fit had not seen")
    if overhead_share > 0.5:
        known = "assumed, not fitted" if chip is not None else "fitted on far larger networks"
        parts.append(f"{overhead_share:.0%} of it is overhead per operator, which is {known}".replace("%", " %", 1))
    return "; ".join(parts) + "."
