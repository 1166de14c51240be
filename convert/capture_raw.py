"""What every way in gives before it is brought to the normal form, and how a captured graph is checked against it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule

from calibrate.graph import run
from calibrate.samples import Array, Batch, InputSpec
from convert.data.arrays import ArraySource
from convert.data.matching import match
from convert.errors import TightfitError

# Two float32 evaluations of one function differ in their rounding only: SQNR far above 100 dB for a few layers, above
# 80 dB for deep networks. Below this floor the graph computes something else.
FLOOR_DB = 60.0


@dataclass(frozen=True)
class Reference:
    """One batch and what the model itself answers to it, outputs by position."""

    inputs: Batch
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class Raw:
    """A captured graph with its constants in place, and the model's own answers.

    `against` names what gave them. `samples`: how many distinct samples they hold; `synthetic` when these are random.
    """

    graph: GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    references: tuple[Reference, ...]
    against: str
    samples: int
    synthetic: bool
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class CaptureCheck:
    """How far the captured graph is from the model itself, measured on `samples` samples.

    `sqnr_db`: the worst output's signal to error ratio, inf when every bit is equal. `max_abs`: the largest difference
    of one number. `against`: what ran the model. `synthetic`: the samples were random numbers.
    """

    sqnr_db: float
    max_abs: float
    samples: int
    against: str
    synthetic: bool


def check(graph: GraphModule, raw: Raw) -> CaptureCheck:
    """Run `graph` on the references and measure. Raises TightfitError below FLOOR_DB or for another shape."""
    worst, largest = math.inf, 0.0
    for reference in raw.references:
        got = run(graph, [torch.from_numpy(reference.inputs[i.name]) for i in raw.inputs])
        for name, value, wanted in zip(raw.outputs, got, reference.outputs, strict=True):
            array = value.detach().numpy()
            if array.shape != wanted.shape:
                raise TightfitError(
                    f"the captured graph gives '{name}' the shape {list(array.shape)}, {raw.against} "
                    f"{list(wanted.shape)}; the model cannot be captured faithfully."
                )
            worst = min(worst, sqnr_db(wanted, array))
            largest = max(largest, max_abs(wanted, array))
    if not worst >= FLOOR_DB:
        raise TightfitError(
            f"the captured graph does not compute what {raw.against} computes: its signal to error ratio is "
            f"{worst:.1f} dB, at least {FLOOR_DB:.0f} dB is rounding. A model with random numbers in it, or with state "
            "that changes from call to call, can't be captured; make it deterministic in evaluation mode."
        )
    return CaptureCheck(worst, largest, raw.samples, raw.against, raw.synthetic)


def sqnr_db(wanted: Array, got: Array) -> float:
    """10 log10(sum wanted^2 / sum (wanted - got)^2); inf when equal, NaN only where one side alone has NaN or Inf."""
    a, b = as_double(wanted), as_double(got)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if bool(same.all()):
        return math.inf
    error = float(((a[~same] - b[~same]) ** 2).sum())
    signal = float((a[np.isfinite(a)] ** 2).sum())
    return 10 * math.log10(signal / error) if signal > 0 and math.isfinite(error) else -math.inf


def max_abs(wanted: Array, got: Array) -> float:
    """The largest difference; inf where a number stands against NaN or another infinity."""
    a, b = as_double(wanted), as_double(got)
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    worst = np.abs(a[different] - b[different]).max(initial=0.0)
    return float(worst) if np.isfinite(worst) else math.inf


def as_double(array: Array) -> NDArray[np.float64]:
    """float64 holds every float32, int32 and bool exactly."""
    return array.astype(np.float64)


def random_batch(inputs: Sequence[InputSpec], size: int) -> Batch:
    """Standard-normal floats; integers and booleans 0 or 1, which every vocabulary and every mask has."""
    generator = np.random.default_rng(0)
    return {i.name: _random(generator, (size, *i.sample_shape), np.dtype(i.dtype)) for i in inputs}


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def fed(inputs: Sequence[InputSpec], examples: Batch, source: str) -> Batch:
    """The examples by input name, cast to the inputs' dtypes; TightfitError where `convert.data.matching` refuses."""
    pairs, _ = match(ArraySource(source, examples), inputs, None)
    return {p.input.name: np.ascontiguousarray(examples[p.column].astype(p.input.dtype)) for p in pairs}
