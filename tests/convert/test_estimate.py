"""The estimate: known measurements lie inside it, slower chips take longer, and what nobody knows is not guessed."""

import math
from typing import Any

import made_out
import pytest
from made_reports import report, result

from convert import estimate_fit as fits
from convert.estimate import CONFIDENCE, interval_factor
from convert.estimate_data import pairs
from convert.gates import GATES
from convert.record import read_record
from convert.report.html import html
from convert.report.run_words import estimated

ESTIMATE: dict[str, Any] = {
    "low_ms": 1.0,
    "mid_ms": 2.0,
    "high_ms": 4.0,
    "float_mid_ms": 5.0,
    "threads": 1,
    "basis": "A roofline.",
    "fitted_on": 70,
}


def test_every_public_measurement_has_a_source_and_a_time() -> None:
    found = pairs()
    assert len(found) > 50
    assert all(pair.ms > 0 and pair.source for pair in found)


@pytest.mark.slow
def test_pairs_that_the_fit_had_not_seen_are_off_by_a_known_factor() -> None:
    """Nine in ten lie inside the interval that their errors make; ten times as much would not."""
    errors = [math.log(guess / pair.ms) for pair, guess in fits.held_out("processors", "network")]
    factor = interval_factor(errors, 0.0)
    inside = sum(abs(error) <= math.log(factor) for error in errors)
    assert inside / len(errors) >= CONFIDENCE - 0.05
    wrong = sum(abs(error + math.log(10)) <= math.log(factor) for error in errors)
    assert wrong / len(errors) < 0.1


def test_a_conversion_for_a_pi_has_an_estimate_and_its_interval() -> None:
    (found,) = read_record(made_out.converted()).artifacts
    estimate = found.result.estimate
    assert estimate is not None, found.result.estimate_note
    assert estimate.low_ms < estimate.mid_ms < estimate.high_ms
    assert estimate.word == "estimate"
    assert "estimate for raspberry-pi-4b, not measured" in estimated(found.result)


def test_the_page_calls_it_an_estimate_and_no_gate_reads_it() -> None:
    made = report(result(estimate=ESTIMATE, latency=None, latency_note="nothing here"))
    page = html(made)
    assert "an estimate" in page
    assert "not measured" in page
    (only,) = made.results
    with_it = {name: gate.measure(only) for name, gate in GATES.items()}
    without = {name: gate.measure(only.model_copy(update={"estimate": None})) for name, gate in GATES.items()}
    assert with_it == without


def test_the_interval_widens_with_the_errors() -> None:
    assert interval_factor([0.1, -0.1, 0.2], 0.0) < interval_factor([0.5, -0.5, 0.9], 0.0)
