"""Invented reports for the tests of views and gates. The numbers are nobody's measurement."""

from typing import Any

from convert.report.schema import Report

LAYERS = ["stem.conv", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "fc"]


def stage(name: str, sqnr_db: float | None, **changes: Any) -> dict[str, Any]:
    exact = sqnr_db is None
    row = {
        "stage": name,
        "sqnr_db": sqnr_db,
        "exact": exact,
        "cosine": 1.0 if exact else 0.9987,
        "max_abs": 0.0 if exact else 0.41,
        "top1_agreement": 1.0 if exact else 0.984,
    }
    return row | changes


def latency(**changes: Any) -> dict[str, Any]:
    facts = {
        "where": "host",
        "runs": 3120,
        "float_runs": 1480,
        "p50_ms": 0.642,
        "p90_ms": 0.671,
        "p99_ms": 0.93,
        "cv": 0.061,
        "float_p50_ms": 1.351,
        "float_p90_ms": 1.42,
        "float_p99_ms": 1.88,
        "float_cv": 0.052,
        "float_artifact": "raspberry-pi-4b/resnet20.float.tflite",
        "speedup": 2.104,
        "ratio_interval": [2.05, 2.16],
        "stable": True,
        "threads": 1,
        "cpu": "Cortex-A72 (aarch64)",
        "governor": "performance",
    }
    return facts | changes


def result(**changes: Any) -> dict[str, Any]:
    """A good int8 TFLite result, as the JSON has it, with these fields changed."""
    facts = {
        "device": "raspberry-pi-4b",
        "target": "tflite",
        "artifact": "raspberry-pi-4b/resnet20.tflite",
        "bytes": 312_448,
        "float_bytes": 1_092_616,
        "recipe": "int8",
        "recipe_reason": "the profile's default: its int8 kernels are about twice as fast as float",
        "executor": "LiteRT 2.3.0 (XNNPACK)",
        "drift": {
            "stages": [
                stage("captured", None),
                stage("fold-batch-norm", 121.4, cosine=1.0, max_abs=2e-6, top1_agreement=1.0),
                stage("int8-weights", 38.2, cosine=0.99992, max_abs=0.11, top1_agreement=0.997),
                stage("int8 simulation", 26.9),
                stage("artifact", 26.9),
            ],
            "layers": [{"layer": name, "sqnr_db": 41.0 - 2.3 * i} for i, name in enumerate(LAYERS)],
            "first_jump": {"stage": "int8-weights", "worst_layers": ["fc", "layer3.0.conv1"]},
        },
        "match": {
            "exact": True,
            "max_abs": 0.0,
            "output_step": 0.11,
            "within_one_step": True,
            "share_equal": 1.0,
            "reason": "",
        },
        "accuracy": {
            "float": 0.9195,
            "artifact": 0.918,
            "samples": 2000,
            "classes": 10,
            "per_class": [
                {"label": 3, "samples": 200, "agreement": 0.7, "float": 0.95, "artifact": 0.7},
                {"label": 4, "samples": 200, "agreement": 0.99, "float": 0.9, "artifact": 0.92},
            ],
        },
        "latency": latency(),
        "instructions": instructions(),
        "placement": {
            "int8_ops": 31,
            "float_ops": 1,
            "conversions": 2,
            "fallbacks": [{"node": "softmax", "reason": "left in float: the output feeds a comparison"}],
            "kinds": {"int8 CONV_2D": 21, "int8 ADD": 9, "int8 FULLY_CONNECTED": 1, "float SOFTMAX": 1},
        },
        "gates": [
            {"gate": "min_sqnr_db", "limit": 20.0, "value": 26.9, "passed": True, "subject": "raspberry-pi-4b/tflite"}
        ],
        "ledger": [
            {"step": "fold-batch-norm", "layer": "stem.conv", "action": "folded", "reason": ""},
            {"step": "int8", "layer": "softmax", "action": "left alone", "reason": "not a layer with weights"},
        ],
    }
    return facts | changes


def instructions(**changes: Any) -> dict[str, Any]:
    facts = {
        "where": "emulated:raspberry-pi-4b",
        "all": 12_345_678,
        "simd": 9_000_000,
        "dot": 0,
        "mla": 4_000_000,
        "fmla": 1_000,
        "load_store": 2_500_000,
        "branch": 300_000,
        "inferences": 3,
        "spread": 0.0002,
        "float_all": 30_000_000,
    }
    return facts | changes


def device_run(on: str = "emulated:raspberry-pi-4b", emulated: bool = True, **changes: Any) -> dict[str, Any]:
    """What a result did at an address, as the JSON has it, with these fields changed."""
    facts = {
        "on": on,
        "machine": "Raspberry Pi 4 Model B Rev 1.5",
        "emulated": emulated,
        "executor": "LiteRT 2.3.0 (XNNPACK, 1 thread)",
        "samples": 32,
        "drift": stage(f"on {on}", 25.5, on=on, samples=32),
        "host": {"exact": False, "share_equal": 0.994, "max_abs": 0.11},
        "latency": None,
        "latency_note": "emulated: its time says nothing about the device" if emulated else "not asked for",
        "instructions": instructions(where=on) if emulated else None,
        "facts": {"kernel": "6.6.51", "python": "3.11.2"},
    }
    return facts | changes


def report(*results: dict[str, Any], **changes: Any) -> Report:
    """A report of these results (one good one when none is given), with these top-level fields changed."""
    facts = {
        "schema_version": 1,
        "command": "tightfit convert resnet20.pt2 --device raspberry-pi-4b --calibration images.npz -o out",
        "seed": 0,
        "model": {"name": "resnet20", "parameters": 272_474, "fingerprint": "ab" * 32},
        "calibration": {"samples": 256, "fingerprint": "cd" * 32, "synthetic": False},
        "evaluation": {
            "samples": 2000,
            "fingerprint": "ef" * 32,
            "source": "test.npz",
            "labelled": True,
        },
        "environment": {
            "python": "3.11.9",
            "packages": {"torch": "2.13.0", "numpy": "2.2.6"},
            "os": "Linux 6.1 aarch64",
            "cpu": "Cortex-A72 (aarch64)",
        },
        "warnings": [],
        "results": list(results) or [result()],
        "convert_seconds": 41.3,
        "peak_rss_mib": 1204.5,
    }
    return Report.model_validate(facts | changes)
