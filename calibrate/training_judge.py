"""What a training is judged by on samples it never saw: how far a stored graph's answers are from the float model's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from .graph import run
from .training import Runner
from .training_loss import Lesson, divergence, scores_classes
from .training_samples import Samples, output_db

DB, KL, LOSS = "dB", "KL divergence", "loss"


@dataclass(frozen=True)
class Standing:
    """`value` in `unit`: of dB more is better, of the others less. `agreement`: the share of samples that get the float
    model's first class, None where outputs are no classes."""

    value: float
    unit: str
    agreement: float | None = None

    def beats(self, other: "Standing") -> bool:
        """Whether this is better than `other`; what is not finite beats nothing."""
        if self.unit == DB:
            return self.value > other.value
        return self.value < other.value

    def since(self, before: "Standing") -> str:
        """What the ledger says of the way from `before` to this."""
        form = ".1f" if self.unit == DB else ".3g"
        told = f"{before.value:{form}} -> {self.value:{form}} {self.unit}"
        if before.agreement is not None and self.agreement is not None:
            told += f", the float model's class for {before.agreement:.1%} -> {self.agreement:.1%},"
        return f"{told} on held-out samples"


def standing(graph: GraphModule, reference: GraphModule, samples: Samples, labels: float = 0.0) -> Standing:
    """How `graph`, as it is stored, does on the held-out samples.

    By its loss where labels of that weight are learned from. Else by the Kullback-Leibler divergence from `reference`
    where every floating point output holds scores of classes [N, classes], which is what training lowers: squared
    errors count scores that change no answer. Else by the signal to noise of the outputs.
    """
    if labels:
        lesson = Lesson(Runner(graph, {}), Runner(reference, {}), labels=labels)
        return Standing(lesson.mean(samples.held, samples.held_classes), LOSS)
    found = _classes(graph, reference, samples.held)
    return Standing(output_db(reference, graph, samples.held), DB) if found is None else found


def _classes(graph: GraphModule, reference: GraphModule, batches: Iterable[Sequence[Tensor]]) -> Standing | None:
    """Divergence, summed over outputs, and agreement, over all samples and outputs; None where one has no classes."""
    apart, alike, samples, answers = 0.0, 0, 0, 0
    with torch.no_grad():
        for batch in batches:
            pairs = zip(run(reference, list(batch)), run(graph, list(batch)), strict=True)
            scores = [(w, g) for w, g in pairs if w.is_floating_point()]
            if not scores or not all(scores_classes(w) for w, _ in scores):
                return None
            samples += len(scores[0][0])
            for wanted, got in scores:
                apart += len(wanted) * float(divergence(got, wanted))
                alike += int((got.argmax(1) == wanted.argmax(1)).sum())
                answers += len(wanted)
    return Standing(apart / samples if math.isfinite(apart) else math.inf, KL, alike / answers)
