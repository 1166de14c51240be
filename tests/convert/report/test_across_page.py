"""The page across conversions: verdict, choices, pictures; and the schema that the documents show."""

import csv
import json
import re
from pathlib import Path

import pytest
from made_reports import report, result, stage
from test_across import drift, of, pi, side_by_side
from test_html import Text
from three_devices import board_run, three_by_three

from convert.report.across import pictures
from convert.report.across.page import page, verdict
from convert.report.across.schema import Across, Entry
from convert.report.across.table import table

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_says_what_meets_what_is_best_and_why() -> None:
    text = Text(page(side_by_side(three_by_three(0.9), three_by_three()))).text
    for words in (
        "✓ Every device has an artifact that passed every gate; 2 of 9 artifacts fail.",
        "raspberry-pi-4b ✓ 2 tflite int8 out-2/raspberry-pi-4b/resnet20.tflite Fastest on ssh://pi@kitchen: 6.10 ms",
        "5: min_sqnr_db: 18.3, wanted at least 20",
        "7 on ssh://jetson: void, the board was throttled",
        "8: runs on ssh://jetson: ssh://jetson has no runtime",
        "fc : in 9 of 9",
        "Size: 281 kB before, 312 kB now",
        "Times: ssh://pi@kitchen. Instructions: emulated:raspberry-pi-4b.",
    ):
        assert words in text


def test_the_verdict_names_the_device_that_has_nothing() -> None:
    gate = {"gate": "min_sqnr_db", "limit": 30, "value": 26.9, "passed": False, "reason": "26.9, wanted at least 30"}
    made = of(pi("onnx"), result(device="raspberry-pi-5", instructions=None, gates=[gate]))
    assert verdict(made) == ("bad", "No artifact passed every gate for raspberry-pi-5; 1 of 2 have one")
    assert verdict(of(pi("onnx", gates=[])))[0] == "none"


def test_an_estimate_stands_where_nothing_was_timed_and_decides_nothing() -> None:
    guess = {"low_ms": 0.001, "mid_ms": 0.002, "high_ms": 0.003, "basis": "a fit", "fitted_on": 7}
    counted = result(target="onnx", estimate=guess)
    timed = result(target="tflite", estimate=guess, runs=[board_run(6.1, 14.0)])
    made = of(counted, timed)
    text = Text(page(made)).text
    assert text.count("estimate 2.00 µs 1.00 µs to 3.00 µs, not measured") == 1
    assert "6.10 ms" in text
    alone = of(
        result(target="onnx", estimate=guess, instructions=None), result(target="tflite", instructions=None, bytes=1)
    )
    assert [choice.entry for choice in alone.choices] == [2], "the smaller one, however fast the other is said to be"
    rows = list(csv.DictReader(table(alone).splitlines()))
    assert [row["estimate_mid_ms"] for row in rows] == ["0.002", ""]


def test_two_models_are_told_apart() -> None:
    other = report(pi("onnx"), model={"name": "vit", "parameters": 5, "fingerprint": "0"})
    made = side_by_side(report(pi("onnx")), other)
    assert len(made.choices) == 2
    assert "raspberry-pi-4b vit" in Text(page(made)).text


def test_the_page_across_loads_nothing_and_keeps_text_text() -> None:
    evil = "<script>alert(1)</script>"
    run = board_run(6.0, 12.0, evil, machine=evil, executor=evil)
    made = of(
        pi("onnx", recipe=evil, device=evil, runs=[run]),
        model={"name": evil, "parameters": 1, "fingerprint": evil},
        warnings=[evil],
        command=evil,
    )
    text = page(made)
    assert "<script" not in text
    assert "url(" not in text
    for tag, attributes in Text(text).tags:
        assert tag not in {"script", "link", "iframe", "img"}
        assert (attributes.get("href") or "#").startswith("#")


def test_a_device_that_computes_something_else_is_told_in_red() -> None:
    run = board_run(6.0, 12.0, drift=stage("on ssh://pi@kitchen", 10.4, on="ssh://pi@kitchen", samples=64))
    text = page(of(pi("onnx", runs=[run])))
    assert 'class="bad-text">1 on ssh://pi@kitchen: 10.4 dB there, 26.9 dB on the host' in text


def spots(*numbers: tuple[float, float, str]) -> list[pictures.Spot]:
    made = of(*(pi("onnx", device=f"d{i}") for i in range(len(numbers))))
    return [
        pictures.Spot(Entry.model_copy(e, update={"judgement": judged}), x, db)
        for e, (x, db, judged) in zip(made.entries, numbers, strict=True)
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    found = spots((0.3, 30, "meets"), (0.2, 25, "meets"), (0.3, 25, "meets"), (0.1, 40, "fails"))
    assert [s.entry.number for s in pictures.front(found, smaller=True)] == [1, 2]
    assert [s.entry.number for s in pictures.front(found, smaller=False)] == [1]


def test_equal_ones_are_both_on_the_front() -> None:
    assert len(pictures.front(spots((0.3, 30, "meets"), (0.3, 30, "meets")), smaller=True)) == 2


def test_points_that_lie_on_each_other_share_a_label() -> None:
    made = of(pi("onnx"), result(device="raspberry-pi-5", target="onnx"), pi("tflite", bytes=900_000))
    labels = re.findall(r'<text class="spot"[^>]*>([^<]*)<', pictures.by_size(made.entries))
    assert labels == ["1, 2", "3"]


def test_an_unstable_speed_is_marked_and_beats_nothing() -> None:
    made = side_by_side(three_by_three())
    drawn = pictures.by_speed(made.entries, "host: Cortex-A72 (aarch64)")
    assert "7~" in drawn
    assert re.search(r'<circle class="float" r="5"/><text[^>]*>7~<', drawn)


def test_a_void_time_is_drawn_nowhere() -> None:
    made = side_by_side(three_by_three())
    assert "ssh://jetson" not in pictures.timed_places(made.entries)
    assert "7 jetson" not in pictures.strips(made.entries, "ssh://pi@kitchen")


def test_strips_stand_fastest_first() -> None:
    made = side_by_side(three_by_three())
    drawn = pictures.strips(made.entries, "ssh://pi@kitchen")
    assert drawn.index(">2 raspberry-pi-4b/tflite<") < drawn.index(">1 raspberry-pi-4b/onnx<")


def test_drift_without_a_number_is_left_out_of_the_points() -> None:
    made = of(pi("onnx", drift=drift(float("nan"))))
    assert "Nothing to draw" in pictures.by_size(made.entries)
    assert "undefined" in page(made)


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    committed = json.loads((DOCS / "across.schema.json").read_text(encoding="utf-8"))
    assert committed == Across.model_json_schema(mode="serialization"), "write it again, see docs/report.md"


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"kind": "report"}, {"entries": []}, {"surprise": 1}])
def test_what_is_no_report_across_is_refused(change: dict[str, object]) -> None:
    data = side_by_side(three_by_three()).model_dump(mode="json")
    assert Across.model_validate(data)
    with pytest.raises(ValueError, match=next(iter(change))):
        Across.model_validate(data | change)
