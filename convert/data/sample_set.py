"""The set of samples a source gives to a model: cast, checked value by value, fingerprinted, re-iterable."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Array, Batch
from convert.data.matching import Feed, named
from convert.data.source import Indices, Source, chunk_rows
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Some samples of a source, as the model takes them; a `CalibrationSet`.

    `indices` are positions in the source, sorted and unique. `notes` are facts a report should carry (casts, few
    samples). Memory does not grow with the number of samples, but for 8 bytes each for index and label.
    """

    source: Source
    feeds: tuple[Feed, ...]
    indices: Indices
    labels: NDArray[np.int64] | None = None
    synthetic: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images became arrays; None where the data came as arrays."""
        return self.source.preprocessing

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every input, in order of name; any container, any batch size.

        Reads the set once. Raises TightfitError for NaN, Inf, a negative index, or a number that does not fit.
        """
        digests = {feed.input.name: hashlib.sha256() for feed in self.feeds}
        start = 0
        for batch in self.batches(chunk_rows([self.source.columns[feed.column] for feed in self.feeds])):
            for feed in self.feeds:
                array = batch[feed.input.name]
                _check_values(array, feed, self.source.name, self.indices[start : start + len(array)])
                digests[feed.input.name].update(_little_endian(array))
            start += len(next(iter(batch.values())))
        total = hashlib.sha256()
        for feed in sorted(self.feeds, key=lambda feed: feed.input.name):
            name, shape = feed.input.name, [len(self), *feed.input.sample_shape]
            total.update(repr((name, feed.input.dtype, shape, digests[name].hexdigest())).encode())
        return total.hexdigest()

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield {input name: array [n, ...]} with n == size, but for the last batch."""
        if size < 1:
            raise ValueError(f"a batch needs at least one sample, not {size}")
        columns = list(dict.fromkeys(feed.column for feed in self.feeds))
        for batch in self.source.read(columns, self.indices, size):
            yield {feed.input.name: self._cast(batch[feed.column], feed) for feed in self.feeds}

    def select(self, indices: NDArray[np.int64]) -> "SampleSet":
        """Return the same stream with only the samples at these positions of this set (sorted, unique)."""
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= len(self) or (np.diff(chosen) <= 0).any()):
            raise ValueError(f"positions must be sorted, unique and within 0..{len(self) - 1}")
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, indices=self.indices[chosen], labels=labels)

    def _cast(self, array: Array, feed: Feed) -> Array:
        wanted = np.dtype(feed.input.dtype)
        if array.dtype == wanted:
            return array
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf, which the check of values names
            cast: Array = array.astype(wanted)
        if wanted.kind in "iub" and not np.array_equal(cast, array):
            raise TightfitError(
                f"{self.source.name}: {named(feed.column)} holds numbers that do not fit {wanted}, the dtype of the "
                f"input '{feed.input.name}'."
            )
        return cast


def _check_values(array: Array, feed: Feed, source: str, positions: Indices) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        sample = array[bad := _first(~np.isfinite(array))]
        kind = "NaN" if np.isnan(sample).any() else "Inf"
        raise TightfitError(
            f"{source}: {named(feed.column)} holds {kind}, first in sample {positions[bad]} (counted from 0). "
            "Ranges found with it would be worthless; repair or drop that sample."
        )
    if array.dtype in (np.int32, np.int64) and (negative := np.less(array, 0)).any():
        raise TightfitError(
            f"{source}: {named(feed.column)} holds negative numbers, first in sample {positions[_first(negative)]} "
            f"(counted from 0), but the input '{feed.input.name}' takes indices such as token ids. "
            "Replace padding like -100 by the tokenizer's padding id."
        )


def _first(bad: NDArray[np.bool_]) -> int:
    """The first row with anything bad in it."""
    return int(bad.reshape(len(bad), -1).any(1).argmax())


def _little_endian(array: Array) -> bytes:
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return ordered.tobytes()


def hold_out(data: SampleSet, fraction: float = 0.2, *, seed: int) -> tuple[SampleSet, SampleSet]:
    """Split at random into (calibration, evaluation), disjoint, at least one sample each. Needs two samples."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"a fraction lies between 0 and 1, not at {fraction}")
    if len(data) < 2:
        raise TightfitError(f"{data.source.name}: one sample cannot be split in two; give --evaluation its own data.")
    count = min(len(data) - 1, max(1, round(len(data) * fraction)))
    order = np.random.default_rng(seed).permutation(len(data))
    return data.select(np.sort(order[count:])), data.select(np.sort(order[:count]))


def take(data: SampleSet, count: int, *, seed: int) -> SampleSet:
    """Choose `count` samples at random (all when there are fewer), in the order they have."""
    if count < 1:
        raise ValueError(f"cannot take {count} samples")
    order: Sequence[int] = np.random.default_rng(seed).permutation(len(data))[:count].tolist()
    return data.select(np.sort(np.asarray(order, np.int64)))
