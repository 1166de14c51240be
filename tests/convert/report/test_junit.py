"""JUnit XML: a CI server must see every failure."""

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from convert.report.junit import junit
from convert.report.schema import GateResult

GOOD = GateResult(gate="max_bytes", limit=10, value=5, passed=True, subject="pi/tflite")
BAD = GateResult(gate="min_speedup", limit=1, value=0.8, passed=False, reason="0.8, wanted", subject="pi/onnx")


def test_each_gate_is_a_case_and_each_failure_is_counted() -> None:
    root = ET.fromstring(junit([GOOD, BAD]).encode())
    assert (root.get("tests"), root.get("failures")) == ("2", "1")
    assert [suite.get("name") for suite in root] == ["pi/tflite", "pi/onnx"]
    failures = root.findall(".//failure")
    assert [f.get("message") for f in failures] == ["0.8, wanted"]
    assert failures[0].text == "limit 1, value 0.8: 0.8, wanted"


def test_a_check_of_nothing_is_a_failure() -> None:
    root = ET.fromstring(junit([]).encode())
    assert root.get("failures") == "1"


@given(st.text(), st.text(min_size=1))
def test_any_text_gives_well_formed_xml(subject: str, reason: str) -> None:
    row = GateResult(gate="g", limit=1, value=None, passed=False, reason=reason, subject=subject)
    root = ET.fromstring(junit([row]).encode("utf-8"))
    assert root.get("failures") == "1"
