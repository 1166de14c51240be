"""`tightfit demo`: a newcomer's first command."""

import pytest
from real_conversions import Made

from convert.demo import PAIRS
from convert.report.schema import Report

pytestmark = pytest.mark.slow

# One point of 10 digits' test accuracy, as a share.
LARGEST_CHANGE = 0.01


@pytest.mark.parametrize("made", ["demo"], indirect=True)
def test_both_demo_models_keep_their_accuracy_everywhere(made: Made) -> None:
    assert made.code == 0, made.complaints
    reports = {name: Report.model_validate(report) for name, report in made.json().items()}
    assert set(reports) == {"digits_cnn", "digits_vit"}
    for name, report in reports.items():
        assert tuple((r.device, r.target) for r in report.results) == PAIRS
        for result in report.results:
            assert result.accuracy is not None
            change = abs(result.accuracy.artifact - result.accuracy.float_)
            assert change <= LARGEST_CHANGE, f"{name} {result.subject}"
            assert result.match.within_one_step, f"{name} {result.subject}"
        assert (made.out / name / "report.html").is_file()
