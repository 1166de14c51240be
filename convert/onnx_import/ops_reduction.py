"""Reductions; the axes are an attribute in older opsets, an input in newer ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import OnnxNode, operator

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS: dict[str, Reduction] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt((x * x).sum(axes, keepdim=keep)),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(x.sum(axes, keepdim=keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


@operator(*REDUCTIONS, host=(1,))
def reduce(node: OnnxNode, x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Without axes over all of them, or over none where noop_with_empty_axes says so."""
    chosen = axes or node.get("axes")
    if not chosen and node.get("noop_with_empty_axes", 0):
        return x
    along = tuple(a % x.dim() for a in chosen) if chosen else tuple(range(x.dim()))
    return REDUCTIONS[node.op](x, along, bool(node.get("keepdims", 1)))
