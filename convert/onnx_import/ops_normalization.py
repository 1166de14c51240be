"""Normalisation, and dropout, which does nothing at inference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import OnnxNode, operator


def _single(node: OnnxNode) -> None:
    if len([o for o in node.outputs if o]) > 1:
        raise node.refuse("returns statistics beside its result")


@operator("BatchNormalization")
def batch_norm(node: OnnxNode, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """With stored statistics."""
    if node.get("training_mode", 0):
        raise node.refuse("is in training mode")
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.1, node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(node: OnnxNode, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over the spatial axes of each sample and channel."""
    return F.instance_norm(x, weight=scale, bias=shift, eps=node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_norm(node: OnnxNode, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Over all axes from `axis` on."""
    _single(node)
    axis = node.get("axis", -1) % x.dim()
    shape = list(x.shape[axis:])
    if list(scale.shape) == shape and (shift is None or list(shift.shape) == shape):
        return F.layer_norm(x, shape, scale, shift, node.get("epsilon", 1e-5))
    result = F.layer_norm(x, shape, None, None, node.get("epsilon", 1e-5)) * scale
    return result if shift is None else result + shift


@operator("RMSNormalization")
def rms_norm(node: OnnxNode, x: Tensor, scale: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over all axes from `axis` on."""
    axis = node.get("axis", -1) % x.dim()
    return F.rms_norm(x, list(x.shape[axis:]), scale, node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(node: OnnxNode, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift are one per channel, as in opset 21; the older form is deprecated and onnx refuses it."""
    return F.group_norm(x, node.get("num_groups"), scale, shift, node.get("epsilon", 1e-5))


@operator("MeanVarianceNormalization")
def mean_variance_norm(node: OnnxNode, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-9) over the axes."""
    axes = tuple(node.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(axes, keepdim=True) + 1e-9)


@operator("LpNormalization")
def lp_norm(node: OnnxNode, x: Tensor) -> Tensor:
    """x / |x|_p along the axis."""
    return x / torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)


@operator("LRN")
def local_response_norm(node: OnnxNode, x: Tensor) -> Tensor:
    """Across neighbouring channels."""
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return F.local_response_norm(x, node.get("size"), alpha, beta, bias)


@operator("Dropout")
def dropout(node: OnnxNode, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    """Identity at inference."""
    _single(node)
    return x
