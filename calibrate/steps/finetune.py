"""Train the quantized model for a short while to answer as the float model does, and as labels say if asked."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate.blocks import block_units
from calibrate.errors import CalibrationError
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.surrogates import SURROGATES
from calibrate.training import Runner
from calibrate.training_clock import Clock
from calibrate.training_judge import standing
from calibrate.training_loss import Lesson, Teaching
from calibrate.training_model import Student
from calibrate.training_samples import TOO_FEW, Rows, Samples

NAME = "finetune"


class Finetune:
    """Quantization-aware training by distillation: latent weights, scales of weights and of static activations
    (their gradients are those of LSQ, arXiv 1902.08153), biases, and gamma and beta of layer norms.

    The loss is the Kullback-Leibler divergence from the float model's classes for an output [N, classes], cosine
    distance for others, the squared error of the outputs, and `blocks` times that of each block's output; with
    `labels` that weight of the cross entropy besides. For `intervention`, a share of the steps from the first, blocks
    receive the teacher's activation in place of their own (arXiv 2302.11812), less and less often; after learned
    rounding that did harm, so it is off. Zero points stay, and tensors that share a scale go on sharing
    it. `surrogate` names the gradient of signs (`calibrate/surrogates.py`).

    The epoch that did best on held-out samples is kept. All is rolled back where the model did not come closer to float
    on them (`calibrate/training_judge.py`: classes by divergence, other outputs by dB), or with `labels`, where their
    loss did not fall. Random choices come from the context's seed; two runs differ only where `time_limit_s` cut one
    short, which the ledger then says.
    """

    exact = False
    refines = True
    repeats = True
    defaults: ClassVar[dict[str, Any]] = {
        "iterations": 200,
        "lr": 0.01,
        "batch": 32,
        "samples": 1024,
        "time_limit_s": 300.0,
        "blocks": 1.0,
        "labels": 0.0,
        "intervention": 0.0,
        "surrogate": "straight",
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        reference = context.float_graph
        assert reference is not None
        samples = Samples.of(graph, context, context.parameters["samples"])
        if samples is None:
            return [Entry(NAME, "model", "left alone", TOO_FEW)]
        surrogate = context.parameters["surrogate"]
        if surrogate not in SURROGATES:
            raise CalibrationError(f"{NAME} has no surrogate {surrogate!r}: use {', '.join(SURROGATES)}")
        student = Student(graph, context.plan, surrogate)
        if not student.parameters():
            return [Entry(NAME, "model", "left alone", "no layer has a weight in codes to train")]
        weight = float(context.parameters["labels"])
        if weight:
            _refuse_useless(context.labels, graph)
        before = standing(graph, reference, samples, weight)
        clock = _train(graph, reference, student, samples, context)
        student.store()
        graph.recompile()  # other arguments of nodes, not only other constants
        after = standing(graph, reference, samples, weight)
        change = f"{after.since(before)} after {clock.taken} steps{clock.note()}"
        if not after.beats(before):
            student.restore()
            return [Entry(NAME, "model", "left alone", f"rolled back: {change}")]
        return [Entry(NAME, "model", f"trained {student.summary()}", change)]

    def ensures(self, graph: GraphModule) -> str | None:
        return None


def _refuse_useless(labels: Tensor | None, graph: GraphModule) -> None:
    """Raises CalibrationError where labels are asked for and can't teach this model."""
    if labels is None:
        raise CalibrationError(
            "finetune is to learn from labels, and the calibration data has none: add an array `labels` with one class "
            "index per sample, or set labels = 0 in the recipe's [parameters.finetune]"
        )
    first = list(graph.graph.nodes)[-1].all_input_nodes[0].meta.get("val")
    shape = tuple(first.shape) if isinstance(first, Tensor) else ()
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise CalibrationError(
            "finetune is to learn from labels, but the model's first output holds no scores of classes: "
            "set labels = 0 in the recipe's [parameters.finetune]"
        )
    if int(labels.max()) >= shape[1]:
        raise CalibrationError(
            f"the calibration data has a label {int(labels.max())}, but the model has {shape[1]} classes, 0 to "
            f"{shape[1] - 1}: give the labels this model was trained with"
        )


def _train(graph: GraphModule, reference: GraphModule, student: Student, samples: Samples, context: Context) -> Clock:
    """Train for the steps wished for, or until the time is up; the student is then as good as at its best epoch."""
    wish = context.parameters
    generator = torch.Generator().manual_seed(context.seed)
    rows = Rows([[*b, c] for b, c in zip(samples.train, samples.train_classes, strict=True)], samples.rowwise)
    count = sum(len(b[0]) for b in samples.train)
    per_epoch = math.ceil(count / int(wish["batch"])) if samples.rowwise else len(samples.train)
    lesson = Lesson(
        Runner(graph, student.given, student.steps, bits=student.bits),
        Runner(reference, {}),
        [(u.exit, u.float_exit) for u in block_units(reference, graph)[:-1]],
        float(wish["blocks"]),
        float(wish["labels"]),
    )
    optimizer = torch.optim.Adam(student.groups(float(wish["lr"])))
    rates = [g["lr"] for g in optimizer.param_groups]
    trained = [p for g in optimizer.param_groups for p in g["params"]]
    best, least = student.snapshot(), math.inf
    clock = Clock(int(wish["iterations"]), float(wish["time_limit_s"]))
    with torch.enable_grad():
        while clock.done < 1:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * clock.done)) / 2
            *inputs, classes = rows.minibatch(int(wish["batch"]), generator)
            teaching = _teaching(clock.done, float(wish["intervention"]), generator)
            loss = lesson.loss([t for t in inputs if t is not None], classes, teaching)
            optimizer.zero_grad()
            loss.backward(inputs=trained)  # the model's own parameters are shared with other graphs
            torch.nn.utils.clip_grad_value_(trained, 1e3)
            optimizer.step()
            clock.tick()
            context.progress(NAME, clock.taken, clock.steps)
            if clock.taken % per_epoch == 0 or clock.done >= 1:
                judged = lesson.mean(samples.held, samples.held_classes)
                if judged < least:
                    best, least = student.snapshot(), judged
    student.load(best)
    return clock


def _teaching(done: float, share: float, generator: torch.Generator) -> Teaching | None:
    """The intervention at this point of the training: its probability falls linearly from 1 to 0 within `share`."""
    return Teaching(1 - done / share, generator) if done < share else None


STEP = Finetune()
