"""Matrix products and attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator


@operator("MatMul")
def matmul(node: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    """NumPy's matmul."""
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(node: OnnxNode, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A B + beta C, either matrix transposed; a layer where it is one."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.t() if node.get("transA", 0) else a
    weight = b if node.get("transB", 0) else b.t()
    row = c is None or (c.dim() == 1 and c.shape[0] == weight.shape[0])
    if alpha == 1.0 and row and (c is None or beta == 1.0):
        return F.linear(a, weight, c)
    product = F.linear(a, weight) * alpha if alpha != 1.0 else F.linear(a, weight)
    return product if c is None or beta == 0.0 else product + (c if beta == 1.0 else beta * c)


@operator("Einsum")
def einsum(node: OnnxNode, *operands: Tensor) -> Tensor:
    """Einstein's sum."""
    return torch.einsum(node.get("equation"), *operands)


@operator("Attention")
def attention(
    node: OnnxNode, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *past: Tensor | None
) -> Tensor:
    """Opset 23: [batch, heads, length, width], or [batch, length, heads * width] with the heads as attributes."""
    if any(p is not None for p in past) or len([o for o in node.outputs if o]) > 1:
        raise node.refuse("has a cache or returns more than its result")
    if node.get("softcap", 0.0):
        raise node.refuse("has a soft cap")
    flat = query.dim() == 3
    if flat:
        heads = (node.get("q_num_heads"), node.get("kv_num_heads"), node.get("kv_num_heads"))
        query, key, value = (_heads(t, n) for t, n in zip((query, key, value), heads, strict=True))
    grouped = query.shape[1] != key.shape[1]
    causal = bool(node.get("is_causal", 0))
    result = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=node.get("scale"), enable_gqa=grouped
    )
    return result.transpose(1, 2).flatten(2) if flat else result


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
