"""`tightfit report` on the command line: what it prints, what it exits with, and what it refuses."""

import json
from pathlib import Path

from command_line import Tightfit
from three_devices import three_by_three, write

from convert.report.across.schema import Across


def test_two_folders_become_one_page(tightfit: Tightfit, desk: Path) -> None:
    write(desk / "monday", three_by_three(0.9))
    write(desk / "tuesday")
    said = tightfit("report monday tuesday")
    assert said.code == 0
    assert "fastest on ssh://pi@kitchen: 6.10 ms" in " ".join(said.out.split())
    assert "worse than before raspberry-pi-4b/coreml: size: 306 kB before, 340 kB now" in " ".join(said.out.split())
    assert (desk / "tightfit-report" / "report.html").is_file()


def test_json_is_the_report_that_was_written(tightfit: Tightfit, desk: Path) -> None:
    write(desk / "out")
    said = tightfit("report out -o across --json")
    assert Across.model_validate_json(said.out) == Across.model_validate_json(
        (desk / "across" / "report.json").read_bytes()
    )
    assert json.loads(said.out)["command"] == "tightfit report out -o across --json"


def test_a_failing_artifact_is_no_failure_of_the_report(tightfit: Tightfit, desk: Path) -> None:
    write(desk / "out")
    (desk / "budget.toml").write_text("version = 1\n[gates]\nmin_sqnr_db = 60\n")
    said = tightfit("report out --budget budget.toml")
    assert said.code == 0
    assert "No artifact meets the budget for raspberry-pi-4b" in " ".join(said.out.split())


def test_wrong_input_exits_with_2_and_leaves_nothing(tightfit: Tightfit, desk: Path) -> None:
    write(desk / "out")
    before = sorted(desk.iterdir())
    for arguments, words in (
        ("report", "missing argument"),
        ("report nowhere", "there is no folder nowhere"),
        ("report out out", "given twice"),
        ("report out --budget none.toml", "cannot read the budget none.toml"),
        ("report out -o out --force", "will not delete it"),
        ("report out -o .", "is the folder you are in"),
    ):
        said = tightfit(arguments)
        assert said.code == 2, arguments
        assert words in " ".join(said.err.split()).lower() or words in " ".join(said.err.split())
    assert sorted(desk.iterdir()) == before
