"""Samples from a user's function: run in a child interpreter, spooled, and its errors told."""

import sys
from pathlib import Path

import numpy as np
import pytest

from calibrate.samples import InputSpec
from convert.data import SampleSet, open_data, peek
from convert.data.factory import is_factory
from convert.errors import MissingDependency, TightfitError

SPEC = InputSpec("x", (1, 2), "float32")

CODE = """
import sys
import numpy as np

def dicts():
    print("talkative", file=sys.stderr)
    for i in range(40):
        yield {"x": np.full(2, i, np.float32)}

def pairs():
    return [(np.full(2, i, np.float32), i % 3) for i in range(40)]

def labelled():
    return [({"x": np.full(2, i, np.float32)}, np.int64(i % 3)) for i in range(40)]

def endless():
    i = 0
    while True:
        yield np.full(2, i, np.float32)
        i += 1

def chunky():
    for i in range(9):
        yield {"x": np.full((1 << 18) + 1, i, np.float64)}

def fails():
    yield np.ones(2)
    raise KeyError("no such record")

def dies():
    import os
    print("about to die", file=sys.stderr, flush=True)
    os._exit(3)

def nothing():
    return []

def changes():
    return [np.ones(2), np.ones(3)]

def renames():
    return [{"x": np.ones(2)}, {"z": np.ones(2)}]

def objects():
    return [np.array([{}], dtype=object)]

def triple():
    return [(1, 2, 3)]

def batches():
    return [np.ones((8, 2), np.float32)] * 4
"""


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the user's module in the working directory. Its name is one that our own script could shadow."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "images.py").write_text(CODE)
    monkeypatch.chdir(tmp_path / "user")


def drawn(function: str, work: Path, spec: InputSpec = SPEC, limit: int | None = None) -> SampleSet:
    return open_data(f"images:{function}", (spec,), work=work / "work", limit=limit)


def test_a_generator_of_dicts_is_read(tmp_path: Path) -> None:
    data = drawn("dicts", tmp_path)
    assert len(data) == 40
    assert np.array_equal(next(data.batches(3))["x"], [[0, 0], [1, 1], [2, 2]])
    assert next(data.batches(3))["x"].flags.writeable


@pytest.mark.parametrize("function", ["pairs", "labelled"])
def test_a_pair_carries_a_label(tmp_path: Path, function: str) -> None:
    data = drawn(function, tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [i % 3 for i in range(40)]
    assert data.fingerprint == drawn("dicts", tmp_path).fingerprint


def test_samples_larger_than_a_chunk_are_spooled_whole(tmp_path: Path) -> None:
    data = drawn("chunky", tmp_path, InputSpec("x", (1, (1 << 18) + 1), "float64"))
    for i, batch in enumerate(data.batches(1)):
        assert (batch["x"] == i).all()


def test_an_endless_generator_is_cut_at_the_limit(tmp_path: Path) -> None:
    assert len(drawn("endless", tmp_path, limit=33)) == 33
    assert peek("images:endless", work=tmp_path / "work")[""].shape == (4, 2)


def test_user_code_never_runs_in_this_process(tmp_path: Path) -> None:
    before = list(sys.path)
    drawn("dicts", tmp_path)
    assert "images" not in sys.modules
    assert sys.path == before
    assert not (tmp_path / "user" / "__pycache__").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("fails", "KeyError: 'no such record'"),
        ("fails", 'raise KeyError("no such record")'),
        ("dies", "exit code 3. Run the function by itself"),
        ("dies", "Its last words:\nabout to die"),
        ("nothing", "gave no sample"),
        ("changes", "all samples need one shape"),
        ("renames", "sample 1 has ['z'], sample 0 has ['x']"),
        ("objects", "holds object, not numbers"),
        ("triple", "is a tuple of 3"),
        ("absent", "has no 'absent'"),
        ("batches", "samples look like batches"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path: Path, function: str, words: str) -> None:
    with pytest.raises(TightfitError) as caught:
        drawn(function, tmp_path)
    assert words in str(caught.value)


def test_a_missing_module_and_a_missing_interpreter_are_told(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="there is no module 'nowhere'"):
        open_data("nowhere:data", (SPEC,), work=tmp_path / "work")
    with pytest.raises(MissingDependency, match="--python"):
        open_data("images:dicts", (SPEC,), work=tmp_path / "work", python=tmp_path / "no-python")


@pytest.mark.parametrize("source", ["a.npz", "C:\\data.npz", "module", "module:", "a-b:c", "./x:y"])
def test_a_path_is_no_factory(source: str) -> None:
    assert not is_factory(source)
    assert is_factory("package.module:function")
