"""The samples a model is calibrated and judged on, as a stream of batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Batch = dict[str, Array]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    `shape` includes the batch axis as axis 0; `dynamic_batch` says that axis 0 may take any length.
    `dtype` is a NumPy name: "float32", "int64", "bool", ...
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dynamic_batch: bool = True

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch axis."""
        return self.shape[1:]


class CalibrationSet(Protocol):
    """A re-iterable stream of samples: every call of `batches` starts again and yields the same arrays.

    Nothing holds the whole set in memory. `labels` are class indices (int64, one per sample) where known.
    """

    @property
    def labels(self) -> NDArray[np.int64] | None: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of every sample the set yields, hexadecimal."""
        ...

    @property
    def synthetic(self) -> bool:
        """True when the samples are random numbers that nobody measured."""
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield {input name: array [n, ...]} with n == size, but for the last batch."""
        ...

    def select(self, indices: NDArray[np.int64]) -> "CalibrationSet":
        """Return the same stream with only these samples (sorted positions), its fingerprint its own."""
        ...
