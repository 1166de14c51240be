"""Reading a budget: every mistake is named."""

from pathlib import Path

import pytest

from convert.budget import read_budget
from convert.errors import TightfitError

GOOD = """
version = 1
[gates]
min_sqnr_db = 20
[device.raspberry-pi-4b]
max_p50_ms = 15.5
[device.raspberry-pi-4b.onnx]
min_sqnr_db = false
require_match = true
[on."ssh://pi@kitchen"]
max_p50_ms = 20
"""


def budget_file(folder: Path, text: str) -> Path:
    path = folder / "budget.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_documented_form_is_read(tmp_path: Path) -> None:
    budget = read_budget(budget_file(tmp_path, GOOD))
    assert budget.limits("raspberry-pi-4b", "tflite") == {
        "min_sqnr_db": 20,
        "max_p50_ms": 15.5,
    }
    assert budget.limits("raspberry-pi-4b", "onnx") == {"max_p50_ms": 15.5, "require_match": 1}
    assert budget.on == {"ssh://pi@kitchen": {"max_p50_ms": 20}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('version = 1\n[on."ssh://a"]\nmax_p50 = 1', "did you mean max_p50_ms"),
        ('version = 1\n[on."ssh://a"]\nmax_accuracy_drop = 0.01', "a run at an address does not measure"),
        ('version = 1\n[on."ssh://a"]\nmax_bytes = 5', "put it under \\[gates\\]"),
        ("version = 1\n[on]\nmax_p50_ms = 1", "must be a section of its own"),
        ("version = 1\n[gate]\nmin_sqnr_db = 1", "did you mean gates"),
        ("version = 1\n[gates]\nmin_sqnr = 1", "did you mean min_sqnr_db"),
        ("version = 2\n", "version = 2"),
        ("[gates]\nmin_sqnr_db = 1", "version = None"),
        ("version = true\n", "version = True"),
        ("version = 1\n[gates]\nmin_sqnr_db = 'twenty'", "not a number"),
        ("version = 1\n[gates]\nmin_sqnr_db = true", "not a number"),
        ("version = 1\n[gates]\nmin_agreement = 1.5", "does not fit"),
        ("version = 1\n[gates]\nmax_bytes = -5", "does not fit"),
        ("version = 1\n[gates]\nmax_bytes = nan", "does not fit"),
        ("version = 1\n[device.a.onx]\nmax_bytes = 5", "did you mean onnx"),
        ("version = 1\n[device]\na = 5", "section of its own"),
        ("version = 1\ngates = 5", "section of its own"),
        ("version = 1\n[device.a]\nmax_byte = 5", "did you mean max_bytes"),
        ("version = 1\nmin_sqnr_db = 5", "no section 'min_sqnr_db'"),
        ("version 1", "line 1"),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    if "onx" in text:
        pytest.importorskip("targets.onnx")
    with pytest.raises(TightfitError, match=message) as caught:
        read_budget(budget_file(tmp_path, text))
    assert "budget.toml" in str(caught.value)


def test_a_missing_budget_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="cannot read the budget"):
        read_budget(tmp_path / "none.toml")
