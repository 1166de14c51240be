"""What a whole quantized graph is trained for: the float graph's answers, its blocks' outputs, and labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .training import Runner


@dataclass(frozen=True)
class Teaching:
    """Blocks that receive the teacher's activation in place of their own, each with this probability.

    Errors of earlier blocks then do not add up in later ones (Teacher Intervention, arXiv 2302.11812).
    """

    probability: float
    generator: torch.Generator

    def intervenes(self) -> bool:
        """One throw of the coin."""
        return float(torch.rand((), generator=self.generator)) < self.probability


@dataclass(frozen=True)
class Lesson:
    """How far `learner` is from `teacher`, both whole graphs with the same inputs and outputs.

    `exits`: (node of the learner, node of the teacher) where a block ends, in order; `blocks` weighs their distance.
    `labels` weighs the cross entropy of the first output [N, classes] with class indices. Without `squares` scores of
    classes are not held to the teacher's numbers besides.
    """

    learner: Runner
    teacher: Runner
    exits: Sequence[tuple[Node, Node]] = ()
    blocks: float = 0.0
    labels: float = 0.0
    squares: bool = True

    def loss(self, inputs: Sequence[Tensor], classes: Tensor | None = None, teaching: Teaching | None = None) -> Tensor:
        """The loss on one batch: distance of outputs, of block outputs, and from labels, float32 []."""
        with torch.no_grad():
            wanted = self.teacher.run(self.teacher.nodes, dict(zip(self.teacher.placeholders, inputs, strict=True)))
        got = dict(zip(self.learner.placeholders, inputs, strict=True))
        parts, start = [], 0
        for mine, theirs in self.exits if self.blocks or teaching else ():
            stop = self.learner.nodes.index(mine) + 1
            self.learner.run(self.learner.nodes[start:stop], got)
            parts.append(relative(got[mine], wanted[theirs]))
            if teaching is not None and teaching.intervenes():
                got[mine] = wanted[theirs]
            start = stop
        self.learner.run(self.learner.nodes[start:], got)
        loss = torch.stack(
            [
                distance(got[mine], wanted[theirs], self.squares)
                for mine, theirs in zip(self.learner.outputs, self.teacher.outputs, strict=True)
                if wanted[theirs].is_floating_point()
            ]
        ).sum()
        if parts and self.blocks:
            loss = loss + self.blocks * torch.stack(parts).mean()
        if classes is not None and self.labels:
            scores = got[self.learner.outputs[0]]
            loss = loss + self.labels * torch.nn.functional.cross_entropy(scores, classes)
        return loss

    def mean(self, batches: Sequence[Sequence[Tensor]], classes: Sequence[Tensor | None]) -> float:
        """The mean over all samples of what answers are judged by: the loss of labels, and the distance of outputs, of
        classes their divergence alone. Block outputs and squared errors of scores only help to learn.
        """
        answers = Lesson(self.learner, self.teacher, labels=self.labels, squares=False)
        total, count = 0.0, 0
        with torch.no_grad():
            for inputs, indices in zip(batches, classes, strict=True):
                size = len(inputs[0]) if inputs[0].dim() else 1
                total += size * float(answers.loss(inputs, indices))
                count += size
        return total / count


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the power of what is wanted."""
    return (got - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


def scores_classes(wanted: Tensor) -> bool:
    """Whether an output is taken for scores of classes: [N, classes > 1]."""
    return wanted.dim() == 2 and wanted.shape[1] > 1


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of class probabilities from those wanted; logits [N, classes], the mean over N."""
    ours, theirs = torch.log_softmax(got, 1), torch.log_softmax(wanted, 1)
    return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def distance(got: Tensor, wanted: Tensor, squares: bool = True) -> Tensor:
    """Divergence of class probabilities for logits [N, classes > 1], else cosine distance; plus the squared error,
    which logits have only with `squares`."""
    if scores_classes(wanted):
        apart = divergence(got, wanted)
        return apart + relative(got, wanted) if squares else apart
    flat, reference = got.reshape(len(got), -1), wanted.reshape(len(wanted), -1)
    return 1 - torch.nn.functional.cosine_similarity(flat, reference).mean() + relative(got, wanted)
