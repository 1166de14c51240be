"""Public latencies of well-known networks, and what these networks compute: what the estimate is fitted on."""

import functools
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import device_profiles
from convert.estimate_machine import Processor, processor
from convert.estimate_work import NARROW, Work

FOLDER = Path(device_profiles.__file__).parent / "measured"


@dataclass(frozen=True)
class Pair:
    """One published average of one inference at batch 1. `processor` is None where an accelerator ran it."""

    device: str
    runtime: str
    format: str
    threads: int
    net: str
    ms: float
    source: str
    processor: Processor | None
    work: tuple[Work, ...]


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """All measured pairs, in the order of pairs.toml."""
    with open(FOLDER / "pairs.toml", "rb") as file:
        data = tomllib.load(file)
    bandwidths = measured_bandwidths()
    found = []
    for entry in data["measured"]:
        device, runtime, form = entry["device"], entry["runtime"], entry["format"]
        chip = None
        if "threads" in entry:
            chip = _processor(device, data, bandwidths.get(device))
            chip = chip.at_clock(entry["clock_ghz"]) if "clock_ghz" in entry else chip
        for net, ms in entry["ms"].items():
            done = tuple(_in_format(w, form, runtime) for w in nets()[net])
            found.append(Pair(device, runtime, form, entry.get("threads", 1), net, ms, entry["source"], chip, done))
    return tuple(found)


def measured_bandwidths() -> dict[str, float]:
    """{device: bandwidth in 10^9 bytes/s} where measurements say what a profile does not."""
    with open(FOLDER / "pairs.toml", "rb") as file:
        return {device: entry["gbs"] for device, entry in tomllib.load(file)["bandwidth"].items()}


@functools.cache
def nets() -> dict[str, tuple[Work, ...]]:
    """The networks of nets.toml in float32; `benchmarks/estimate.py --nets` writes it."""
    with open(FOLDER / "nets.toml", "rb") as file:
        data = tomllib.load(file)
    return {
        name: tuple(
            Work("float32", what == "depthwise", what == "square", macs, weights * 4.0, numbers, count=count)
            for count, macs, weights, numbers, what in rows
        )
        for name, rows in data.items()
    }


def _processor(device: str, data: dict, bandwidth: float | None) -> Processor:
    if device in data["processor"]:
        facts = {k: v for k, v in data["processor"][device].items() if k != "source"}
        return Processor.of_facts(**facts)
    found = processor(device_profiles.load(device), bandwidth)
    if isinstance(found, str):
        raise ValueError(f"pairs.toml: {device}: {found}")
    return found


def _in_format(work: Work, form: str, runtime: str) -> Work:
    """A float32 network's operator as it ran. ncnn computes all but layers with weights in float32."""
    if runtime == "ncnn" and form == "int8" and not work.macs:
        return work
    return replace(work, format=form, weight_bytes=work.weight_bytes / 4 * NARROW[form])
