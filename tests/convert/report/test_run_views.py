"""What a device did is in the page and in Markdown: where, what, how fast, which instructions, and what went wrong."""

import re

import pytest
from made_reports import device_run, instructions, report, result, stage
from test_html import Text
from three_devices import board_run, counted_run, failed_run, quantiles, three_by_three, timed, void_run

from convert.report import charts, run_pictures, run_words
from convert.report.html import html
from convert.report.markdown import markdown
from convert.report.measures import Latency
from convert.report.runs import DeviceRun, Instructions


def run(**changes: object) -> DeviceRun:
    return DeviceRun.model_validate(device_run(**changes))  # type: ignore[arg-type]


def page_of(*runs: dict[str, object]) -> str:
    base = result()
    stages = [*base["drift"]["stages"], *(r["drift"] for r in runs if r.get("drift"))]
    made = result(runs=list(runs), drift={**base["drift"], "stages": stages}, instructions=None)
    return html(report(made))


def test_a_device_is_a_stage_behind_the_artifact() -> None:
    page = page_of(counted_run("raspberry-pi-4b", 12.3, 30.0))
    waterfall = page[page.index("Where the signal is lost") :]
    assert waterfall.index(">artifact<") < waterfall.index(">on emulated:raspberry-pi-4b<")
    assert "32 samples" in Text(page).text
    assert re.search(r'<rect class="device" x="0.00%"', waterfall)


def test_a_real_board_shows_all_it_said() -> None:
    text = Text(page_of(board_run(6.1, 12.9))).text
    for words in (
        "ssh://pi@kitchen ✓ ran",
        "Raspberry Pi 4 Model B Rev 1.5 (real)",
        "99.40 % equal, largest difference 0.11",
        "6.10 ms",
        "2.11x as fast as float, 95 % interval 2.05x to 2.18x",
        "Loading the file took 12.5 ms, the first call 18.3 ms",
        "3.4 mJ for one inference",
        "96 MiB",
        "before 600 MHz 44.3 °C ondemand",
        "during 1800 MHz 48 to 51 °C",
        "After 10 minutes the median is 6.59 ms, 8% slower than in the first stretch; 70 °C at most.",
        "the governor is ondemand",
    ):
        assert words in text


def test_instructions_are_called_instructions_by_class() -> None:
    text = Text(page_of(counted_run("raspberry-pi-5", 12.0, 30.0, dots=90_000))).text
    assert "Instructions, not time: 12,000,000 for one inference, 0.40 of float's 30,000,000" in text
    assert "dot products of 8-bit numbers dot 90,000 0.8 %" in text
    assert "not measured, emulated: its time says nothing about the device" in text


def test_a_void_measurement_is_red_and_has_no_time() -> None:
    page = page_of(void_run())
    assert '<span class="chip bad">✕ void</span>' in page
    assert "The times do not count: the board was throttled (soft temperature limit)" in Text(page).text
    assert '<small class="bad-text">soft temperature limit</small>' in page


def test_throttling_is_red_even_where_times_count() -> None:
    states = [{"moment": "after", "throttled": "frequency capped"}]
    page = page_of(board_run(6.1, 12.9, board=states))
    assert '<span class="chip bad">✕ throttled</span>' in page
    assert "Slowed down while it ran: frequency capped" in Text(page).text


def test_a_device_that_loses_much_more_than_the_host_is_red() -> None:
    on = "ssh://pi@kitchen"
    page = page_of(board_run(6.1, 12.9, drift=stage(f"on {on}", 10.4, on=on, samples=64)))
    assert '<span class="bad-text">✕ 10.4 dB</span>' in page
    assert "It computes something else: 10.4 dB there, 26.9 dB on the host that converted" in Text(page).text
    assert "It computes something else" not in page_of(board_run(6.1, 12.9))


def test_a_curve_of_times_with_a_long_tail_ends_where_the_axis_does() -> None:
    slow = tuple(1.0 if i < 80 else 1.0 + (i - 79) for i in range(101))
    made = Latency.model_validate(timed(1.0, 1.0, p90_ms=12.0, p99_ms=21.0, quantiles_ms=slow, float_quantiles_ms=()))
    drawn = run_pictures.distribution(made, "int8")
    last = re.findall(r'<polyline class="curve good" points="([^"]*)"', drawn)[0].split()[-1]
    assert last == "1000.0,190.0"  # 81 % of the calls within three medians


def test_a_failed_run_says_why_and_shows_no_number() -> None:
    text = Text(page_of(failed_run())).text
    assert "✕ failed" in text
    assert "It did not run there. ssh://jetson has no runtime for .tflite files." in text


def test_a_report_without_runs_says_nothing_of_devices() -> None:
    text = Text(html(report(result(instructions=None)))).text
    assert "Where it ran" not in text
    assert "Instructions" not in text


def test_markdown_has_a_row_for_every_run_failures_first() -> None:
    text = markdown(three_by_three())
    rows = text[text.index("**On devices**") :].splitlines()
    assert "❌" in rows[4]
    assert len([row for row in rows if "ssh://" in row or "emulated:" in row]) >= 8
    assert "12.3 million 0.41 of float's" in text
    assert "**On devices**" not in markdown(report())


def test_foreign_text_of_a_run_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    made = board_run(6.1, 12.9, machine=evil, executor=evil, warnings=[evil], facts={evil: evil})
    made["board"] = [{"moment": evil, "governor": evil, "throttled": evil}]
    page = page_of(made, {**failed_run(), "failure": evil, "on": evil})
    assert "<script" not in page


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1_000, "1.00 thousand"), (12_345_678, "12.3 million"), (2.5e9, "2.50 billion")]
)
def test_instructions_are_counted_in_three_digits(value: float, text: str) -> None:
    assert run_words.count(int(value)) == text


def test_classes_that_were_not_told_apart_are_left_out() -> None:
    found = Instructions.model_validate(instructions(dot=None, mla=None))
    assert [name for name, *_ in run_words.classes(found)] == ["simd", "fmla", "load_store", "branch"]


def test_the_curve_of_times_reaches_half_of_the_calls_at_the_median() -> None:
    made = Latency.model_validate(timed(2.0, 4.0))
    drawn = run_pictures.distribution(made, "int8")
    end = 1.15 * quantiles(4.0, 0.03)[99]
    ours = re.findall(r'<polyline class="curve good" points="([^"]*)"', drawn)[0].split()
    x, y = (float(part) for part in ours[50].split(","))
    assert y == 500.0
    assert x == pytest.approx(1000 * 2.0 / end, abs=1.0)


def test_times_without_percentiles_have_no_curve() -> None:
    assert run_pictures.distribution(Latency.model_validate(timed(2.0, 4.0, quantiles_ms=())), "int8") == ""


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (26.9, 27.4, False), (0.3, 2.1, True), (5, 16, True), (1, 1e6, True)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float, log: bool) -> None:
    ticks = charts.Axis(low, high, log=log).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)


def test_an_axis_of_one_value_still_has_a_middle() -> None:
    axis = charts.around([3.0])
    assert axis.at(3.0) == pytest.approx(0.5)
    assert charts.around([0.0]).at(0.0) == pytest.approx(0.5)
