"""`.npz`: arrays by input name. Members are read in order, row by row, and never loaded whole."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from calibrate.samples import Array, Batch
from convert.data.npy import object_refusal
from convert.data.source import CHUNK_BYTES, Column, Indices, pieces, runs
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing


class NpzSource:
    """The arrays of one archive. Opening reads the headers only."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.labels: Array | None = None
        self.preprocessing: Preprocessing | None = None
        self._path = path
        with _damage_named(path), zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            for member in members:
                if not member.filename.endswith(".npy"):
                    raise TightfitError(f"{path} holds '{member.filename}', which is no array; write it with np.savez.")
            self.columns = {m.filename.removesuffix(".npy"): self._column(archive, m) for m in members}

    def _column(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Column:
        with archive.open(member) as stream:
            column = read_header(stream, f"the array '{member.filename.removesuffix('.npy')}' in {self._path}")
            found = member.file_size - stream.tell()
        wanted = column.length * column.row_bytes
        if found != wanted:
            raise TightfitError(
                f"{self._path} is damaged: '{member.filename}' should hold {wanted} bytes and holds {found}. "
                "Write the archive anew with np.savez."
            )
        return column

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        with _damage_named(self._path), ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            rows = {}
            for name in names:
                stream = stack.enter_context(archive.open(f"{name}.npy"))
                rows[name] = _Rows(stream, read_header(stream, name))
            for piece in pieces(indices, size):
                yield {name: rows[name].take(piece) for name in names}
            for array in rows.values():
                array.finish()


class _Rows:
    """Rows of one array, read forward from a stream."""

    def __init__(self, stream: IO[bytes], column: Column) -> None:
        self._stream = stream
        self._column = column
        self._next = 0

    def take(self, indices: Indices) -> Array:
        row = self._column.row_bytes
        data = bytearray(len(indices) * row)
        view, filled = memoryview(data), 0
        for start, stop in runs(indices):
            self._skip((start - self._next) * row)
            count = (stop - start) * row
            self._fill(view[filled : filled + count])
            filled += count
            self._next = stop
        return np.frombuffer(data, self._column.dtype).reshape(len(indices), *self._column.shape)

    def finish(self) -> None:
        """Read to the end, where the checksum is compared: a damaged file must not pass for want of reading."""
        while self._stream.read(CHUNK_BYTES):
            pass

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._read(min(count, CHUNK_BYTES)))

    def _fill(self, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            part = self._read(min(len(view) - filled, CHUNK_BYTES))
            view[filled : filled + len(part)] = part
            filled += len(part)

    def _read(self, count: int) -> bytes:
        part = self._stream.read(count)
        if not part:
            raise EOFError("the data ends early")
        return part


def read_header(stream: IO[bytes], what: str) -> Column:
    """Read the .npy header at the start of `stream`. Refuses objects, single numbers and column-major order."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise TightfitError(f"{what} is written in .npy format {version}, which holds no plain numbers; use np.savez.")
    shape, column_major, dtype = readers[version](stream)
    if dtype.hasobject:
        raise TightfitError(object_refusal(what))
    if len(shape) == 0:
        raise TightfitError(f"{what} is a single number; the first axis of an array must count the samples.")
    if column_major and len(shape) > 1:
        raise TightfitError(
            f"{what} is stored column by column, so its samples cannot be read one by one; "
            "save np.ascontiguousarray(array)."
        )
    return Column(dtype, tuple(shape[1:]), shape[0])


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise TightfitError(
            f"{path} is no readable .npz archive: it is damaged, cut short or encrypted ({error}). "
            "Copy it again or write it anew with np.savez."
        ) from error


def open_npz(path: Path) -> NpzSource:
    """The arrays of one archive by name."""
    return NpzSource(path)
