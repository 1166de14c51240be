"""Small modules captured with torch.export, and plans like those of real runtimes, for the tests of this folder."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from calibrate.graph import finish, kind
from calibrate.plan import Plan
from calibrate.steps import Context

# Every kind whose kernel works on codes, as ONNX Runtime and LiteRT have them.
ISLANDS = Plan(
    steps=("quantize_static",),
    quantize_inputs=frozenset({"conv", "linear", "add", "mean", "avg_pool"}),
    quantize_outputs=frozenset({"conv", "linear", "add", "mean", "avg_pool"}),
    shared_scale=frozenset({"max_pool", "pad", "slice", "reshape", "transpose", "split", "cat"}),
)
# Q/DQ on the inputs of weighted layers only, and on the skip of a residual add, as TensorRT wants it.
SKIPS = Plan(
    steps=("quantize_static",),
    symmetric=True,
    int32_bias=False,
    residual_add="skip",
)


def capture(module: nn.Module, *inputs: Tensor) -> GraphModule:
    """The float graph of `module`: batch dynamic, positional tensors in, a tuple out, layers named by their module."""
    batch = torch.export.Dim("batch", min=2, max=1024)
    shapes = tuple({0: batch} for _ in inputs)
    starred = isinstance(module, Made)  # forward(*inputs) is one argument to torch.export
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export warns of its own
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=(shapes,) if starred else shapes)
        graph = program.module(check_guards=False)
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            graph.graph.erase_node(node)
        elif node.op == "call_function" and kind(node) in ("conv", "linear", "embedding", "batch_norm"):
            path = [p for p, _ in node.meta["nn_module_stack"].values()][-1]
            node.meta["layer"] = path or node.name
    graph.graph.set_codegen(CodeGen())
    return finish(GraphModule(graph, graph.graph))


def context(plan: Plan, *batches: list[Tensor]) -> Context:
    """A step's context over these batches, all of them in every pass."""
    return Context(plan=plan, batches=lambda: iter(batches), few_batches=lambda: iter(batches))


def keeping(plan: Plan, **reasons: str) -> Plan:
    return replace(plan, keep_float=reasons)


def nodes_of(graph: GraphModule, what: str) -> list[Node]:
    """The nodes of one kind, in order."""
    return [n for n in graph.graph.nodes if kind(n) == what]


def only(graph: GraphModule, what: str) -> Node:
    (node,) = nodes_of(graph, what)
    return node


class Made(nn.Module):
    """A module whose forward is `call(self, *inputs)`, with the given children."""

    def __init__(self, call: Callable[..., object], **children: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Tensor) -> object:
        return self.call(self, *inputs)


def images(count: int = 4, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class TextLayers(nn.Module):
    """A table, a convolution and a linear layer: one of each that holds weights; takes `IDS`."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.linear = nn.Embedding(64, 16), nn.Conv1d(16, 32, 3), nn.Linear(32, 24)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.conv(self.table(ids).transpose(1, 2)).mean(2))


IDS = torch.arange(20).view(2, 10)
