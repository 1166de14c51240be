"""`.npy`: one array, memory-mapped; its name is the model's only input."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibrate.samples import Array, Batch
from convert.data.source import UNNAMED, Column, Indices, pieces
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing


class NpySource:
    """Arrays of .npy files by name, all memory-mapped."""

    def __init__(self, name: str, files: Mapping[str, Path]) -> None:
        self.name = name
        self.labels: Array | None = None
        self.preprocessing: Preprocessing | None = None
        self._arrays = {column: mapped(path) for column, path in files.items()}
        self.columns = {
            column: Column(array.dtype, array.shape[1:], array.shape[0]) for column, array in self._arrays.items()
        }

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        for piece in pieces(indices, size):
            yield {name: np.ascontiguousarray(self._arrays[name][piece]) for name in names}


def mapped(path: Path) -> Array:
    """Memory-map an .npy file of at least one axis; refuses pickled objects and truncated files."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _refusal(path, error) from error
    if not isinstance(array, np.ndarray):
        raise TightfitError(f"{path} is no .npy file but an .npz archive; rename it to {path.stem}.npz.")
    if array.dtype.hasobject:
        raise TightfitError(object_refusal(str(path)))
    if array.ndim == 0:
        raise TightfitError(f"{path} holds a single number; the first axis of an array must count the samples.")
    return array


def object_refusal(what: str) -> str:
    """The paragraph that refuses an array of Python objects."""
    return (
        f"{what} holds Python objects (a pickle), which can run code when it is read, so it was not read. "
        "Save plain numbers instead: np.save(path, np.asarray(samples, dtype=np.float32))."
    )


def _refusal(path: Path, error: Exception) -> TightfitError:
    text = str(error)
    if "pickle" in text.lower() and _starts_as_npy(path):
        return TightfitError(object_refusal(str(path)))
    if not _starts_as_npy(path):
        return TightfitError(
            f"{path} is no .npy file (it does not start as one). Write it with np.save; "
            "for several arrays use np.savez and a .npz."
        )
    return TightfitError(f"{path} is damaged or cut short ({text}); copy it again or write it anew with np.save.")


def _starts_as_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def open_npy(path: Path) -> NpySource:
    """One unnamed column."""
    return NpySource(str(path), {UNNAMED: path})
