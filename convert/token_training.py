"""Train what a token method brought along, once its schedule is chosen and before anything is quantized."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from calibrate.plan import Entry, Plan
from calibrate.steps import Context, Progress
from calibrate.tokens.recover import Effort as Wish
from calibrate.tokens.recover import recover
from convert import compress
from convert.evaluation import STEP
from convert.pruning import Learned, Pruner, Scored

# With fewer samples than these besides the judging ones, the judging ones teach as well.
FEWEST = 32


@dataclass(frozen=True)
class Lessons:
    """How hard to try, whom to tell, and the percent of answers that may change at most, None for any."""

    effort: compress.Effort
    progress: Progress
    most_drop: float | None = None


def trained(pruner: Pruner, scored: Scored, lessons: Lessons) -> Scored:
    """The schedule as it scores with trained constants, which `pruner` puts into all its graphs of it from now on.

    `scored` itself where the method has nothing to train, with effort "fast", and where training brought nothing or
    broke the limit on changed answers: then all is rolled back. The ledger of `pruner.pruned` says what happened.
    """
    schedule = scored.schedule
    if not getattr(pruner.method, "trains", False) or not schedule.cuts:
        return scored
    if schedule not in pruner.learned:
        pruner.learned[schedule] = _learned(pruner, scored, lessons)
    return pruner.learned[schedule].scored


def _learned(pruner: Pruner, scored: Scored, lessons: Lessons) -> Learned:
    if lessons.effort == "fast":
        why = f"--effort fast trains nothing; normal trains what {pruner.name} brings along"
        return Learned({}, (Entry(STEP, "model", "left untrained", why),), scored)
    graph = pruner.graph(scored.schedule)
    patience, wish = compress.PATIENCE[lessons.effort], Wish()
    wish = replace(wish, iterations=int(wish.iterations * patience), time_limit_s=float(wish.time_limit_s * patience))
    constants, ledger = recover(graph, pruner.captured.graph, _context(pruner, lessons.progress), wish)
    if not constants:
        return Learned({}, tuple(ledger), scored)
    after = pruner.judged(scored.schedule, constants)
    entry = ledger[-1]
    brought = f"{entry.reason}; on the judging samples {scored.db:.1f} -> {after.db:.1f} dB and "
    brought += f"{scored.drop:.1f} -> {after.drop:.1f} % of the answers changed"
    over = lessons.most_drop is not None and after.drop > lessons.most_drop
    if over or not after.db > scored.db:
        return Learned({}, (Entry(STEP, "model", "left untrained", f"rolled back: {brought}"),), scored)
    return Learned(constants, (Entry(STEP, "model", entry.action, brought),), after)


def _context(pruner: Pruner, progress: Progress) -> Context:
    data = pruner.data
    apart = len(data) - pruner.judge.samples
    if apart >= FEWEST:
        data = data.select(np.arange(apart))

    def batches() -> Iterable[list[Tensor]]:
        found = compress.whole_batches(pruner.captured, data)
        return (compress.tensors(b, pruner.captured.inputs) for b in found)

    return Context(Plan(steps=()), batches, batches, progress, samples=len(data), seed=pruner.seed)
