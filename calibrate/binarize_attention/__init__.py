"""How an attention computes on bits. One method per file; the file's name is its name in recipes."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch.fx import Node

from .. import registry
from ..attention_bits import Place


class AttentionBinarizer(Protocol):
    """`defaults`: the method's options."""

    defaults: Mapping[str, Any]

    def write(self, place: Place, options: Mapping[str, Any]) -> Node:
        """Put bits in the place of this attention, fitted to what `place` has seen: the node [..., N, e] that is its
        output now. Raises Unfit, with nothing written, where the method has no form for it."""
        ...


def names() -> list[str]:
    """The methods there are; imports none."""
    return registry.names(__path__)


def find(name: str) -> AttentionBinarizer:
    """The method called `name`. Raises CalibrationError when there is none."""
    found: AttentionBinarizer = registry.find(__name__, __path__, name, "METHOD", "way to binarize attention")
    return found
