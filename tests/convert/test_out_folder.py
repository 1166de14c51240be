"""The folder of results: whole or not there."""

from pathlib import Path

import pytest

from convert.errors import TightfitError
from convert.out_folder import written_whole
from convert.output import reference_count


def test_what_is_written_appears_at_the_end_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_whole(out) as folder:
        (folder / "report.json").write_text("{}")
        assert not out.exists()
    assert (out / "report.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "out") as folder:
            (folder / "part").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_a_strangers_is_never_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(TightfitError, match="--force"), written_whole(out):
        pass
    with pytest.raises(TightfitError, match="not made by Tightfit"), written_whole(out, force=True):
        pass
    assert (out / "thesis.txt").read_text() == "mine"


def test_force_replaces_an_earlier_result_and_a_failure_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_whole(out) as folder:
        (folder / "report.json").write_text("1")

    def fail() -> None:
        with written_whole(out, force=True):
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert (out / "report.json").read_text() == "1"
    with written_whole(out, force=True) as folder:
        (folder / "report.json").write_text("2")
    assert (out / "report.json").read_text() == "2"


@pytest.mark.parametrize(
    ("sample_bytes", "available", "batch", "count"),
    [(10, 1000, 1, 64), (10, 5, 1, 5), (2**24, 100, 1, 4), (10, 100, 24, 48)],
)
def test_the_reference_is_small_and_a_multiple_of_the_batch(
    sample_bytes: int, available: int, batch: int, count: int
) -> None:
    assert reference_count(sample_bytes, available, batch) == count
