"""The page: it has the numbers, it calls a failure a failure, and foreign text stays text."""

import re
from html.parser import HTMLParser
from pathlib import Path

from browser import PHONE, chromium, needs_chromium, width_on_a_phone
from made_reports import latency, report, result, stage
from PIL import Image

from convert.report.html import by_reason, html
from convert.report.markdown import markdown
from convert.report.schema import Report, Result
from convert.report.store import read_report
from convert.report.views import write_views


class Text(HTMLParser):
    """Collects what a reader sees, and the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def slow_and_unmeasured() -> Report:
    slow = result(
        device="jetson-orin-nano",
        target="onnx",
        latency=latency(
            p50_ms=1.62, speedup=0.834, ratio_interval=[0.7, 0.95], stable=False, warnings=["unstable timing: too wide"]
        ),
        gates=[{"gate": "min_speedup", "limit": 1, "value": 0.834, "passed": False, "reason": "wanted at least 1"}],
    )
    unmeasured = result(
        device="iphone-a17-pro", target="coreml", latency=None, latency_note="no Core ML here", accuracy=None, gates=[]
    )
    return report(slow, unmeasured, warnings=["Calibrated on synthetic data"])


def test_the_page_has_the_numbers() -> None:
    page = Text(html(report())).text
    for number in ("resnet20", "272,474", "26.9 dB", "91.80 %", "−0.15 points", "312 kB", "1.09 MB", "0.642 ms"):
        assert number in page
    for number in ("2.10x", "2.05x to 2.16x", "31 int8 · 1 float", "2 conversions", "3,120 runs", "Cortex-A72"):
        assert number in page
    assert "The first jump is at int8-weights , most of it in fc, layer3.0.conv1" in page
    assert "left in float: the output feeds a comparison: softmax" in page


def test_slower_than_float_is_a_failure_in_red_and_in_words() -> None:
    page = html(slow_and_unmeasured())
    assert '<span class="bad-text">✕ 0.83x, slower</span>' in page
    text = Text(page).text
    assert "Slower than float" in text
    assert "Too unstable to compare (unstable timing: too wide)" in text
    assert "✕ 1 of 2 artifacts failed: jetson-orin-nano/onnx" in text


def test_what_was_not_measured_is_said() -> None:
    text = Text(html(slow_and_unmeasured())).text
    assert "Not measured: no Core ML here" in text
    assert "no labels" in text
    assert "No gate was set: nothing was judged here." in text


def test_warnings_stand_before_every_number_of_a_result() -> None:
    page = html(slow_and_unmeasured())
    assert page.index("Calibrated on synthetic data") < page.index('id="devices"')
    assert "Read this first" not in html(report())


def test_foreign_text_is_escaped_everywhere() -> None:
    evil = "<script>alert('x')</script>"
    drift = {
        "stages": [stage(evil, 40.0), stage("artifact", 20.0)],
        "layers": [{"layer": evil, "sqnr_db": 3.0}],
        "first_jump": {"stage": evil, "worst_layers": [evil]},
    }
    made = result(
        device=evil,
        recipe=evil,
        recipe_reason=evil,
        artifact=evil,
        executor=evil,
        drift=drift,
        placement={"int8_ops": 1, "float_ops": 1, "conversions": 0, "fallbacks": [{"node": evil, "reason": evil}]},
        gates=[{"gate": evil, "limit": 1, "value": None, "passed": False, "reason": evil}],
        ledger=[{"step": evil, "layer": evil, "action": evil, "reason": evil}],
        latency=latency(cpu=evil, where=evil, governor=evil),
    )
    page = html(report(made, model={"name": evil, "parameters": 1, "fingerprint": evil}, command=evil, warnings=[evil]))
    assert not [tag for tag, _ in Text(page).tags if tag == "script"]
    assert "&lt;script&gt;" in page


def test_the_report_and_both_views_are_written(tmp_path: Path) -> None:
    write_views(report(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(tmp_path / "report.json") == report()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html(report())
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(report())


def test_the_page_loads_nothing_from_anywhere() -> None:
    page = html(report())
    for tag, attributes in Text(page).tags:
        assert tag not in {"script", "link", "iframe", "img"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page


def test_bars_are_as_long_as_their_numbers() -> None:
    page = html(report(result(bytes=250, float_bytes=1000)))
    size = page[page.index("Size on disk</h3>") :]
    widths = re.findall(r'<rect class="(?:good|float)" x="0.00%" y="\d+" width="([\d.]+)%"', size)
    assert widths[:2] == ["25.00", "100.00"]


def test_undefined_drift_has_an_empty_bar_and_a_reason() -> None:
    nan = stage("artifact", float("nan"), cosine=None, max_abs=None, top1_agreement=None)
    page = html(report(result(drift={"stages": [stage("captured", None), nan]})))
    assert '<rect class="good" x="0" y="20" width="0.00%"' in page.replace('x="0.00%"', 'x="0"')
    assert "the values compared are not all finite" in page


def test_fallbacks_are_grouped_by_reason_most_frequent_first() -> None:
    nodes = [("a", "rare"), ("b", "often"), ("c", "often")]
    fallbacks = [{"node": n, "reason": r} for n, r in nodes]
    placement = {"int8_ops": 0, "float_ops": 3, "conversions": 0, "fallbacks": fallbacks}
    grouped = by_reason(Result.model_validate(result(placement=placement)))
    assert list(grouped.items()) == [("often", ["b", "c"]), ("rare", ["a"])]


@needs_chromium
def test_chromium_shows_the_numbers_and_draws_every_picture(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(slow_and_unmeasured()), encoding="utf-8")
    dom = chromium(page, "--dump-dom").stdout
    assert dom.count('<svg class="picture"') == 11  # six pictures, five where there is no latency
    assert "0.83x, slower" in dom
    shot = tmp_path / "shot.png"
    chromium(page, "--window-size=1200,1600", "--hide-scrollbars", f"--screenshot={shot}")
    with Image.open(shot) as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20) or []}
    # The colours of report.css: the verdict's fill, a good bar, a bad bar.
    assert {(0xFB, 0xE6, 0xE6), (0x2F, 0x7F, 0x86), (0xC4, 0x3D, 0x3D)} <= colours


@needs_chromium
def test_long_names_need_no_scrolling_sideways_on_a_phone(tmp_path: Path) -> None:
    layer = "encoder.transformer.layers.11.attention.self.query.projection.weight_quantized"
    drift = {"stages": [stage("artifact", 20.0)], "layers": [{"layer": layer, "sqnr_db": 3.0}]}
    placement = {
        "int8_ops": 1,
        "float_ops": 1,
        "conversions": 0,
        "fallbacks": [{"node": layer, "reason": "kept in float"}],
    }
    made = result(drift=drift, placement=placement, ledger=[{"step": "int8", "layer": layer, "action": "kept"}])
    (tmp_path / "report.html").write_text(html(report(made, command="x" * 300)), encoding="utf-8")
    assert width_on_a_phone(tmp_path / "report.html") <= PHONE
