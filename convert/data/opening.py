"""From what a user writes after --calibration to a checked set of samples."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Array, Batch, InputSpec
from convert.data.matching import Feed, label_column, match, named
from convert.data.sample_set import SampleSet
from convert.data.source import Column, Source, chunk_rows
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing

FEWEST, FEW = 2, 32
PEEK = 4


def open_data(
    source: str,
    inputs: Sequence[InputSpec] | None,
    *,
    labels: str | None = None,
    limit: int | None = None,
    python: Path | None = None,
    work: Path,
    preprocessing: Path | Preprocessing | None = None,
) -> SampleSet:
    """Open, match to the model's `inputs`, and check every value once.

    `source`: a .npz, .npy or .jsonl file, a folder of images, or `module:function` (run by `python`, spooled in
    `work`). `inputs` None: the data's own names, shapes and dtypes stand. `labels`: the name of an array in the data,
    or a .npy file. `limit`: at most so many samples, evenly spaced over the source (the first ones of a function, which
    may be endless). `preprocessing`: for images, instead of the folder's preprocessing.toml.
    Raises TightfitError for everything that is wrong with the data.
    """
    if limit is not None and limit < FEWEST:
        raise TightfitError(f"{limit} sample is too few; allow at least {FEWEST}.")
    opened = open_source(source, inputs, limit=limit, python=python, work=work, preprocessing=preprocessing)
    label_file = _label_file(labels, opened)
    column = None if label_file is not None else label_column(opened.columns, inputs, labels)
    feeds, notes = match(opened, inputs if inputs is not None else _own_inputs(opened, column), column)
    length = opened.columns[feeds[0].column].length
    _check_count(opened.name, length)
    truth = _labels(opened, column, label_file, length)
    if length < FEW:
        notes.append(f"only {length} samples: ranges found on so few are unreliable; {FEW} or more are better")
    whole = SampleSet(opened, feeds, np.arange(length), truth, notes=tuple(notes))
    data = whole if limit is None or limit >= length else whole.select(evenly_spaced(length, limit))
    _ = data.fingerprint  # reads every sample, so that bad values surface here and not in the middle of the work
    return data


def peek(
    source: str,
    count: int = PEEK,
    *,
    labels: str | None = None,
    python: Path | None = None,
    work: Path,
    preprocessing: Path | Preprocessing | None = None,
) -> Batch:
    """The first samples, before there is a model: {name in the data: array [n, ...]}, n <= count, labels left out.

    The key is "" where the data has no name for its only array. Dtypes are the data's own.
    """
    opened = open_source(source, None, limit=count, python=python, work=work, preprocessing=preprocessing)
    column = label_column(opened.columns, None, labels if _label_file(labels, opened) is None else None)
    names = [name for name in opened.columns if name != column]
    length = min((opened.columns[name].length for name in names), default=0)
    _check_count(opened.name, length, fewest=1)
    for name in names:
        _check_numbers(opened.name, name, opened.columns[name])
    return next(opened.read(names, np.arange(min(count, length)), count))


def synthetic_data(inputs: Sequence[InputSpec], *, samples: int, seed: int) -> SampleSet:
    """Random samples, marked as such; see `synthetic.py` for what they are."""
    from convert.data.synthetic import SyntheticSource

    feeds = tuple(Feed(i, i.name) for i in inputs)
    note = "synthetic data: random numbers that nobody measured, so every drift and every range here is a guess"
    source = SyntheticSource(inputs, samples, seed)
    return SampleSet(source, feeds, np.arange(samples), synthetic=True, notes=(note,))


def open_source(
    source: str,
    inputs: Sequence[InputSpec] | None,
    *,
    limit: int | None,
    python: Path | None,
    work: Path,
    preprocessing: Path | Preprocessing | None,
) -> Source:
    """Open by kind; imports that one reader."""
    path = Path(source)
    if not path.exists():
        from convert.data.factory import is_factory, open_factory

        if is_factory(source):
            return open_factory(source, work, limit=limit, python=python)
        raise TightfitError(_absent(path))
    if path.is_dir():
        from convert.data.images import open_images

        return open_images(path, preprocessing)
    if path.suffix == ".npz":
        from convert.data.npz import open_npz

        return open_npz(path)
    if path.suffix == ".npy":
        from convert.data.npy import open_npy

        return open_npy(path)
    if path.suffix == ".jsonl":
        from convert.data.jsonl import open_jsonl

        return open_jsonl(path, {i.name: i.dtype for i in inputs or ()})
    raise TightfitError(f"{path}: data is a .npz, .npy or .jsonl file, a folder of images, or module:function.")


def evenly_spaced(length: int, count: int) -> NDArray[np.int64]:
    """`count` positions spread over 0..length-1: sorted files hold one class after the other."""
    return np.arange(count, dtype=np.int64) * length // count


def _own_inputs(source: Source, labels: str | None) -> list[InputSpec]:
    def spec(name: str, column: Column) -> InputSpec:
        return InputSpec(name, (column.length, *column.shape), column.dtype.name)

    return [spec(name, column) for name, column in source.columns.items() if name != labels]


def _check_count(name: str, length: int, fewest: int = FEWEST) -> None:
    if length == 0:
        raise TightfitError(f"{name} holds no samples.")
    if length < fewest:
        raise TightfitError(f"{name} holds one sample; give at least {fewest}, better {FEW} or more.")


def _check_numbers(source: str, name: str, column: Column) -> None:
    if column.dtype.kind not in "biuf":
        raise TightfitError(
            f"{source}: {named(name)} holds {column.dtype}, which no model takes. Save numbers: float32, or int64 for "
            "token ids."
        )


def _label_file(labels: str | None, source: Source) -> Path | None:
    """`labels` as a file, unless it names an array."""
    if labels is None or labels in source.columns or not labels.endswith(".npy"):
        return None
    if not Path(labels).exists():
        raise TightfitError(f"--labels: {_absent(Path(labels))}")
    return Path(labels)


def _labels(source: Source, column: str | None, file: Path | None, length: int) -> NDArray[np.int64] | None:
    found: Array | None = source.labels
    where = f"{source.name}: the labels"
    if file is not None:
        from convert.data.npy import mapped

        found, where = mapped(file), f"the labels in {file}"
    elif column is not None:
        shape = source.columns[column].shape
        if shape:
            raise TightfitError(_bad_labels(f"{source.name}: the labels '{column}'", f"samples of shape {list(shape)}"))
        rows = chunk_rows([source.columns[column]])
        found = np.concatenate([b[column] for b in source.read([column], np.arange(length), rows)])
        where = f"{source.name}: the labels '{column}'"
    return None if found is None else _class_indices(found, where, length)


def _class_indices(found: Array, where: str, length: int) -> NDArray[np.int64]:
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise TightfitError(_bad_labels(where, f"{found.dtype} of shape {list(found.shape)}"))
    if len(found) != length:
        raise TightfitError(f"{where} are {len(found)}, the samples {length}; there must be one label per sample.")
    labels = found.astype(np.int64)
    if labels.min() < 0:
        raise TightfitError(f"{where} hold {labels.min()}, at sample {labels.argmin()}; a class index counts from 0.")
    return labels


def _bad_labels(where: str, found: str) -> str:
    return f"{where} must be class indices, one whole number per sample (int64 [samples]), and are {found}."


def _absent(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path} does not exist, nor does its folder {folder}."
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], 1)
    hint = f" Did you mean {folder / near[0]}?" if near else ""
    synthetic = " For random samples, use --synthetic." if path.name == "synthetic" else ""
    return f"{path} does not exist.{hint}{synthetic}"
