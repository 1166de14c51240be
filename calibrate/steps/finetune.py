"""Train the quantized model for a short while to answer as the float model does, on the calibration samples alone."""

import math
import time
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.blocks import block_units
from calibrate.graph import constant, weight_nodes
from calibrate.lockstep import partners
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.training import Runner
from calibrate.training_model import Student
from calibrate.training_samples import TOO_FEW, Rows, Samples, output_db

NAME = "finetune"


class Finetune:
    """Quantization-aware training by distillation: latent weights, scales of weights and of static activations
    (their gradients are those of LSQ, arXiv 1902.08153), biases, and gamma and beta of layer norms.

    The loss is the Kullback-Leibler divergence from the float model's classes for an output [N, classes], cosine
    distance for others, the squared error of the outputs, and of each block's output. Zero points stay, and tensors
    that share a scale go on sharing it. The epoch that did best on held-out samples is kept; where it did not bring
    the model's output closer to float, all is rolled back. Random choices come from the context's seed; two runs
    differ only where `time_limit_s` cut one short.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 3,
        "lr": 0.002,
        "batch": 32,
        "samples": 1024,
        "time_limit_s": 300.0,
        "blocks": 0.3,
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        reference = context.float_graph
        assert reference is not None
        samples = Samples.of(graph, context, context.parameters["samples"])
        if samples is None:
            return [Entry(NAME, "model", "left alone", TOO_FEW)]
        student = Student(graph, context.plan, _float_weights(reference, graph))
        if not student.parameters():
            return [Entry(NAME, "model", "left alone", "no layer has a weight in codes to train")]
        before = output_db(reference, graph, samples.held)
        steps = _train(graph, reference, student, samples, context)
        student.store()
        graph.recompile()  # other arguments of nodes, not only other constants
        after = output_db(reference, graph, samples.held)
        change = f"{before:.1f} -> {after:.1f} dB on held-out samples after {steps} steps"
        if not after > before:
            student.restore()
            return [Entry(NAME, "model", "left alone", f"rolled back: {change}")]
        return [Entry(NAME, "model", f"trained {student.summary()}", change)]

    def ensures(self, graph: GraphModule) -> str | None:
        return None


def _float_weights(reference: GraphModule, graph: GraphModule) -> dict[Node, Tensor]:
    """Layer of the quantized graph -> the weight that it had as float."""
    found = {}
    for node, twin in partners(reference, graph).items():
        source = weight_nodes(twin)[0]
        if source is not None:
            found[node] = constant(reference, source)
    return found


def _train(graph: GraphModule, reference: GraphModule, student: Student, samples: Samples, context: Context) -> int:
    """Train for the epochs wished for, or until the time is up; the number of steps taken."""
    wish = context.parameters
    generator = torch.Generator().manual_seed(context.seed)
    rows = Rows([[*b] for b in samples.train], samples.rowwise)
    count = sum(len(b[0]) for b in samples.train)
    per_epoch = math.ceil(count / int(wish["batch"])) if samples.rowwise else len(samples.train)
    total = max(1, int(wish["epochs"]) * per_epoch)
    units = block_units(reference, graph)
    pairs = [(u.exit, u.float_exit) for u in units[:-1]]
    learner, teacher = Runner(graph, student.given, student.steps), Runner(reference, {})
    optimizer = torch.optim.Adam(student.groups(float(wish["lr"])))
    rates = [g["lr"] for g in optimizer.param_groups]
    start, done, taken = time.monotonic(), 0.0, 0
    best, least = student.snapshot(), math.inf
    with torch.enable_grad():
        while done < 1:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            batch = [t for t in rows.minibatch(int(wish["batch"]), generator) if t is not None]
            loss = _loss(learner, teacher, batch, pairs, float(wish["blocks"]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_([p for g in optimizer.param_groups for p in g["params"]], 1e3)
            optimizer.step()
            taken += 1
            done = max(taken / total, (time.monotonic() - start) / float(wish["time_limit_s"]))
            context.progress(NAME, taken * int(wish["batch"]))
            if taken % per_epoch == 0 or done >= 1:
                with torch.no_grad():
                    judged = sum(float(_loss(learner, teacher, b, [], 0.0)) * len(b[0]) for b in samples.held)
                if judged < least:
                    best, least = student.snapshot(), judged
    student.load(best)
    return taken


def _loss(
    learner: Runner, teacher: Runner, batch: list[Tensor], pairs: list[tuple[Node, Node]], blocks: float
) -> Tensor:
    """How far the learner's outputs, and block outputs, are from the teacher's on `batch`."""
    with torch.no_grad():
        wanted = teacher.run(teacher.nodes, dict(zip(teacher.placeholders, batch, strict=True)))
    got = learner.run(learner.nodes, dict(zip(learner.placeholders, batch, strict=True)))
    terms = [
        distance(got[mine], wanted[theirs])
        for mine, theirs in zip(learner.outputs, teacher.outputs, strict=True)
        if wanted[theirs].is_floating_point()
    ]
    loss = torch.stack(terms).sum()
    if pairs and blocks:
        loss = loss + blocks * torch.stack([relative(got[a], wanted[b]) for a, b in pairs]).mean()
    return loss


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the power of what is wanted."""
    return (got - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


def distance(got: Tensor, wanted: Tensor) -> Tensor:
    """Divergence of class probabilities for logits [N, classes > 1], else cosine distance; plus the squared error."""
    if wanted.dim() == 2 and wanted.shape[1] > 1:
        ours, theirs = torch.log_softmax(got, 1), torch.log_softmax(wanted, 1)
        apart = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    else:
        flat, reference = got.reshape(len(got), -1), wanted.reshape(len(wanted), -1)
        apart = 1 - torch.nn.functional.cosine_similarity(flat, reference).mean()
    return apart + relative(got, wanted)


STEP = Finetune()
