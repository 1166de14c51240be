"""Reading lines of JSON, and what is said about the line that is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from calibrate.samples import InputSpec
from convert.data import SampleSet, open_data, peek
from convert.errors import TightfitError

INPUTS = (InputSpec("ids", (1, 3), "int64"), InputSpec("x", (1, 2, 2), "float32"))


def line(number: int = 0) -> dict[str, object]:
    return {"ids": [number, 1, 2], "x": [[0.5, number], [1, -1]], "label": number % 3}


def written(folder: Path, *extra: object, count: int = 33) -> str:
    lines = [json.dumps(line(i)) for i in range(count)]
    lines += [e if isinstance(e, str) else json.dumps(e) for e in extra]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "data.jsonl")


def opened(folder: Path, *extra: object, inputs: tuple[InputSpec, ...] = INPUTS) -> SampleSet:
    return open_data(written(folder, *extra), inputs, work=folder)


def test_lines_become_arrays_of_the_inputs_dtypes(tmp_path: Path) -> None:
    data = opened(tmp_path)
    batches = list(data.batches(10))
    assert [len(b["x"]) for b in batches] == [10, 10, 10, 3]
    assert batches[1]["ids"].dtype == np.int64
    assert batches[1]["x"].dtype == np.float32
    assert np.array_equal(batches[1]["x"][2], [[0.5, 12], [1, -1]])
    assert data.labels is not None
    assert data.labels[:4].tolist() == [0, 1, 2, 0]
    assert data.notes == ()


def test_the_fingerprint_is_that_of_the_same_numbers_in_an_archive(tmp_path: Path) -> None:
    data = opened(tmp_path)
    np.savez(tmp_path / "data.npz", **next(data.batches(33)), y=data.labels)
    assert open_data(str(tmp_path / "data.npz"), INPUTS, work=tmp_path).fingerprint == data.fingerprint


def test_a_selection_reads_only_its_lines(tmp_path: Path) -> None:
    part = opened(tmp_path).select(np.array([2, 3, 30]))
    assert [b["ids"][:, 0].tolist() for b in part.batches(2)] == [[2, 3], [30]]


def test_blank_lines_are_no_samples(tmp_path: Path) -> None:
    assert len(opened(tmp_path, "", "   ", line(5))) == 34


def test_without_a_model_fractions_make_a_column_float(tmp_path: Path) -> None:
    batch = peek(written(tmp_path), work=tmp_path)
    assert {name: a.dtype.name for name, a in batch.items()} == {"ids": "int64", "x": "float32"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "this is no JSON"),
        ('{"a": ' + "[" * 100_000, "this is no JSON"),
        ("[1, 2]", "expected an object"),
        ({"ids": [0, 1, 2]}, "every line must have the same names"),
        (line() | {"ids": [1, 2]}, "has shape [2], in the first line [3]"),
        (line() | {"x": [[1, 2], [3]]}, "'x' is ragged"),
        (line() | {"ids": [1.5, 2, 3]}, "'ids' holds fractions"),
        (line() | {"ids": ["a", "b", "c"]}, "must hold numbers only"),
        (line() | {"ids": None}, "must hold numbers only"),
        (line() | {"ids": [2**70, 0, 0]}, "must hold numbers only"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, words: str) -> None:
    with pytest.raises(TightfitError) as caught:
        opened(tmp_path, bad)
    assert "line 34: " in str(caught.value)
    assert words in str(caught.value)


def test_numbers_beyond_the_inputs_dtype_are_refused(tmp_path: Path) -> None:
    narrow = (InputSpec("ids", (1, 3), "int32"), INPUTS[1])
    with pytest.raises(TightfitError, match="do not fit int32"):
        opened(tmp_path, line() | {"ids": [2**40, 0, 0]}, inputs=narrow)
    mask = (InputSpec("ids", (1, 3), "bool"), INPUTS[1])
    with pytest.raises(TightfitError, match="true and false"):
        opened(tmp_path, inputs=mask)


def test_the_values_json_allows_beside_numbers_are_found(tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match="NaN, first in sample 33"):
        opened(tmp_path, line() | {"x": [[float("nan"), 0], [0, 0]]})


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TightfitError, match="UTF-8"):
        open_data(str(tmp_path / "data.jsonl"), INPUTS, work=tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(TightfitError, match="holds no samples"):
        open_data(str(tmp_path / "data.jsonl"), INPUTS, work=tmp_path)
