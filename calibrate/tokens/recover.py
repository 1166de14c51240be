"""Train the constants that a token method brought along to answer as the model with all tokens does.

Distillation on calibration samples, without labels: the loss is that of `training_loss` on the model's outputs. Nothing
else of the model changes, and which samples come when is decided by the seed alone.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import CalibrationError
from ..graph import constant, is_constant
from ..plan import Entry
from ..steps import Context
from ..training import Runner
from ..training_clock import Clock
from ..training_loss import Lesson
from ..training_model import Shift
from ..training_samples import TOO_FEW, Rows, Samples
from .trained import marked

STEP = "prune_tokens"


@dataclass(frozen=True)
class Effort:
    """How long and how fast: Adam for `iterations` batches of `batch` out of at most `samples`, rate `lr` to begin with
    (in units of each constant's own size), and no longer than `time_limit_s`."""

    iterations: int = 100
    lr: float = 0.05
    batch: int = 16
    samples: int = 512
    time_limit_s: float = 120.0


def recover(
    graph: GraphModule, reference: GraphModule, context: Context, effort: Effort | None = None
) -> tuple[dict[str, Tensor], list[Entry]]:
    """What the marked constants of `graph` should be, by name, and the ledger; `graph` stays as it is.

    `reference` is the model with all tokens, its inputs and outputs the same. The best of all passes over the samples
    is taken, as held-out samples judge; where none is better than the start, nothing is returned and the ledger says
    so. Uses the context's batches, seed and progress. Raises CalibrationError where nothing is marked.
    """
    effort = effort or Effort()
    nodes = marked(graph)
    if not nodes:
        raise CalibrationError("no cut of this graph has anything to train: use a token method that trains, as pyra")
    samples = Samples.of(graph, context, effort.samples)
    if samples is None:
        return {}, [Entry(STEP, "model", "left untrained", TOO_FEW)]
    shifts = {name: Shift(constant(graph, node)) for name, node in nodes.items()}
    # No gradient goes to what isn't trained: the model's own parameters are shared with other graphs.
    given = {n: partial(constant, graph, n) for n in graph.graph.nodes if is_constant(n)}
    given.update({node: shifts[name].value for name, node in nodes.items()})
    lesson = Lesson(Runner(graph, given), Runner(reference, {}))
    told = _train(lesson, [s.move for s in shifts.values()], samples, context, effort)
    count = sum(len(b[0]) if b[0].dim() else 1 for b in samples.held)
    reason = f"loss {told.before:.4g} -> {told.after:.4g} on {count} held-out samples after {told.clock.taken} steps"
    reason += told.clock.note()
    if not told.after < told.before:
        return {}, [Entry(STEP, "model", "left untrained", f"rolled back: {reason}")]
    numbers = sum(s.start.numel() for s in shifts.values())
    action = f"trained {numbers} numbers of the token cuts to answer as with all tokens"
    with torch.no_grad():
        return {name: s.value().clone() for name, s in shifts.items()}, [Entry(STEP, "model", action, reason)]


@dataclass(frozen=True)
class _Told:
    """The loss on held-out samples before training and at its best, and the clock."""

    before: float
    after: float
    clock: Clock


def _train(lesson: Lesson, moves: list[Tensor], samples: Samples, context: Context, effort: Effort) -> _Told:
    """Train for the steps wished for, or until the time is up; `moves` are then as at the best pass."""
    generator = torch.Generator().manual_seed(context.seed)
    rows = Rows([list(b) for b in samples.train], samples.rowwise)
    count = sum(len(b[0]) if b[0].dim() else 1 for b in samples.train)
    per_pass = math.ceil(count / effort.batch) if samples.rowwise else len(samples.train)
    before = lesson.mean(samples.held, samples.held_classes)
    best, least = [m.detach().clone() for m in moves], math.inf
    optimizer = torch.optim.Adam(moves, effort.lr)
    clock = Clock(effort.iterations, effort.time_limit_s)
    with torch.enable_grad():
        while clock.done < 1:
            optimizer.param_groups[0]["lr"] = effort.lr * (1 + math.cos(math.pi * clock.done)) / 2
            inputs = [t for t in rows.minibatch(effort.batch, generator) if t is not None]
            loss = lesson.loss(inputs)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_(moves, 1e3)
            optimizer.step()
            clock.tick()
            context.progress("training of token cuts", clock.taken, clock.steps)
            if clock.taken % per_pass == 0 or clock.done >= 1:
                judged = lesson.mean(samples.held, samples.held_classes)
                if judged < least:
                    best, least = [m.detach().clone() for m in moves], judged
    with torch.no_grad():
        for move, number in zip(moves, best, strict=True):
            move.copy_(number)
    return _Told(before, least, clock)
