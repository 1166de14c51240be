"""The stage behind capture where a recipe binarizes embeddings: the float model itself gets the head that makes bits.

All stages and the artifact then are compared with float embeddings under the same exact head: drift counts bits that
quantizing flipped. What bits lose against float search is the step's own number in the ledger.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from calibrate import steps
from calibrate.graph import clone
from calibrate.plan import Entry, Plan
from calibrate.samples import CalibrationSet
from convert import recipes
from convert.capture import Captured
from convert.compress import tensors, whole_batches
from convert.errors import user_errors

STEP = "binarize_embedding"


@dataclass(frozen=True)
class Embedded:
    """The captured model with ±1 codes for its embedding, and what the step said of them."""

    captured: Captured
    ledger: tuple[Entry, ...]


def embedded(
    captured: Captured, recipe: str, data: CalibrationSet, progress: steps.Progress, seed: int
) -> Embedded | None:
    """The model with binary embeddings, where the recipe asks for them. Raises TightfitError where it has none."""
    parts = [part for part in recipe.split("+") if part.strip() != recipes.AUTO]
    chosen = recipes.load("+".join(parts)) if parts else None
    if chosen is None or STEP not in chosen.steps:
        return None

    def batches() -> Iterable[list[Tensor]]:
        return (tensors(b, captured.inputs) for b in whole_batches(captured, data))

    plan = Plan(steps=(STEP,), parameters=chosen.parameters)
    context = steps.Context(plan, batches, batches, progress, samples=len(data), seed=seed)
    graph = clone(captured.graph)
    with user_errors(captured.name):
        ledger = steps.apply(STEP, graph, context)
    return Embedded(replace(captured, graph=graph), tuple(ledger))
