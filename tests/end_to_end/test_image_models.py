"""ResNet-20 and a ViT with trained weights, for a Raspberry Pi, an iPhone and a Jetson: the promises in numbers."""

import json
from typing import Any

import pytest
from real_conversions import DEVICES, TARGETS, Made

from convert.report.schema import Result

pytestmark = pytest.mark.slow

ON_2000_IMAGES = ["resnet20", "vit", "vit-int8"]
EVERY = [*ON_2000_IMAGES, "resnet20-all-targets"]
# Top-1 of the trained weights on the 2,000 test images; another CPU may round one image over.
FLOAT_TOP1 = {"resnet20": 0.8745, "vit": 0.7745}
# How far an int8 artifact may fall below float, as a share. On 500 images one image is 0.2 points: wider.
LARGEST_DROP = {"resnet20": 0.005, "vit": 0.010, "vit-int8": 0.010, "resnet20-all-targets": 0.010}

FIELDS: dict[str, Any] = {
    "schema_version": int,
    "model": {"name": str, "parameters": int, "fingerprint": str},
    "calibration": {"samples": int, "fingerprint": str, "synthetic": bool},
    "convert_seconds": float,
    "peak_rss_mib": float,
}
STAGE_FIELDS = {"stage": str, "sqnr_db": float, "cosine": float, "max_abs": float, "top1_agreement": float}
RESULT_FIELDS: dict[str, Any] = {
    "device": str,
    "target": str,
    "artifact": str,
    "bytes": int,
    "float_bytes": int,
    "accuracy": {"float": float, "artifact": float},
    "placement": {"int8_ops": int, "float_ops": int, "fallbacks": list},
    "gates": list,
}
LATENCY_FIELDS = {
    "where": str,
    "runs": int,
    "p50_ms": float,
    "p90_ms": float,
    "p99_ms": float,
    "float_p50_ms": float,
    "speedup": float,
    "stable": bool,
}


def drop(result: Result) -> float:
    """How far the artifact's top-1 lies below float, as a share of the samples."""
    assert result.accuracy is not None, f"{result.subject} has no accuracy"
    return result.accuracy.float_ - result.accuracy.artifact


def faulty_fields(found: Any, wanted: dict[str, Any], where: str = "") -> list[str]:
    """The fields of `wanted` ({name: type or the same again}) that `found` lacks or that are of another type."""
    faults = []
    for name, kind in wanted.items():
        value = found.get(name)
        if isinstance(kind, dict):
            faults += faulty_fields(value, kind, f"{where}{name}.") if isinstance(value, dict) else [f"{where}{name}"]
        elif type(value) is not kind:
            faults.append(f"{where}{name}")
    return faults


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_the_command_succeeds_and_prints_the_report_it_wrote(made: Made) -> None:
    assert made.code == 0, made.complaints
    assert made.json() == json.loads((made.out / "report.json").read_text())
    for result in made.report.results:
        assert (made.out / result.artifact).exists()
    assert (made.out / "reference.npz").is_file()


@pytest.mark.parametrize(("made", "model"), [("resnet20", "resnet20"), ("vit", "vit")], indirect=["made"])
def test_float_top1_is_that_of_the_trained_weights(made: Made, model: str) -> None:
    for result in made.report.results:
        assert result.accuracy is not None
        assert result.accuracy.samples == 2000
        assert result.accuracy.float_ == pytest.approx(FLOAT_TOP1[model], abs=0.0005)


@pytest.mark.parametrize(("made", "name"), [(name, name) for name in EVERY], indirect=["made"])
def test_top1_stays_within_the_promise(made: Made, name: str) -> None:
    drops = {r.subject: drop(r) for r in made.report.results}
    assert {subject: d for subject, d in drops.items() if d > LARGEST_DROP[name]} == {}


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_every_artifact_matches_its_simulation_within_one_step(made: Made) -> None:
    matches = {r.subject: r.match for r in made.report.results}
    assert [s for s, m in matches.items() if not m.within_one_step] == []
    assert [s for s, m in matches.items() if not m.exact and not m.reason] == []


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_no_layer_fell_back_and_every_artifact_shrank(made: Made) -> None:
    for result in made.report.results:
        assert result.placement.fallbacks == (), result.subject
        # Int8 weights are a quarter, float16 ones half; graphs and scales come on top.
        assert result.bytes < 0.55 * result.float_bytes, result.subject


@pytest.mark.parametrize("made", ["resnet20", "vit-int8"], indirect=True)
def test_static_int8_computes_in_int8(made: Made) -> None:
    for result in made.report.results:
        assert result.placement.int8_ops >= 20, result.subject


@pytest.mark.parametrize("made", ["resnet20", "vit"], indirect=True)
def test_each_device_gets_its_default_target(made: Made) -> None:
    found = {r.device: r.target for r in made.report.results}
    assert found == dict(zip(DEVICES, ("tflite", "coreml", "onnx"), strict=True))


@pytest.mark.parametrize("made", ["resnet20-all-targets"], indirect=True)
def test_every_device_can_be_lowered_to_every_target(made: Made) -> None:
    assert {(r.device, r.target) for r in made.report.results} == {(d, t) for d in DEVICES for t in TARGETS}


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_the_report_has_every_promised_field(made: Made) -> None:
    report = made.json()
    assert faulty_fields(report, FIELDS) == []
    assert report["calibration"]["samples"] == 256
    assert report["calibration"]["synthetic"] is False
    for result in report["results"]:
        assert faulty_fields(result, RESULT_FIELDS) == []
        for stage in result["drift"]["stages"][1:]:
            # A stage that changed nothing has no ratio: it says `exact` instead.
            wanted = {k: v for k, v in STAGE_FIELDS.items() if k != "sqnr_db" or not stage["exact"]}
            assert faulty_fields(stage, wanted) == []
        assert result["drift"]["layers"]
        assert all(layer["layer"] for layer in result["drift"]["layers"])
        if result["target"] == "coreml":
            assert (result["latency"] is None) != (result["latency_note"] is None)
        else:
            assert faulty_fields(result["latency"], LATENCY_FIELDS) == []


def test_a_missing_or_mistyped_field_is_noticed() -> None:
    sound = {"name": "x", "parameters": 1, "fingerprint": "f"}
    assert faulty_fields({"model": sound}, {"model": FIELDS["model"]}) == []
    assert faulty_fields({"model": {**sound, "parameters": "1"}}, {"model": FIELDS["model"]}) == ["model.parameters"]
    assert faulty_fields({}, {"model": FIELDS["model"]}) == ["model"]
