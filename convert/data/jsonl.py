"""`.jsonl`: one object of named arrays per line, one line per sample; class indices under "label"."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibrate.samples import Array, Batch
from convert.data.source import Column, Indices, pieces
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing


class JsonlSource:
    """The lines of one file. Opening reads it once, to count and to see that every line is like the first.

    JSON has no number formats: a column takes the dtype of the input it feeds, in `dtypes`; a column that feeds none is
    float32 when its first line holds a fraction, else bool or int64.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, str]) -> None:
        self.name = str(path)
        self.labels: Array | None = None
        self.preprocessing: Preprocessing | None = None
        self._path = path
        self._dtypes: dict[str, np.dtype[np.generic]] = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        length = sum(1 for _ in self._samples())
        if length == 0:
            raise TightfitError(f"{path} holds no samples.")
        self.columns = {name: Column(self._dtypes[name], shape, length) for name, shape in self._shapes.items()}

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        samples = enumerate(self._samples())
        for piece in pieces(indices, size):
            wanted = set(piece.tolist())
            rows: list[Batch] = []
            while len(rows) < len(piece):
                position, sample = next(samples)
                if position in wanted:
                    rows.append(sample)
            yield {name: np.stack([row[name] for row in rows]) for name in names}

    def _samples(self) -> Iterator[Batch]:
        with self._path.open(encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._sample(line, number)
            except UnicodeDecodeError as error:
                raise TightfitError(
                    f"{self._path} is no text in UTF-8 ({error}); a .jsonl is one JSON object a line."
                ) from error

    def _sample(self, line: str, number: int) -> Batch:
        where = f"{self._path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TightfitError(
                f"{where}: this is no JSON ({error}). Each line is one object, like {_EXAMPLE}"
            ) from error
        if not isinstance(record, dict) or not record:
            raise TightfitError(f"{where}: expected an object of named arrays, like {_EXAMPLE}")
        if self._shapes and record.keys() != self._shapes.keys():
            raise TightfitError(
                f"{where}: has {_listed(record)}, but the first line has {_listed(self._shapes)}; "
                "every line must have the same names."
            )
        sample = {name: self._array(name, values, where) for name, values in record.items()}
        self._shapes = self._shapes or {name: array.shape for name, array in sample.items()}
        return sample

    def _array(self, name: str, values: object, where: str) -> Array:
        try:
            array: Array = np.asarray(values)
        except (ValueError, OverflowError) as error:
            raise TightfitError(f"{where}: '{name}' is ragged; nested lists must all have the same length.") from error
        if array.dtype.kind not in "biuf" or array.dtype.kind == "u":  # "u": above int64
            raise TightfitError(f"{where}: '{name}' must hold numbers only (of at most 64 bits), in lists of lists.")
        dtype = self._dtypes.setdefault(name, np.dtype({"b": "bool", "f": "float32"}.get(array.dtype.kind, "int64")))
        if array.dtype.kind == "f" and dtype.kind != "f":
            raise TightfitError(f"{where}: '{name}' holds fractions, but {dtype} is wanted; write whole numbers.")
        if dtype.kind in "iu" and not _fits(array, dtype):
            raise TightfitError(f"{where}: '{name}' holds numbers that do not fit {dtype}.")
        if dtype.kind == "b" and not np.isin(array, (0, 1)).all():
            raise TightfitError(f"{where}: '{name}' feeds a bool input; write true and false, or 1 and 0.")
        if name in self._shapes and array.shape != self._shapes[name]:
            raise TightfitError(
                f"{where}: '{name}' has shape {list(array.shape)}, in the first line {list(self._shapes[name])}; "
                "pad or cut every sample to one shape."
            )
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the check of values names
            return array.astype(dtype)


_EXAMPLE = '{"input_ids": [101, 2054, 102], "label": 1}'


def _fits(array: Array, dtype: np.dtype[np.generic]) -> bool:
    limits = np.iinfo(str(dtype))
    return array.size == 0 or bool(array.min() >= limits.min and array.max() <= limits.max)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def open_jsonl(path: Path, dtypes: Mapping[str, str]) -> JsonlSource:
    """The columns of a .jsonl file; `dtypes` by input name."""
    return JsonlSource(path, dtypes)
