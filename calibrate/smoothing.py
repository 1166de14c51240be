"""Scales that move the spread of channels from activations into weights: SmoothQuant's formula, and better ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layer_trial import Activations, Seen, row_weights
from .plan import Plan

# Below this share of the largest, a channel's reach or weight says nothing about how it should be scaled.
DEAD = 1e-5
ITERATIONS, RATE = 80, 0.05


def scales(reach: Tensor, load: Tensor, alpha: float) -> Tensor:
    """s per channel, float32 [C], geometric mean 1: reach^alpha / load^(1 - alpha); 1 where either is dead."""
    alive = (reach > DEAD * reach.max()) & (load > DEAD * load.max())
    if not alive.any():
        return torch.ones_like(reach)
    logs = alpha * reach.double().clamp(min=1e-30).log() - (1 - alpha) * load.double().clamp(min=1e-30).log()
    return torch.where(alive, (logs - logs[alive].mean()).exp(), torch.ones_like(logs)).float()


def refined(
    start: Tensor,
    read: Sequence[tuple[Seen, Tensor, Tensor, int]],
    plan: Plan,
    how: Activations,
) -> Tensor:
    """`start` (float32 [C]) improved by gradient descent on the rounding noise that is to be expected.

    `read`: for each layer what it reads, its weight [out, in], the channel of each column, and its bits. Rounding adds
    step² / 12 to a number: the step of activations is their range over 255, that of a row of weights its largest
    magnitude over the largest code. Both noises are summed through the layer, rows of the input weighed as
    `output_error` does. Only maxima and second moments enter, so that no layer is run.
    """
    terms = [_moments(*layer) for layer in read]
    logs = start.float().log().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([logs], lr=RATE)
    best, least = start, float("inf")
    for _ in range(ITERATIONS):
        noise = sum(_noise(logs[columns].exp(), seen, rest, plan, how) for seen, columns, rest in terms)
        assert isinstance(noise, Tensor)
        if float(noise.detach()) < least:
            best, least = logs.detach().exp(), float(noise.detach())
        optimiser.zero_grad()
        noise.log().backward()
        optimiser.step()
    return (best / best.log().mean().exp()).float()


def _moments(seen: Seen, weight: Tensor, columns: Tensor, bits: int) -> tuple[Seen, Tensor, tuple]:
    rows = torch.cat(seen.rows)
    weights = row_weights((rows @ weight.T).square().sum(1))
    moment = (rows.square() * weights[:, None]).sum(0)
    columns_power = weight.square().sum(0)
    code = 127 if bits == 8 else 2 ** (bits - 1) - 1
    return seen, columns, (weights, moment, columns_power, weight.abs(), code)


def _noise(scale: Tensor, seen: Seen, rest: tuple, plan: Plan, how: Activations) -> Tensor:
    weights, moment, power, weight, code = rest
    steps = (weight * scale).amax(1) / code
    noise = steps.square().sum() * (moment / scale.square()).sum()
    if how == "float":
        return noise
    if how == "row_int8":
        rows = torch.cat(seen.rows) / scale
        spread = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
        total = (spread.square() * weights).sum()
    else:
        lows, highs = (torch.stack(x) / scale for x in (seen.lows, seen.highs))
        if how == "tensor_uint8":
            spread = highs.amax(1).clamp(min=0) - lows.amin(1).clamp(max=0)
        elif plan.symmetric:
            spread = 2 * torch.maximum(highs.amax(), -lows.amin())
        else:
            spread = highs.amax().clamp(min=0) - lows.amin().clamp(max=0)
        total = spread.square().mean() * weights.sum()
    levels = 65535 if how == "int16" else 255
    return noise + total / levels**2 * (power * scale.square()).sum()
