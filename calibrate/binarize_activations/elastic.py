"""Elastic signs: x is about a * sign(x - b), a and b fitted and then trained (BiT, arXiv 2205.13016; with b per channel
RSign of ReActNet, arXiv 2003.03488).

BiT gives nonnegative activations the values 0 and a instead. Here both kinds get two values around the mean, and the
constant between the two forms goes into the next layer's bias: what is behind a ReLU still fills both signs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CalibrationError
from . import Fitted

THRESHOLDS = ("channel", "tensor", "zero")


class Elastic:
    """`threshold`: "channel", the mean of each channel; "tensor", that of all; "zero". a = mean |x - b|."""

    defaults: ClassVar[dict[str, Any]] = {"threshold": "channel"}

    def fit(self, samples: Sequence[Tensor], shape: tuple[int, ...], options: Mapping[str, Any]) -> Fitted:
        """See `ActivationBinarizer.fit`. Raises CalibrationError for a threshold that there is not."""
        where = options["threshold"]
        if where not in THRESHOLDS:
            raise CalibrationError(f"elastic signs have no threshold {where!r}: use {', '.join(THRESHOLDS)}")
        means = _channel_mean(samples, shape)
        if where == "channel":
            threshold = means.float()
        else:
            threshold = torch.full_like(means, 0.0 if where == "zero" else float(means.mean())).float()
        threshold = threshold.view(shape)
        count = sum(x.numel() for x in samples)
        scale = sum(float((x - threshold).abs().sum(dtype=torch.float64)) for x in samples) / count
        signs = [torch.where(x - threshold >= 0, 1.0, -1.0) for x in samples]
        scale = scale or 1.0  # nothing but one value: any scale will do, as the offset takes it
        return Fitted(threshold, scale, means - scale * _channel_mean(signs, shape))


def _channel_mean(samples: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The mean of every channel, float64 [C]."""
    axis = -len(shape)
    total, count = torch.zeros(shape[0], dtype=torch.float64), 0
    for x in samples:
        moved = x.movedim(axis, 0).reshape(shape[0], -1)
        total, count = total + moved.sum(1, dtype=torch.float64), count + moved.shape[1]
    return total / count


METHOD = Elastic()
