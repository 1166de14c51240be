"""The steps that improve a graph. One per file; the file's name is its name in recipes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.fx import GraphModule

from .. import registry
from ..errors import CalibrationError
from ..graph import clone, finish
from ..histogram import Histogram
from ..plan import Entry, Plan, QParams

Batches = Callable[[], Iterable[list[Tensor]]]


class Progress(Protocol):
    """Told how far something is: `done` of `total`, in samples, layers or whatever `what` counts; None: unknown."""

    def __call__(self, what: str, done: int, total: int | None = None) -> None: ...


def silent(what: str, done: int, total: int | None = None) -> None:
    """Progress that nobody hears."""


@dataclass
class Context:
    """What a step may use besides the graph.

    `batches()` starts a fresh pass over the calibration samples as the graph's positional inputs; `few_batches()` the
    same over a few of them, for work that is dear per sample. `progress` may be called often; `samples` is how many
    `batches()` has, where that is known.
    `float_graph` is the graph before the first step that quantized, None until one did: what later steps compare with.
    `labels` are the samples' class indices, int64 [samples] in the order of `batches()`, None where nobody knows them.
    `parameters` are what the recipe set for the step that runs now; `seed` decides every random choice.
    `histograms` and `chosen` keep what was learned, so that a second plan on the same graph does not look again;
    `chosen` is keyed by the names of the tensors that share the range.
    """

    plan: Plan
    batches: Batches
    few_batches: Batches
    progress: Progress = silent
    samples: int | None = None
    float_graph: GraphModule | None = None
    labels: Tensor | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    histograms: dict[str, Histogram] = field(default_factory=dict)
    chosen: dict[frozenset[str], QParams] = field(default_factory=dict)


def first(context: Context, limit: int) -> list[list[Tensor]]:
    """Batches until `limit` samples have come."""
    found: list[list[Tensor]] = []
    count = 0
    for batch in context.batches():
        found.append(batch)
        count += len(batch[0]) if batch[0].dim() else 1
        if count >= limit:
            break
    return found


class Step(Protocol):
    """A step edits the graph in place and returns its ledger; `ensures` then checks the result.

    `exact`: the float function is unchanged. `defaults`, where a step has them: its parameters and their default
    values, which a recipe may set. `refines`, where true: the step improves a graph that is quantized already.
    `repeats`, where true: a recipe may name it several times, told apart by what follows a colon (`finetune:signs`).
    """

    exact: bool

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]: ...

    def ensures(self, graph: GraphModule) -> str | None:
        """What is wrong with the result, or None."""
        ...


def names() -> list[str]:
    """The steps there are; imports none."""
    return registry.names(__path__)


def bare(name: str) -> str:
    """The step's own name: `finetune` of `finetune:signs`."""
    return name.partition(":")[0]


def repeats(name: str) -> bool:
    """Whether a recipe may name the step several times."""
    return bool(getattr(find(name), "repeats", False))


def find(name: str) -> Step:
    """The step called `name`, or so before a colon. Raises CalibrationError when there is none."""
    found: Step = registry.find(__name__, __path__, bare(name), "STEP", "step")
    return found


def defaults(name: str) -> dict[str, Any]:
    """The parameters that a recipe may set for the step called `name`, with their default values."""
    return dict(getattr(find(name), "defaults", {}))


def refines(name: str) -> bool:
    """Whether the step works on a graph that is quantized already."""
    return bool(getattr(find(name), "refines", False))


def apply(name: str, graph: GraphModule, context: Context) -> list[Entry]:
    """Run one step on `graph` in place and hold it to its own promise."""
    step = find(name)
    if refines(name) and context.float_graph is None:
        raise CalibrationError(f"the step {name} improves a quantized graph: put a quantizing step before it")
    if not step.exact and not refines(name) and context.float_graph is None:
        context.float_graph = clone(graph)
    context.parameters = {**defaults(name), **context.plan.parameters.get(name, {})}
    ledger = step.apply(graph, context)
    finish(graph)
    wrong = step.ensures(graph)
    assert wrong is None, f"step {name} broke its promise: {wrong}"
    return ledger
