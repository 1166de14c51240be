"""Encoders of two blocks with tokens cut behind both, joined into one graph so that a target lowers them at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from encoders import HEADS, TOKENS, WIDTH, tokens
from small_graphs import capture
from token_models import Heads, padding
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from calibrate.graph import clone, constant, finish
from calibrate.samples import InputSpec
from calibrate.tokens.insert import Cut, reduce
from convert.normal_form import normalise
from device_profiles import load
from targets import FloatFormat, Job, Session, find

RULES = {
    "onnx": load("generic-x86-vnni").rules("onnx"),
    "tflite": load("raspberry-pi-4b").rules("tflite"),
    "coreml": load("iphone-a15").rules("coreml"),
}
NAMES = ("x", "keep")


class Small(nn.Module):
    """tokens [B, 6, 8] and padding [B, 6] -> scores [B, 5]: attention and its residual twice, no positions.

    `extra`: "mask" of -inf on padding, "table" of biases, or nothing; then tokens that are the same tie, and the mean
    of all tokens is the answer.
    """

    def __init__(self, extra: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.head, self.extra = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5), extra
        self.blocks = nn.ModuleList(Heads() for _ in range(2))
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS), requires_grad=False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        hidden = torch.zeros(1).masked_fill(keep[:, None, None, :] == 0, float("-inf"))
        x = self.embed(x) * 4
        for block in self.blocks:
            x = x + block(x, {"mask": hidden, "table": self.table}.get(self.extra))
        return self.head(x.mean(1) if self.extra == "" else x[:, 0])


@dataclass(frozen=True)
class Case:
    extra: str
    method: str
    keep: tuple[int, int] = (5, 3)
    options: Mapping[str, object] = field(default_factory=dict)


CASES = {
    "even": Case("table", "even"),
    "random": Case("", "random"),
    "evit": Case("mask", "evit", options={"fuse": False}),
    "evit_fused": Case("", "evit"),
    "importance": Case("mask", "importance"),
    "zero_tprune": Case("", "zero_tprune", (4, 3), {"similar": 1, "rounds": 1}),
    "tome": Case("", "tome"),
    "everything": Case("table", "even", (TOKENS, TOKENS)),
}


@cache
def float_graph(extra: str) -> GraphModule:
    return normalise(capture(Small(extra).eval(), tokens(), padding()))


def cut(name: str, form: str) -> GraphModule:
    """The encoder of a case, cut."""
    case, graph = CASES[name], clone(float_graph(CASES[name].extra))
    reduce(graph, [Cut(i, k, case.method, case.options) for i, k in enumerate(case.keep)], form=form)
    return graph


def joined(graphs: Mapping[str, GraphModule]) -> GraphModule:
    """One graph of all, on the same inputs; an output for each."""
    root, graph = nn.Module(), Graph()
    inputs = [graph.placeholder(name) for name in NAMES]
    results = []
    for label, part in graphs.items():
        made: dict[Node, Node] = {}
        for node, new in zip(part.graph.find_nodes(op="placeholder"), inputs, strict=True):
            made[node] = new
            new.meta.update(node.meta)
        for node in part.graph.nodes:
            if node.op == "output":
                results.append(made[node.args[0][0]])
            elif node.op == "get_attr":
                name = f"{label}_{node.target}".replace(".", "_")
                root.register_buffer(name, constant(part, node))
                made[node] = graph.get_attr(name)
                made[node].meta.update(node.meta)
            elif node.op == "call_function":
                made[node] = graph.node_copy(node, lambda n, made=made: made[n])
                made[node].meta["layer"] = f"{label}.{node.meta.get('layer', node.name)}"
    graph.output(tuple(results))
    return finish(GraphModule(root, graph))


def job(graph: GraphModule, outputs: tuple[str, ...], target: str, compute: FloatFormat = "float32") -> Job:
    """One sample at a time, as a device runs it."""
    inputs = (InputSpec("x", (1, TOKENS, 8), "float32", False), InputSpec("keep", (1, TOKENS), "int64", False))
    return Job("cuts", graph, inputs, outputs, RULES[target], compute)


def lowered(work: Job, target: str, folder: Path) -> tuple[Session, Path]:
    path = folder / f"cuts{find(target).suffix}"
    find(target).lower(work, path)
    return find(target).open(path), path


def answers(session: Session, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the file says of every sample, by output."""
    one_by_one = zip(*(t.split(1) for t in inputs), strict=True)
    rows = [session.run({n: t.numpy() for n, t in zip(NAMES, sample, strict=True)}) for sample in one_by_one]
    return {name: torch.from_numpy(np.concatenate([r[name] for r in rows])) for name in rows[0]}


def samples(count: int = 200) -> tuple[Tensor, Tensor]:
    """Random tokens; from 20 to 100 with ties: two pairs that are the same, all the same, all but one, zeros."""
    x = tokens(count, seed=9)
    for first, pattern in ((20, [0, 1, 1, 3, 3, 5]), (40, [0] * 6), (60, [0, 1, 1, 1, 1, 1])):
        x[first : first + 20] = x[first : first + 20, pattern]
    x[80:100] = 0
    return x, padding(count)


def apart(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference of each sample, relative to the reach of all."""
    return (one - other).abs().amax(1) / other.abs().max()
