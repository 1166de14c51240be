"""The report as data: it keeps what it is given and refuses what makes no sense."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import latency, report, result, stage
from pydantic import ValidationError

from convert.errors import TightfitError
from convert.report.schema import LayerDrift, Result, Stage
from convert.report.store import json_schema, read_report, write_report

DOCS = Path(__file__).parents[3] / "docs"


def test_a_report_survives_writing_and_reading(tmp_path: Path) -> None:
    made = report(result(), result(target="onnx", latency=None, latency_note="none here"))
    write_report(made, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_json_has_the_documented_names() -> None:
    data = report().model_dump(mode="json")
    assert {"schema_version", "model", "calibration", "results", "convert_seconds", "peak_rss_mib"} <= set(data)
    first = data["results"][0]
    assert set(first["accuracy"]) >= {"float", "artifact"}
    assert set(first["drift"]["stages"][0]) >= {"stage", "sqnr_db", "cosine", "max_abs", "top1_agreement"}
    assert set(first["latency"]) >= {
        "where", "runs", "p50_ms", "p90_ms", "p99_ms", "float_p50_ms", "speedup", "stable"
    }  # fmt: skip
    assert set(first["gates"][0]) >= {"gate", "limit", "value", "passed"}
    assert set(first["placement"]) >= {"int8_ops", "float_ops", "fallbacks"}


def test_infinity_is_written_as_exact_with_a_number_that_compares() -> None:
    made = LayerDrift(layer="a", sqnr_db=math.inf)
    assert made.model_dump() == {"layer": "a", "sqnr_db": 200.0, "exact": True, "undefined": None}
    assert LayerDrift.model_validate_json(made.model_dump_json()) == made


def test_what_is_not_a_ratio_is_undefined_with_a_reason() -> None:
    assert LayerDrift(layer="a", sqnr_db=math.nan).undefined == "the values compared are not all finite"
    assert LayerDrift(layer="a", sqnr_db=-math.inf).undefined == "the reference is zero"
    own = LayerDrift(layer="a", sqnr_db=math.nan, undefined="the artifact gave NaN")
    assert own.undefined == "the artifact gave NaN"


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_has_one_meaning_and_valid_json(value: float) -> None:
    made = LayerDrift(layer="a", sqnr_db=value)
    again = LayerDrift.model_validate(json.loads(json.dumps(made.model_dump(), allow_nan=False)))
    assert again == made
    assert made.exact == (value == math.inf)


def test_an_sqnr_that_is_both_exact_and_a_number_is_refused() -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Stage(stage="a", sqnr_db=3.0, exact=True, cosine=1, max_abs=0)
    with pytest.raises(ValidationError, match="exactly one"):
        Stage(stage="a", sqnr_db=None, cosine=1, max_abs=0)


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"latency": None}, "latency_note"),
    ({"latency": latency(speedup=None)}, "float twin"),
    ({"latency": latency(p50_ms=0.0)}, "p50_ms"),
    ({"match": {**result()["match"], "exact": False}}, "needs a reason"),
    ({"match": {**result()["match"], "max_abs": 0.1}}, "exact match"),
    ({"drift": {"stages": []}}, "stages"),
    ({"drift": {"stages": [stage("a", 1.0)], "first_jump": {"stage": "b"}}}, "not among the stages"),
    ({"gates": [{"gate": "g", "limit": 1, "value": None, "passed": False}]}, "says why"),
    ({"bytes": 0}, "bytes"),
    ({"surprise": 1}, "surprise"),
    ({"accuracy": {"float": 91.9, "artifact": 0.9, "samples": 1, "classes": 10}}, "less than or equal to 1"),
]


@pytest.mark.parametrize(("changes", "message"), NONSENSE)
def test_a_result_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Result.model_validate(result(**changes))


def test_two_results_of_one_device_and_target_are_refused() -> None:
    with pytest.raises(ValidationError, match="same device and target"):
        report(result(), result())


def test_a_report_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "seed": 0}', "Field required"),
        ("[" * 100_000, "is not a report"),
    ],
)
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TightfitError, match=message) as caught:
        read_report(path)
    assert "report.json" in str(caught.value)


def test_the_place_of_a_mistake_is_named(tmp_path: Path) -> None:
    data = report().model_dump(mode="json")
    data["results"][0]["latency"]["p50_ms"] = "fast"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TightfitError, match=r"results\.0\.latency\.p50_ms"):
        read_report(path)


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_report(report(), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.report.store.os.fsync", full_disk)
    with pytest.raises(TightfitError, match="No space left"):
        write_report(report(seed=5), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="cannot write"):
        write_report(report(), tmp_path / "none" / "report.json")
    with pytest.raises(TightfitError, match="cannot read"):
        read_report(tmp_path / "none.json")


def test_the_committed_json_schema_is_the_one_of_the_code() -> None:
    committed = json.loads((DOCS / "report.schema.json").read_text(encoding="utf-8"))
    assert committed == json_schema(), "write docs/report.schema.json again, see docs/report.md"
