"""Small encoders with int8 codes, whose attention becomes bits by one method."""

from dataclasses import replace
from typing import Any

from encoders import tokens
from small_graphs import ISLANDS, context
from token_models import graph_of, padding
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import attention_parts, steps
from calibrate.attention_bits import values
from calibrate.attention_parts import Attention
from calibrate.plan import Entry, Plan
from calibrate.steps import Context

STEP = "binarize_attention"
PLAIN = ("encoder: fused, scale", "encoder: separate", "encoder: by hand, post, pooled", "torch: pre")
MASKED = tuple(f"masked: {m}" for m in ("bool row", "bool square", "infinite", "added", "added by hand"))
MASKED += ("masked: filled by hand", "torch: post masked")


def samples(name: str, count: int = 64, seed: int = 0) -> list[list[Tensor]]:
    """Calibration batches of 16 for one of token_models' graphs."""
    two = name.startswith(("masked", "torch"))
    batches = [[tokens(16, seed + i), padding(16)] if two else [tokens(16, seed + i)] for i in range(count // 16)]
    return batches


def quantized(name: str, plan: Plan = ISLANDS, **parameters: Any) -> tuple[GraphModule, Context]:
    """Static int8, attention written out, and the context for the steps behind it."""
    graph = graph_of(name)
    told = {STEP: parameters, "finetune": {"iterations": 60, "batch": 16}}
    setting = context(replace(plan, parameters=told), *samples(name))
    steps.apply("quantize_static", graph, setting)
    attention_parts.write_out(graph, {})
    return graph, setting


def binarized(name: str, method: str, plan: Plan = ISLANDS, **options: Any) -> tuple[GraphModule, Context, list[Entry]]:
    """The graph with every attention on bits."""
    graph, setting = quantized(name, plan, method=method, options=options)
    return graph, setting, steps.apply(STEP, graph, setting)


def attentions(graph: GraphModule) -> list[Attention]:
    """What is a softmax between two products still: ask before it becomes bits."""
    return list(attention_parts.find(graph))


def seen(graph: GraphModule, name: str, *nodes: Node) -> list[Tensor]:
    """What these nodes compute for samples that nothing was fitted to."""
    return values(graph, samples(name, 16, seed=90), nodes)[0]
