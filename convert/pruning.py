"""Fewer tokens: what a recipe that prunes does to a captured transformer before any step runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.fx import GraphModule

from calibrate import padding
from calibrate.graph import clone, run
from calibrate.plan import Entry
from calibrate.samples import CalibrationSet
from calibrate.tokens import methods, protect
from calibrate.tokens.attention import sites
from calibrate.tokens.insert import Cut, reduce
from calibrate.tokens.schedule import Schedule, candidates
from calibrate.tokens.trained import write
from convert import recipes
from convert.capture import Captured
from convert.compress import Judge, Outputs, tensors
from convert.drift import Drift, classifies
from convert.errors import TightfitError
from convert.evaluation import STEP

# Shares that are looked at when a budget, and no share, is given: from nearly all tokens to few.
SHARES = tuple(round(0.95 - 0.05 * i, 2) for i in range(16))


@dataclass(frozen=True)
class Scored:
    """A schedule, how far its outputs are from float in dB, and the percent of answers that changed.

    An answer is the largest score; where outputs are no scores of classes, `drop` is 100 (1 - mean cosine).
    """

    schedule: Schedule
    db: float
    drop: float


@dataclass(frozen=True)
class Learned:
    """What was trained for a schedule: constants by name (none where it brought nothing), what the ledger says of it,
    and how the schedule scores with them."""

    constants: Mapping[str, Tensor]
    ledger: tuple[Entry, ...]
    scored: Scored


@dataclass(frozen=True)
class Pruned:
    """A captured model with fewer tokens, and how that came about. `layers`: the name of each cut's attention."""

    captured: Captured
    pruner: "Pruner"
    form: str
    scored: Scored
    layers: tuple[str, ...]
    ledger: tuple[Entry, ...]
    how: str

    @property
    def schedule(self) -> Schedule:
        """How many tokens stay behind which block."""
        return self.scored.schedule


class Pruner:
    """Removes tokens from one captured model by one method, and says what that does to its answers.

    Raises CalibrationError where the model does not allow it: no attention, windows, a causal decoder, a head that
    needs every token. `learned` are schedules that were trained (`token_training`): graphs of them hold what was
    learned, while `score` goes on saying what they do without.
    """

    def __init__(
        self, captured: Captured, judge: Judge, wanted: recipes.Tokens, data: CalibrationSet, seed: int = 0
    ) -> None:
        self.captured, self.judge, self.seed, self.data = captured, judge, seed, data
        self.method = methods.find(wanted.method)
        self.name = wanted.method
        found = sites(captured.graph)
        self.blocks, self.tokens = len(found), found[0].tokens
        self.restores = bool(getattr(self.method, "reconstructs", False))
        self.protected = protect.protected(captured.graph, self.restores)
        self.options = dict(wanted.options)
        self.notes: list[Entry] = []
        self._look_for_separator(data)
        self._seen: dict[Schedule, Scored] = {}
        self.learned: dict[Schedule, Learned] = {}

    def _look_for_separator(self, data: CalibrationSet) -> None:
        if "separator" not in getattr(self.method, "defaults", {}) or "separator" in self.options:
            return
        found = separator(self.captured, data)
        if found is not None:
            self.options["separator"] = found
            self.notes.append(
                Entry(STEP, "model", f"the token {found} always stays", "it ends every calibration sample ([SEP])")
            )

    @property
    def halves(self) -> bool:
        """Whether one cut can remove half of the tokens at most."""
        return bool(getattr(self.method, "halves", False))

    def graph(self, schedule: Schedule, form: str = "topk", traced: bool = False) -> GraphModule:
        """The model with these cuts and what was learned for them; see `calibrate.tokens.insert.reduce`."""
        learned = self.learned.get(schedule)
        return self._cut(schedule, learned.constants if learned else {}, form, traced)

    def _cut(
        self, schedule: Schedule, constants: Mapping[str, Tensor], form: str = "topk", traced: bool = False
    ) -> GraphModule:
        graph = clone(self.captured.graph)
        cuts = [Cut(block, keep, self.name, self.options) for block, keep in schedule.cuts]
        if cuts:
            reduce(graph, cuts, self.protected, form, self.seed, traced)
        write(graph, constants)
        return graph

    def score(self, schedule: Schedule) -> Scored:
        """What a schedule does to the outputs on the judging samples; each is looked at once."""
        if schedule not in self._seen:
            self._seen[schedule] = self.judged(schedule, {})
        return self._seen[schedule]

    def judged(self, schedule: Schedule, constants: Mapping[str, Tensor]) -> Scored:
        """What a schedule does to the outputs on the judging samples with these constants in its cuts."""
        graph = self._cut(schedule, constants)
        outputs = [run(graph, inputs) for inputs in self.judge.inputs]
        return Scored(schedule, self.judge.closeness(outputs), self._changed(outputs))

    def _changed(self, outputs: Sequence[Outputs]) -> float:
        drift: Drift | None = None
        for expected, got in zip(self.judge.expected, outputs, strict=True):
            wanted = self.judge.named(expected)
            drift = drift or Drift(classifies(wanted, None))
            drift.add(wanted, self.judge.named(got))
        assert drift is not None
        share = drift.top1_agreement if drift.top1_agreement is not None else drift.cosine
        return 100 * (1 - share) if math.isfinite(share) else 100.0

    def schedules(self, share: float) -> list[Schedule]:
        """What is tried for a share of tokens. Raises TightfitError for a share that leaves too few."""
        found = candidates(self.blocks, self.tokens, share, self.protected, self.halves)
        if not found:
            most = next((s for s in SHARES if self._any(s)), None)
            if most is not None and most < share:
                raise TightfitError(
                    f"keeping a share of {share:g} of {self.tokens} tokens over {self.blocks} blocks removes none: the "
                    f"most that removes any is about {most:g}."
                )
            least = next((s for s in reversed(SHARES) if self._any(s)), None)
            hint = f"the least that works here is about {least:g}" if least else "this model has too few tokens"
            raise TightfitError(
                f"keeping a share of {share:g} of {self.tokens} tokens over {self.blocks} blocks leaves no token "
                f"besides the {self.protected} that always stay, or removes more than {self.name} can: {hint}."
            )
        return found

    def _any(self, share: float) -> bool:
        return bool(candidates(self.blocks, self.tokens, share, self.protected, self.halves))

    def pruned(self, scored: Scored, form: str, how: str, tried: Sequence[Scored]) -> Pruned:
        """The model with a chosen schedule, in the form that the device wants."""
        captured = replace(self.captured, graph=self.graph(scored.schedule, form))
        layers = [site.layer for site in sites(self.captured.graph)]
        ledger = [*self.notes]
        before = self.tokens
        for block, keep in scored.schedule.cuts:
            place = f"behind the attention of block {block + 1} of {self.blocks}"
            ledger.append(Entry(STEP, layers[block], f"{before} → {keep} tokens by {self.name}", place))
            before = keep
        if scored.schedule in self.learned:
            ledger += self.learned[scored.schedule].ledger
        for other in sorted(tried, key=lambda t: -t.db):
            if other.schedule != scored.schedule:
                cuts = ", ".join(f"{keep} behind block {block + 1}" for block, keep in other.schedule.cuts)
                ledger.append(Entry(STEP, "model", f"left out: {cuts}", f"{other.db:.1f} dB, not {scored.db:.1f}"))
        names = tuple(layers[block] for block, _ in scored.schedule.cuts)
        return Pruned(captured, self, form, scored, names, tuple(ledger), how)


def separator(captured: Captured, data: CalibrationSet) -> int | None:
    """The id that every calibration sample's text ends with, before its padding; None where there is none.

    One that stands there twice is padding that no mask hides.
    """
    names = [n.name for n in captured.graph.graph.nodes if n.op == "placeholder"]
    looked_up = padding.ids(captured.graph)
    if not looked_up:
        return None
    place = names.index(looked_up[0].name)
    last: set[int] = set()
    for batch in data.batches(64):
        inputs = tensors(batch, captured.inputs)
        rows, visible_ = inputs[place].numpy(), padding.visible(captured.graph, inputs)
        seen = np.ones(rows.shape, bool) if visible_ is None else visible_.numpy()
        for row, visible in zip(rows, seen, strict=True):
            end = row[visible][-2:]
            last.add(int(end[-1]) if len(end) and len(set(end.tolist())) == len(end) else -1)
        if len(last) > 1:
            return None
    found = last.pop() if last else -1
    return found if found >= 0 else None
