"""Runs a user's `module:function` and writes the samples it gives as .npy files. Stand-alone: needs only NumPy.

    python spool_samples.py MODULE:FUNCTION FOLDER LIMIT

Run in a child interpreter (maybe another Python than ours, 3.8 or newer), so it imports nothing of ours.
LIMIT 0 means no limit. Writes FOLDER/<number>.npy, one per array, a chunk at a time, and at the end FOLDER/spool.json:
{"columns": {name: number}} or, when the user's side is at fault, {"error": sentence}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

CHUNK_BYTES = 4 << 20
HEADER_BYTES = 256
LABEL = "label"


class BadSample(Exception):
    """What the function gave is no sample."""


class Column:
    """One .npy file that grows; its header is written at the end, when the length is known."""

    def __init__(self, path: str, first: numpy.ndarray[Any, Any]) -> None:
        self.dtype, self.shape, self.length = first.dtype, first.shape, 0
        self._path = path
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        with open(path, "wb") as file:
            file.write(b"\0" * HEADER_BYTES)

    def add(self, array: numpy.ndarray[Any, Any]) -> None:
        """Append one sample."""
        self._waiting.append(array.tobytes())
        self._waiting_bytes += array.nbytes
        self.length += 1
        if self._waiting_bytes >= CHUNK_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the header (.npy format 1.0)."""
        import numpy

        self._flush()
        header = {
            "descr": numpy.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length, *self.shape),
        }
        text = repr(header).encode("latin1").ljust(HEADER_BYTES - 11) + b"\n"
        with open(self._path, "r+b") as file:
            file.write(b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text)

    def _flush(self) -> None:
        with open(self._path, "ab") as file:
            file.write(b"".join(self._waiting))
        self._waiting, self._waiting_bytes = [], 0


def array_of(value: Any, what: str) -> numpy.ndarray[Any, Any]:
    """A C-ordered NumPy array of numbers; takes arrays, torch tensors, numbers and nested lists."""
    import numpy

    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = numpy.asarray(value, order="C")
    except ValueError as error:
        raise BadSample(f"{what} is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise BadSample(f"{what} holds {array.dtype}, not numbers")
    return array


def sample_of(item: Any, number: int) -> dict[str, numpy.ndarray[Any, Any]]:
    """{name: array} of one item; an array without a name is called ""."""
    what = f"sample {number}"
    if isinstance(item, (tuple, list)):
        if len(item) != 2 or getattr(item[1], "ndim", 0) != 0 or isinstance(item[1], (tuple, list, dict)):
            kind = type(item).__name__
            raise BadSample(
                f"{what} is a {kind} of {len(item)}; give an array, a dict of arrays, or a pair (inputs, class index)"
            )
        sample = sample_of(item[0], number)
        if LABEL in sample:
            raise BadSample(f"{what} has two labels, one in the dict and one beside it")
        sample[LABEL] = array_of(item[1], f"{what}, the label")
        return sample
    if hasattr(item, "items"):
        return {str(name): array_of(value, f"{what}, '{name}'") for name, value in item.items()}
    return {"": array_of(item, what)}


def spool(samples: Iterable[Any], folder: str, limit: int) -> dict[str, int]:
    """Write every sample; returns {name: number of its file}."""
    columns: dict[str, Column] = {}
    for number, item in enumerate(samples):
        if limit and number == limit:
            break
        sample = sample_of(item, number)
        for name, array in sample.items():
            if number == 0:
                columns[name] = Column(os.path.join(folder, f"{len(columns)}.npy"), array)
            elif name in columns:
                check_like_first(array, columns[name], f"sample {number} has '{name}' as")
        if sample.keys() != columns.keys():
            raise BadSample(f"sample {number} has {sorted(sample)}, sample 0 has {sorted(columns)}")
        for name, array in sample.items():
            columns[name].add(array)
    for column in columns.values():
        column.close()
    return {name: number for number, name in enumerate(columns)}


def check_like_first(array: numpy.ndarray[Any, Any], first: Column, what: str) -> None:
    """All samples have the shape and the dtype of the first."""
    if array.shape != first.shape or array.dtype != first.dtype:
        raise BadSample(
            f"{what} {array.dtype} {list(array.shape)}, sample 0 as {first.dtype} {list(first.shape)}; "
            "all samples need one shape and one dtype"
        )


def samples_of(reference: str) -> Iterator[Any]:
    """Import the user's function and call it."""
    import importlib

    module_name, _, function_name = reference.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or module_name.split(".")[0] != error.name:
            raise
        raise BadSample(
            f"there is no module '{module_name}' (looked in {os.getcwd()}, PYTHONPATH and the packages of "
            f"{sys.executable}). Run from its folder, or put that folder on PYTHONPATH"
        ) from error
    if not hasattr(module, function_name):
        raise BadSample(f"the module '{module_name}' ({module.__file__}) has no '{function_name}'")
    found = getattr(module, function_name)
    return iter(found() if callable(found) else found)


def failure(error: Exception, reference: str) -> str:
    """Type, message and the last line of the traceback that is the user's."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{reference} failed with {type(error).__name__}: {error}{where}"


def main(reference: str, folder: str, limit: int) -> None:
    """Spool, and say in spool.json how it went."""
    result: dict[str, Any]
    try:
        result = {"columns": spool(samples_of(reference), folder, limit)}
    except BadSample as error:
        result = {"error": f"{reference}: {error}"}
    except SystemExit as error:
        result = {"error": f"{reference} ended the interpreter: it called sys.exit({error.code!r})"}
    except Exception as error:
        result = {"error": failure(error, reference)}
    with open(os.path.join(folder, "spool.json"), "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    # The folder of this script is none of the user's business, and its files must not shadow the user's modules.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != own]
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
