"""docs/check.md and the sample CI files say what the code does."""

import re
from pathlib import Path

import pytest

from convert.budget import read_budget
from convert.gates import GATES
from targets import faults

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_budget_in_the_manual_can_be_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (DOCS / "check.md").read_text(), re.DOTALL)
    path = tmp_path / "budget.toml"
    path.write_text(block)
    budget = read_budget(path)
    assert budget.on["ssh://pi@kitchen"] == {"max_p50_ms": 15}
    limits = budget.limits("raspberry-pi-4b", "onnx")
    assert limits == {"max_accuracy_drop": 0.005, "max_bytes": 400_000, "max_size_ratio": 0.5, "require_match": 1.0}


def test_the_manual_names_every_gate_and_every_fault() -> None:
    text = (DOCS / "check.md").read_text()
    names = [*GATES, *faults.find("onnx"), "shuffled-inputs", "integrity", "runs", "reproduces", "record"]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", ["action/action.yml", "gitlab.yml"])
def test_sample_ci_gives_options_that_exist(name: str) -> None:
    from typer.main import get_command

    from convert.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    known = {o for c in ("convert", "check") for p in commands[c].params for o in p.opts}
    lines = (DOCS / "ci" / name).read_text().splitlines()
    ours = [line for line in lines if re.search(r"tightfit (convert|check) |budget|--baseline|options=", line)]
    used = {option for line in ours for option in re.findall(r"--[a-z][a-z-]*| -o ", line)}
    assert used >= {"--budget", "--self-test", "--baseline", "--device", "--calibration"}
    assert {option.strip() for option in used} <= known
