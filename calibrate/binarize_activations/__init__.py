"""How an activation becomes one bit. One method per file; the file's name is its name in recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .. import registry


@dataclass(frozen=True)
class Fitted:
    """x is about `offset` + `scale` * sign(x - `threshold`), with sign(0) = +1.

    `threshold` float32 of the shape asked for, `scale` > 0, `offset` float64 [C]: constant, so that the bias of the
    layer behind takes it.
    """

    threshold: Tensor
    scale: float
    offset: Tensor


class ActivationBinarizer(Protocol):
    """`defaults`: the method's options."""

    defaults: Mapping[str, Any]

    def fit(self, samples: Sequence[Tensor], shape: tuple[int, ...], options: Mapping[str, Any]) -> Fitted:
        """Signs for `samples`, float32 [N, C, ...] or [..., C]: `shape` is [C, 1...], or [C] for channels last."""
        ...


def names() -> list[str]:
    """The methods there are; imports none."""
    return registry.names(__path__)


def find(name: str) -> ActivationBinarizer:
    """The method called `name`. Raises CalibrationError when there is none."""
    found: ActivationBinarizer = registry.find(__name__, __path__, name, "METHOD", "way to binarize activations")
    return found
