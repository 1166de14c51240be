"""`tightfit check` on real conversions: sound ones pass, a flipped bit, a tighter budget or a fault does not."""

import shutil
from pathlib import Path

import pytest
from real_conversions import Made
from typer.testing import CliRunner

from convert.cli import app
from targets import faults

pytestmark = pytest.mark.slow


def check(out: Path, *options: str) -> int:
    """The exit code of `tightfit check OUT ...`; what is no verdict at all is an error."""
    done = CliRunner().invoke(app, ["check", str(out), *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of a conversion's folder, to be changed."""
    assert made.code == 0, made.complaints
    return Path(shutil.copytree(made.out, tmp_path / "out"))


@pytest.mark.parametrize("made", ["resnet20", "vit"], indirect=True)
def test_what_convert_wrote_passes(copy: Path) -> None:
    assert check(copy) == 0
    assert (copy / "check.xml").is_file()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("made", ["resnet20"], indirect=True)
def test_one_bit_of_a_weight_fails_in_every_format(made: Made, copy: Path, number: int) -> None:
    result = made.report.results[number]
    faults.find(result.target)["flipped-bit"](copy / result.artifact)
    assert differing_bytes(made.out / result.artifact, copy / result.artifact) == 1
    assert check(copy) == 1


def differing_bytes(one: Path, other: Path) -> int:
    """How many bytes of an artifact, file or folder, differ."""
    names = [p.relative_to(one) for p in one.rglob("*") if p.is_file()] if one.is_dir() else [Path()]
    pairs = [((one / name).read_bytes(), (other / name).read_bytes()) for name in names]
    assert all(len(a) == len(b) for a, b in pairs)
    return sum(x != y for a, b in pairs for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("made", ["resnet20"], indirect=True)
def test_a_budget_passes_as_measured_and_fails_tightened(made: Made, copy: Path, tmp_path: Path) -> None:
    largest = max(r.bytes for r in made.report.results)
    budget = tmp_path / "budget.toml"
    budget.write_text(f"version = 1\n[gates]\nmax_bytes = {largest}\nmax_accuracy_drop = 0.005\n")
    assert check(copy, "--budget", str(budget)) == 0
    budget.write_text(f"version = 1\n[gates]\nmax_bytes = {largest - 1}\nmax_accuracy_drop = 0.005\n")
    assert check(copy, "--budget", str(budget)) == 1


@pytest.mark.parametrize("made", ["resnet20", "vit"], indirect=True)
def test_every_fault_is_noticed(copy: Path) -> None:
    assert check(copy, "--self-test") == 0


@pytest.mark.parametrize("made", ["minilm-iphone"], indirect=True)
def test_a_sentence_encoder_is_checked_like_any_other(copy: Path) -> None:
    assert check(copy) == 0
