"""Which tokens stay. One method per file; the file's name is its name in recipes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import Node

from ... import registry
from ..attention import Site
from ..builder import Builder
from ..selection import Reduction


@dataclass(frozen=True)
class Request:
    """Keep `keep` tokens, the first `protected` among them, taken in the form `form`; `seed` decides what is random.

    `depth` is how far into the model the cut is, from 0 to 1. `planes` travel with the tokens from cut to cut: values
    [B, N], by name, that a method may add and read; they are reduced like the tokens. `graph_inputs` are the model's.
    """

    keep: int
    protected: int
    form: str
    seed: int
    depth: float
    options: Mapping[str, Any]
    planes: dict[str, Node]
    graph_inputs: tuple[Node, ...]


class Method(Protocol):
    """`attention`: it looks at the probabilities, so the attention before the cut is written out.

    `halves`, where true: one cut removes at most half of the unprotected tokens. `reconstructs`, where true: its
    reductions can be undone (`restoring.Restoring`). `trains`, where true: it has constants that `recover` can train
    (see `trained`). `defaults`, where a method has them: its options and their default values.
    """

    attention: bool

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        """Write the operators that choose, through `build`, and return what takes the tokens."""
        ...


def names() -> list[str]:
    """The methods there are; imports none."""
    return registry.names(__path__)


def find(name: str) -> Method:
    """The method called `name`. Raises CalibrationError when there is none."""
    found: Method = registry.find(__name__, __path__, name, "METHOD", "token method")
    return found
