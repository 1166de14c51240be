"""What a block costs with so many tokens: measured on the target's runtime, or counted where no time can be had here.

Time over tokens is a staircase more often than a line, and choosing tokens costs operators of its own, so both are
measured once per target, on float artifacts: the model cut behind its first block to a few numbers of tokens by fixed
patterns, and once by the method itself. A block's attention is a third of its work, its MLP the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.fx import GraphModule

import targets
from calibrate.tokens.schedule import Schedule
from convert.latency import measure

# Shares of tokens whose time is measured, beside half of them; between them times are interpolated.
STAIRS = (1.0, 0.75, 0.25)
ATTENTION, MLP = 1 / 3, 2 / 3
SECONDS = 0.8

Lower = Callable[[GraphModule, Path], targets.Session]


@dataclass(frozen=True)
class Staircase:
    """`saved[i]` ms a whole block saves with `tokens[i]` tokens (rising); `selection` ms one cut costs; both at batch
    1 unless the artifact has another. `full` ms is the whole model with every token."""

    tokens: tuple[int, ...]
    saved: tuple[float, ...]
    full: float
    selection: float

    def ms(self, schedule: Schedule) -> float:
        """An estimate of the time of the model with these cuts, from what was measured."""
        saves = [float(np.interp(n, self.tokens, self.saved)) for n in (*schedule.entering, *schedule.leaving)]
        attention, mlp = saves[: schedule.blocks], saves[schedule.blocks :]
        entering = dict(enumerate(schedule.entering))
        chosen = sum(self.selection * (entering[block] / schedule.tokens) ** 2 for block, _ in schedule.cuts)
        return self.full - ATTENTION * sum(attention) - MLP * sum(mlp) + chosen

    def said(self) -> str:
        """The stairs in words."""
        steps = ", ".join(f"{s:.3g} ms with {n}" for n, s in zip(self.tokens, self.saved, strict=True) if s)
        saves = f"{steps} tokens of {self.tokens[-1]}" if steps else "no time with fewer tokens"
        return (
            f"measured here, a block saves {saves}, and choosing tokens once costs "
            f"{self.selection:.3g} ms; the whole model takes {self.full:.3g} ms"
        )


def measured(
    blocks: int,
    tokens: int,
    protected: int,
    fixed: Callable[[int], GraphModule],
    by_method: Callable[[int], GraphModule],
    lower: Lower,
    call: Callable[[targets.Session], Callable[[], object]],
    folder: Path,
    suffix: str,
    progress: Callable[[int, int], None],
) -> Staircase:
    """Lower and time the stairs. `fixed(n)` and `by_method(n)` are the model cut to n tokens behind its first block."""
    folder.mkdir(parents=True, exist_ok=True)
    middle = tokens - (tokens - protected) // 2  # as many as the methods that merge pairs can take away at once
    counts = sorted({middle, *(max(protected + 2, round(share * tokens)) for share in STAIRS)})
    whole = call(lower(fixed(tokens), folder / f"all{suffix}"))
    times: dict[int, float] = {}
    full: list[float] = []
    for number, count in enumerate(counts[:-1]):
        progress(number, len(counts))
        found = _time(call(lower(fixed(count), folder / f"{count}{suffix}")), whole)
        times[count] = found[0]
        full.append(found[1])
    progress(len(counts) - 1, len(counts))
    chosen, beside = _time(call(lower(by_method(middle), folder / f"chosen{suffix}")), whole)
    base = float(np.median([*full, beside]))
    # Ratios of times taken in turns, not times: a machine's speed drifts while artifacts are made.
    ratio = {count: times[count] / one for count, one in zip(counts[:-1], full, strict=True)}
    reach = blocks - 1 + MLP
    saved = [max(0.0, base * (1 - ratio[count])) / reach for count in counts[:-1]]
    return Staircase(tuple(counts), (*saved, 0.0), base, max(0.0, base * (chosen / beside - ratio[middle])))


def _time(run: Callable[[], object], whole: Callable[[], object]) -> tuple[float, float]:
    found = measure(run, whole, min_runs=20, min_seconds=SECONDS, warmup_seconds=0.1, threads=1)
    assert found.float_p50_ms is not None
    return found.p50_ms, found.float_p50_ms


def counted(schedule: Schedule) -> float:
    """The work of a schedule where no time can be measured: tokens through attention and MLP, and pairs of tokens."""
    work = 0.0
    for entering, leaving in zip(schedule.entering, schedule.leaving, strict=True):
        work += ATTENTION * entering + MLP * leaving
    return work / (schedule.blocks * schedule.tokens)
