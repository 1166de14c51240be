"""The steps that improve a graph. One per file; the file's name is its name in recipes."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.fx import GraphModule

from ..errors import CalibrationError
from ..graph import finish
from ..histogram import Histogram
from ..plan import Entry, Plan, QParams

Batches = Callable[[], Iterable[list[Tensor]]]


@dataclass
class Context:
    """What a step may use besides the graph.

    `batches()` starts a fresh pass over the calibration samples as the graph's positional inputs; `few_batches()` the
    same over a few of them, for work that is dear per sample. `progress(what, samples done)` may be called often.
    `histograms` and `chosen` keep what was learned, so that a second plan on the same graph does not look again;
    `chosen` is keyed by the names of the tensors that share the range.
    """

    plan: Plan
    batches: Batches
    few_batches: Batches
    progress: Callable[[str, int], None] = lambda what, done: None
    histograms: dict[str, Histogram] = field(default_factory=dict)
    chosen: dict[frozenset[str], QParams] = field(default_factory=dict)


class Step(Protocol):
    """A step edits the graph in place and returns its ledger; `ensures` then checks the result."""

    exact: bool  # the float function is unchanged

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]: ...

    def ensures(self, graph: GraphModule) -> str | None:
        """What is wrong with the result, or None."""
        ...


def names() -> list[str]:
    """The steps there are; imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find(name: str) -> Step:
    """The step called `name`. Raises CalibrationError when there is none."""
    if name not in names():
        raise CalibrationError(f"there is no step '{name}'; there are {', '.join(names())}")
    step: Step = importlib.import_module(f"{__name__}.{name}").STEP
    return step


def apply(name: str, graph: GraphModule, context: Context) -> list[Entry]:
    """Run one step on `graph` in place and hold it to its own promise."""
    step = find(name)
    ledger = step.apply(graph, context)
    finish(graph)
    wrong = step.ensures(graph)
    assert wrong is None, f"step {name} broke its promise: {wrong}"
    return ledger
