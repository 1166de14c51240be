"""Random samples, for a first look at a model without data; every result made with them says so."""

from collections.abc import Iterator, Sequence

import numpy as np

from calibrate.samples import Array, Batch, InputSpec
from convert.data.source import Column, Indices, pieces
from convert.preprocessing import Preprocessing


class SyntheticSource:
    """Standard-normal floats; integers and booleans 0 or 1, which every vocabulary and every mask has.

    A sample depends on seed and position only, so that any selection and any batch size give the same arrays.
    """

    name = "synthetic data"

    def __init__(self, inputs: Sequence[InputSpec], samples: int, seed: int) -> None:
        self.labels: Array | None = None
        self.preprocessing: Preprocessing | None = None
        self._seed = seed
        self.columns = {i.name: Column(np.dtype(i.dtype), i.sample_shape, samples) for i in inputs}

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        for piece in pieces(indices, size):
            yield {name: np.stack([self._sample(name, int(i)) for i in piece]) for name in names}

    def _sample(self, name: str, index: int) -> Array:
        column = self.columns[name]
        generator = np.random.default_rng([self._seed, list(self.columns).index(name), index])
        if column.dtype.kind == "f":
            return generator.standard_normal(column.shape).astype(column.dtype)
        return generator.integers(0, 2, column.shape).astype(column.dtype)
