"""Which array of the data feeds which input of the model: names, shapes and dtypes, before any value is read."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.samples import InputSpec
from convert.data.source import LABEL_NAMES, UNNAMED, Column, Source
from convert.errors import TightfitError


@dataclass(frozen=True)
class Feed:
    """One input of the model and the column that feeds it."""

    input: InputSpec
    column: str


def match(source: Source, inputs: Sequence[InputSpec], labels: str | None) -> tuple[tuple[Feed, ...], list[str]]:
    """Pair every input with its column; returns the pairs and notes on casts.

    `labels` is the column that holds class indices, if known. Raises TightfitError for a wrong or missing name, a wrong
    shape, a dtype that cannot be cast without a guess, or arrays of different lengths.
    """
    feeds = _by_name(source, inputs, labels)
    for feed in feeds:
        _check_shape(source, feed)
    notes = [note for feed in feeds if (note := _cast_note(source, feed))]
    _check_lengths(source, [feed.column for feed in feeds] + ([labels] if labels else []))
    return feeds, notes


def label_column(columns: Mapping[str, Column], inputs: Sequence[InputSpec] | None, asked: str | None) -> str | None:
    """The column that holds class indices: the one asked for, else one with a usual name that is no input's."""
    if asked is not None:
        if asked not in columns:
            raise TightfitError(
                f"--labels {asked}: the data has no array of that name and there is no such file; "
                f"the data has {listed(columns)}."
            )
        return asked
    taken = {i.name for i in inputs or ()}
    found = [name for name in LABEL_NAMES if name in columns and name not in taken]
    if len(found) > 1:
        raise TightfitError(f"the data has {listed(found)}; say with --labels which of them holds the class indices.")
    # Without a model, an array alone is an input, whatever it is called.
    return found[0] if found and len(columns) > 1 else None


def named(column: str) -> str:
    """How messages call a column."""
    return f"the array '{column}'" if column != UNNAMED else "the array"


def listed(names: Mapping[str, object] | Sequence[str]) -> str:
    """'a', 'b' and so on, for messages."""
    return ", ".join(f"'{name}'" if name != UNNAMED else "one array without a name" for name in names)


def _by_name(source: Source, inputs: Sequence[InputSpec], labels: str | None) -> tuple[Feed, ...]:
    arrays = [name for name in source.columns if name != labels]
    wanted = [i.name for i in inputs]
    both = f"The model's inputs are {listed(wanted)}; the data has {listed(arrays) or 'no arrays'}."
    if arrays == [UNNAMED]:
        if len(inputs) != 1:
            raise TightfitError(
                f"{source.name} has one array without a name, but the model has {len(inputs)} inputs "
                f"({listed(wanted)}); give a .npz with one array per input."
            )
        return (Feed(inputs[0], UNNAMED),)
    missing = [name for name in wanted if name not in arrays]
    extra = [name for name in arrays if name not in wanted and name not in LABEL_NAMES]
    if missing and extra:
        near = difflib.get_close_matches(missing[0], extra, 1, cutoff=0.0)[0]
        raise TightfitError(
            f"{source.name} has no array for the input '{missing[0]}'. {both} Did you mean '{near}'? "
            f"Rename it to '{missing[0]}' and save again."
        )
    if missing:
        raise TightfitError(f"{source.name} has no array for the input '{missing[0]}'. {both} Add it.")
    if extra:
        raise TightfitError(
            f"{source.name} has {listed(extra)}, which feeds no input. {both} "
            "Take it out, or name it with --labels if it holds class indices."
        )
    return tuple(Feed(i, i.name) for i in inputs)


def _check_shape(source: Source, feed: Feed) -> None:
    found, wanted = source.columns[feed.column].shape, feed.input.sample_shape
    if found != wanted:
        raise TightfitError(
            f"{source.name}: {named(feed.column)} has samples of shape {list(found)}, but the input "
            f"'{feed.input.name}' takes {list(wanted)}{_shape_hint(found, wanted, source)}."
        )


def _shape_hint(found: tuple[int, ...], wanted: tuple[int, ...], source: Source) -> str:
    if len(found) == len(wanted) == 3:
        if (found[2], found[0], found[1]) == wanted:
            return f". The data looks NHWC, the model NCHW: {_relayout(source, 'NCHW', '(0, 3, 1, 2)')}"
        if (found[1], found[2], found[0]) == wanted:
            return f". The data looks NCHW, the model NHWC: {_relayout(source, 'NHWC', '(0, 2, 3, 1)')}"
    if len(found) == len(wanted) + 1 and found[1:] == wanted:
        return ". The samples look like batches: the first axis alone counts the samples, so give them one by one"
    if found == wanted[1:] and wanted[:1] == (1,):
        return f". An axis of length 1 is missing: save array.reshape({', '.join(map(str, (-1, *wanted)))})"
    return ". Prepare the samples as in training, or export the model for this shape"


def _relayout(source: Source, layout: str, axes: str) -> str:
    if source.preprocessing is not None:
        return f'write layout = "{layout}" in the preprocessing file'
    return f'save array.transpose{axes}, or for images write layout = "{layout}" in their preprocessing file'


def _cast_note(source: Source, feed: Feed) -> str | None:
    """What is cast, None when nothing is; raises when a cast would be a guess."""
    found, wanted = source.columns[feed.column].dtype, np.dtype(feed.input.dtype)
    if found == wanted:
        return None
    refusal = f"{source.name}: {named(feed.column)} is {found}, but the input '{feed.input.name}' takes {wanted}"
    if wanted.kind == "f" and found.kind in "iub":
        raise TightfitError(
            f"{refusal}. Raw pixels or counts are not what the model was trained on: "
            "normalise the data as in training and save it as float32."
        )
    if wanted.kind in "iub" and found.kind == "f":
        raise TightfitError(f"{refusal}. Save whole numbers: array.astype('{wanted}').")
    castable = (found.kind == "f" and wanted.kind == "f") or (found.kind in "iub" and wanted.kind in "iub")
    if not castable:
        raise TightfitError(f"{refusal}. Save it as {wanted}.")
    return f"'{feed.input.name}' is cast from {found} to {wanted}"


def _check_lengths(source: Source, names: Sequence[str]) -> None:
    lengths = {name: source.columns[name].length for name in names}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"'{name}' has {length}" for name, length in lengths.items())
        raise TightfitError(f"{source.name}: the arrays count different numbers of samples: {counts}.")
