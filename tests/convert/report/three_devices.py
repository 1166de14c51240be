"""Invented reports of three devices by three targets, with runs on boards. The numbers are nobody's measurement."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

from made_reports import device_run, instructions, latency, report, result, stage

from convert.report.schema import Report
from convert.report.views import write_views

DEVICES = ("raspberry-pi-4b", "raspberry-pi-5", "jetson-orin-nano")
TARGETS = ("onnx", "tflite", "coreml")
SAME = {"exact": True, "share_equal": 1.0, "max_abs": 0.0}
PI = "ssh://pi@kitchen"


def quantiles(p50: float, spread: float = 0.04, tail: float = 1.6) -> tuple[float, ...]:
    """101 percentiles around `p50`, log-normal with a slow last percent."""
    middle = [NormalDist().inv_cdf(min(max(i / 100, 0.004), 0.996)) for i in range(100)]
    return (*(p50 * math.exp(spread * z) for z in middle), p50 * tail)


def timed(p50: float, float_p50: float, where: str = "host", **changes: Any) -> dict[str, Any]:
    """A latency with its percentiles, of an artifact and its float twin with these medians, ms."""
    speedup = float_p50 / p50
    ours, theirs = quantiles(p50), quantiles(float_p50, 0.03)
    facts = {
        "where": where,
        "p50_ms": p50,
        "p90_ms": ours[90],
        "p99_ms": ours[99],
        "float_p50_ms": float_p50,
        "float_p90_ms": theirs[90],
        "float_p99_ms": theirs[99],
        "speedup": speedup,
        "ratio_interval": [speedup * 0.97, speedup * 1.03],
        "quantiles_ms": ours,
        "float_quantiles_ms": theirs,
        "load_ms": 12.5,
        "first_ms": 3 * p50,
    }
    return latency(**facts | changes)


def board_run(p50: float, float_p50: float, on: str = PI, **changes: Any) -> dict[str, Any]:
    """A run on a real board, with its states, a sustained stretch, energy and memory."""
    warm = [
        {"minute": i / 2, "p50_ms": p50 * (1 + 0.004 * i), "temperature_c": 48 + 1.1 * i, "clock_mhz": 1800}
        for i in range(21)
    ]
    facts = {
        "machine": "Raspberry Pi 4 Model B Rev 1.5",
        "latency": timed(p50, float_p50, on, cpu="Cortex-A72", governor="ondemand"),
        "latency_note": None,
        "board": [
            {"moment": "before", "clock_mhz": 600, "temperature_c": 44.3, "governor": "ondemand"},
            *({"moment": "during", "minute": i, "clock_mhz": 1800, "temperature_c": 48 + i} for i in range(4)),
            {"moment": "after", "clock_mhz": 1800, "temperature_c": 70.1, "governor": "ondemand", "power_w": 5.2},
        ],
        "sustained": warm,
        "energy_mj": 3.4,
        "peak_rss_mib": 96.5,
        "warnings": ["the governor is ondemand: the first calls of a block run at a lower clock"],
    }
    return device_run(on, emulated=False, **facts | changes)


def void_run(on: str = PI) -> dict[str, Any]:
    """A run whose times do not count."""
    states = [
        {"moment": "before", "clock_mhz": 1500, "temperature_c": 79.0, "governor": "ondemand"},
        {"moment": "during", "clock_mhz": 900, "temperature_c": 84.5, "throttled": "soft temperature limit"},
        {"moment": "after", "clock_mhz": 1000, "temperature_c": 82.5},
    ]
    void = "the board was throttled (soft temperature limit) while it was timed"
    return device_run(
        on, emulated=False, latency=None, latency_note=f"void: {void}", void=void, board=states, sustained=[]
    )


def failed_run(on: str = "ssh://jetson") -> dict[str, Any]:
    """A run that did not come to an end."""
    failure = f"{on} has no runtime for .tflite files. Install one there: python3 -m pip install ai-edge-litert."
    return {"on": on, "emulated": False, "failure": failure, "latency_note": "it did not run", "facts": {}}


def counted_run(device: str, millions: float, float_millions: float, dots: int = 0, **changes: Any) -> dict[str, Any]:
    """A run on an emulated board."""
    on = f"emulated:{device}"
    count = {
        "all": int(millions * 1e6),
        "simd": int(millions * 7e5),
        "dot": dots,
        "mla": int(millions * 2e5),
        "load_store": int(millions * 2.2e5),
        "branch": int(millions * 3e4),
        "float_all": int(float_millions * 1e6),
    }
    return device_run(on, instructions=instructions(where=on, **count), **changes)


def _drift(sqnr: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    base: dict[str, Any] = result()["drift"]
    stages = [*base["stages"][:3], stage("int8 simulation", sqnr), stage("artifact", sqnr)]
    stages += [run["drift"] for run in runs if run.get("drift")]
    return {**base, "stages": stages}


def _one(device: str, target: str, size: float, sqnr: float, runs: list[dict[str, Any]], **changes: Any) -> Any:
    passed = sqnr >= 20
    gate = {
        "gate": "min_sqnr_db",
        "limit": 20.0,
        "value": sqnr,
        "passed": passed,
        "reason": "" if passed else f"{sqnr:g}, wanted at least 20",
        "subject": f"{device}/{target}",
    }
    ran = [
        {"gate": "runs", "limit": 1, "value": float("failure" not in run), "passed": "failure" not in run,
         "reason": run.get("failure", ""), "subject": f"{device}/{target} on {run['on']}"}
        for run in runs
    ]  # fmt: skip
    found = [run["instructions"] for run in runs if run.get("instructions")]
    suffix = {"coreml": "mlpackage"}.get(target, target)
    facts = {
        "device": device,
        "target": target,
        "artifact": f"{device}/resnet20.{suffix}",
        "bytes": int(size * 1e3),
        "drift": _drift(sqnr, runs),
        "runs": runs,
        "instructions": found[0] if found else None,
        "gates": [gate, *ran],
    }
    return result(**facts | changes)


def three_by_three(better: float = 1.0, name: str = "resnet20") -> Report:
    """Nine artifacts: good ones, one with too much drift, a slow one, runs that failed and a void one.

    `better` scales sizes, times and instructions, for another date of the same thing.
    """
    no_time = {"latency": None, "latency_note": "Core ML runs on a Mac only; nothing was timed here"}
    b = better
    made = [
        _one("raspberry-pi-4b", "onnx", 331 * b, 27.4, [
            counted_run("raspberry-pi-4b", 18.1 * b, 29.5), board_run(7.9 * b, 14.2)], latency=timed(0.81 * b, 1.3)),
        _one("raspberry-pi-4b", "tflite", 312 * b, 26.9, [
            counted_run("raspberry-pi-4b", 12.3 * b, 30.0), board_run(6.1 * b, 12.9)], latency=timed(0.64 * b, 1.35)),
        _one("raspberry-pi-4b", "coreml", 340 * b, 25.2, [], **no_time),
        _one("raspberry-pi-5", "onnx", 331 * b, 27.4, [
            counted_run("raspberry-pi-5", 9.1 * b, 29.2, 1_200_000)], latency=timed(0.81 * b, 1.3)),
        _one("raspberry-pi-5", "tflite", 312 * b, 18.3, [
            counted_run("raspberry-pi-5", 7.7 * b, 29.9, 1_100_000, host=SAME)], latency=timed(0.64 * b, 1.35)),
        _one("raspberry-pi-5", "coreml", 340 * b, 25.2, [], **no_time),
        _one("jetson-orin-nano", "onnx", 305 * b, 31.5, [void_run("ssh://jetson")], latency=timed(
            1.9 * b, 1.3, stable=False, warnings=["unstable timing: the blocks of float vary by 14% (limit 10%)"])),
        _one("jetson-orin-nano", "tflite", 312 * b, 26.9, [failed_run()], latency=timed(0.64 * b, 1.35)),
        _one("jetson-orin-nano", "coreml", 340 * b, 25.2, [], gates=[], **no_time),
    ]  # fmt: skip
    warnings = ["jetson-orin-nano/onnx: timing was too unstable to compare; run again on a quiet machine."]
    facts = {"name": name, "parameters": 272_474, "fingerprint": "ab" * 32}
    return report(*made, warnings=warnings, model=facts)


def write(folder: Path, made: Report | None = None) -> Path:
    """OUT as `convert` leaves it, as far as reports read it."""
    folder.mkdir(parents=True)
    write_views(made or three_by_three(), folder)
    return folder
