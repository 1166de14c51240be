"""Gate results as JUnit XML, which CI servers show test by test."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from .schema import GateResult

# What XML 1.0 cannot hold at all, not even escaped (https://www.w3.org/TR/xml/#charsets).
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(gates: Iterable[GateResult], name: str = "tightfit check") -> str:
    """JUnit XML: one suite per result (device/target), one case per gate; a failed gate carries its reason.

    A check without any gate has one failed case: nothing was checked.
    """
    rows = list(gates) or [GateResult(gate="any_gate", limit=1, value=0, passed=False, reason="no gate was checked")]
    root = ET.Element("testsuites", _counts(rows) | {"name": _clean(name)})
    for subject in dict.fromkeys(row.subject for row in rows):
        cases = [row for row in rows if row.subject == subject]
        suite = ET.SubElement(root, "testsuite", _counts(cases) | {"name": _clean(subject or name)})
        for row in cases:
            _case(suite, row, subject or name)
    ET.indent(root)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{ET.tostring(root, encoding='unicode')}\n"


def _case(suite: ET.Element, row: GateResult, classname: str) -> None:
    case = ET.SubElement(suite, "testcase", {"classname": _clean(classname), "name": _clean(row.gate)})
    if row.passed:
        return
    value = "not measured" if row.value is None else f"{row.value:.6g}"
    failure = ET.SubElement(case, "failure", {"message": _clean(row.reason), "type": "gate"})
    failure.text = _clean(f"limit {row.limit:.6g}, value {value}: {row.reason}")


def _counts(rows: list[GateResult]) -> dict[str, str]:
    return {"tests": str(len(rows)), "failures": str(sum(not r.passed for r in rows)), "errors": "0"}


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)
