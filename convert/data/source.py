"""What every kind of data gives: named columns of samples, read in order, a few rows at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Array, Batch
from convert.preprocessing import Preprocessing

Indices = NDArray[np.int64]

UNNAMED = ""
"""The name of a column that the data has no name for: it feeds the model's only input."""

LABEL_NAMES = ("labels", "label", "y")
"""Names that hold class indices when no input of the model has that name."""

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Column:
    """One array of a data set. `shape` is one sample's; `length` counts the samples."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    length: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one sample."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Source(Protocol):
    """One opened file, folder or spool. `name` is what error messages call it."""

    name: str

    @property
    def columns(self) -> Mapping[str, Column]:
        """Every array there is, labels included."""
        ...

    @property
    def labels(self) -> Array | None:
        """Class indices that are no column: the folder names of images."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None: ...

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        """Yield the rows at `indices` (sorted, unique) of these columns, `size` at a time, as fresh arrays."""
        ...


def pieces(indices: Indices, size: int) -> Iterator[Indices]:
    """Cut `indices` into groups of `size`, the last one shorter."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def runs(indices: Indices) -> Iterator[tuple[int, int]]:
    """The maximal ranges [start, stop) of consecutive numbers in sorted `indices`."""
    if len(indices):
        for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1


def chunk_rows(columns: Sequence[Column]) -> int:
    """How many samples of these columns fit in `CHUNK_BYTES`, at least one."""
    return max(1, CHUNK_BYTES // max(1, sum(c.row_bytes for c in columns)))
