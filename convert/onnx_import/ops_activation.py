"""Activation functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator, unary

unary(
    {
        "Relu": F.relu,
        "Sigmoid": torch.sigmoid,
        "HardSwish": F.hardswish,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Mish": F.mish,
    }
)


@operator("LeakyRelu")
def leaky_relu(node: OnnxNode, x: Tensor) -> Tensor:
    """x where positive, else alpha x."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def elu(node: OnnxNode, x: Tensor) -> Tensor:
    """x where positive, else alpha (exp x - 1)."""
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def celu(node: OnnxNode, x: Tensor) -> Tensor:
    """x where positive, else alpha (exp(x / alpha) - 1)."""
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: OnnxNode, x: Tensor) -> Tensor:
    """gamma (x where positive, else alpha (exp x - 1))."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("PRelu")
def prelu(node: OnnxNode, x: Tensor, slope: Tensor) -> Tensor:
    """The slope broadcasts to x; one per channel is aten.prelu."""
    if slope.numel() == 1 or (x.dim() > 1 and tuple(slope.shape) == (x.shape[1], *[1] * (x.dim() - 2))):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x > 0, x, slope * x)


@operator("HardSigmoid")
def hard_sigmoid(node: OnnxNode, x: Tensor) -> Tensor:
    """max(0, min(1, alpha x + beta)); torch's has alpha = 1/6."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("Gelu")
def gelu(node: OnnxNode, x: Tensor) -> Tensor:
    """Exact, or by tanh."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish")
def swish(node: OnnxNode, x: Tensor) -> Tensor:
    """x sigmoid(alpha x)."""
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("ThresholdedRelu")
def thresholded_relu(node: OnnxNode, x: Tensor) -> Tensor:
    """x above alpha, else 0."""
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("Shrink")
def shrink(node: OnnxNode, x: Tensor) -> Tensor:
    """x + bias below -lambd, x - bias above lambd, 0 between."""
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero))


@operator("Softmax", "LogSoftmax")
def softmax(node: OnnxNode, x: Tensor) -> Tensor:
    """Over one axis from opset 13 on; before, over all axes from `axis` (default 1) on, flattened."""
    function = F.log_softmax if node.op == "LogSoftmax" else F.softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("Hardmax")
def hardmax(node: OnnxNode, x: Tensor) -> Tensor:
    """1 at the first maximum along the axis, 0 elsewhere."""
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    flat = x if node.opset >= 13 else x.flatten(axis)
    first = torch.argmax(flat, -1 if node.opset < 13 else axis, keepdim=True)
    ones = torch.ones_like(first, dtype=x.dtype)
    return torch.zeros_like(flat).scatter(-1 if node.opset < 13 else axis, first, ones).reshape(x.shape)
