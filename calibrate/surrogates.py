"""Gradients for signs, which have none of their own: what training takes in their place.

Values are exact signs, +1 for 0; only the way back differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import pi

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """-1 below zero, +1 from zero on: `torch.sign` gives 0 for 0, which no bit holds."""
    return torch.where(x >= 0, 1.0, -1.0)


def straight(x: Tensor) -> Tensor:
    """sign(x) with the gradient 1 where |x| <= 1, else 0 (arXiv 1602.02830)."""
    inside = x.clamp(-1, 1)
    return inside + (sign(x) - inside).detach()


def bireal(x: Tensor) -> Tensor:
    """sign(x) with the gradient 2 - 2|x| where |x| <= 1, else 0 (Bi-Real Net, arXiv 1808.00278)."""
    inside = x.clamp(-1, 1)
    smooth = inside * (2 - inside.abs())
    return smooth + (sign(x) - smooth).detach()


def periodic(x: Tensor, frequency: float) -> Tensor:
    """sign(sin(w x)) with the gradient of sin(w x), which never ends for good (BiPer, arXiv 2404.01278)."""
    wave = torch.sin(frequency * x)
    return wave + (sign(wave) - wave).detach()


@dataclass(frozen=True)
class Surrogate:
    """`activation`: the sign of an activation in units of its scale. `weight`: that of a latent weight in units of its
    level, None for clipping at the level. `start`: where latent weights start, in units of their level."""

    activation: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor] | None = None
    start: float = 1.0


# BiPer starts from a trained float network, most of whose weights lie inside the first half wave; so do weights that
# start at half of it, where the wave has two thirds of its slope.
FREQUENCY = pi / 2
SURROGATES = {
    "straight": Surrogate(straight),
    "bireal": Surrogate(bireal),
    "periodic": Surrogate(bireal, partial(periodic, frequency=FREQUENCY), 0.5),
}
