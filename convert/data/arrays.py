"""Arrays in memory as a source: the first samples of a data set, while a model is captured with them."""

from collections.abc import Iterator, Sequence

from calibrate.samples import Array, Batch
from convert.data.source import Column, Indices, pieces
from convert.preprocessing import Preprocessing


class ArraySource:
    """`arrays` by name, [samples, ...] each; `name` is what error messages call them."""

    def __init__(self, name: str, arrays: Batch) -> None:
        self.name = name
        self.labels: Array | None = None
        self.preprocessing: Preprocessing | None = None
        self._arrays = arrays
        self.columns = {n: Column(a.dtype, a.shape[1:], len(a)) for n, a in arrays.items()}

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        for piece in pieces(indices, size):
            yield {name: self._arrays[name][piece] for name in names}
