"""The pages in headless Chromium: nothing fails, nothing is fetched, nothing is wider than a phone."""

from pathlib import Path

import pytest
from browser import PHONE, needs_chromium, seen, width_on_a_phone
from made_reports import report
from three_devices import three_by_three, write

from convert.report.across.build import across
from convert.report.html import html

pytestmark = needs_chromium
LONG = "encoder.transformer.layers.11.attention.self.query.projection.weight_quantized"


def alone(folder: Path) -> Path:
    page = folder / "report.html"
    page.write_text(html(three_by_three()), encoding="utf-8")
    return page


def side_by_side(folder: Path) -> Path:
    folders = [write(folder / "monday", three_by_three(0.9)), write(folder / f"tuesday-{LONG}")]
    across(folders, folder / "across", None, force=False, command=f"tightfit report {LONG * 5}")
    return folder / "across" / "report.html"


@pytest.mark.parametrize("make", [alone, side_by_side])
def test_a_page_opens_without_an_error_or_a_request_and_fits_a_phone(tmp_path: Path, make: object) -> None:
    assert callable(make)
    page = make(tmp_path)
    found = seen(page)
    assert found.console == []
    assert found.requests == []
    assert found.document.count("<svg") > 40
    assert width_on_a_phone(page) <= PHONE


def test_an_error_a_request_and_a_wide_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        "<script>throw new Error('broken')</script><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width:1000px'>wide</div>",
        encoding="utf-8",
    )
    found = seen(page)
    assert any("broken" in line for line in found.console)
    assert found.requests == ["http://127.0.0.1:9/x.png"]
    assert width_on_a_phone(page) >= 1000


def test_a_plain_report_of_before_still_opens(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(report()), encoding="utf-8")
    assert seen(page).console == []
