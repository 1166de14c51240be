"""What the axes of a value hold: each axis is a product of factors, some of which are the tokens or the batch.

An axis [B * heads] that torch's own attention makes is two factors; a reshape regroups factors and never loses which
one holds the tokens. Sizes are plain integers: each symbol (a dynamic batch) stands as a large prime of its own, so
that products of sizes can be divided without asking torch, which would turn every question into a guard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

PRIMES = (100003, 100019, 100043, 100049)
TOKENS, BATCH = "tokens", "batch"


@dataclass(frozen=True)
class Factor:
    """`size` values along an axis; `label` is TOKENS, BATCH or ""; `skipped` tokens were cut off at the front."""

    size: int
    label: str = ""
    skipped: int = 0


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


@dataclass
class Sizes:
    """Shapes as plain integers, a prime for each symbol."""

    primes: dict[str, int] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self._plain(d) for d in tensor.shape)

    def _plain(self, size: object) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr  # type: ignore[attr-defined]
        for symbol in expression.free_symbols:
            self.primes.setdefault(str(symbol), PRIMES[len(self.primes) % len(PRIMES)])
        return int(expression.subs({s: self.primes[str(s)] for s in expression.free_symbols}))


def plain(size: int) -> Axis:
    """An axis that holds neither tokens nor batch."""
    return (Factor(size),) if size > 1 else ()


def holds_tokens(axis: Axis) -> bool:
    return any(f.label == TOKENS for f in axis)


def token_axes(axes: Axes) -> tuple[int, ...]:
    """The axes that hold tokens, counted from the last (-1), first ones first."""
    return tuple(i - len(axes) for i, axis in enumerate(axes) if holds_tokens(axis))


def batch_axis(axes: Axes) -> int | None:
    """The axis that is the batch and nothing else, counted from the last; None where there is none."""
    found = [i - len(axes) for i, axis in enumerate(axes) if [f.label for f in axis] == [BATCH]]
    return found[0] if len(found) == 1 else None


def tokens_alone(axis: Axis) -> bool:
    """Whether the axis is the tokens and nothing else."""
    return [f.label for f in axis] == [TOKENS]


def layout_of_tokens(axis: Axis) -> tuple[int, Factor, int]:
    """(product of the factors before the tokens, the tokens, product of those after)."""
    (at,) = [i for i, f in enumerate(axis) if f.label == TOKENS]
    before = after = 1
    for factor in axis[:at]:
        before *= factor.size
    for factor in axis[at + 1 :]:
        after *= factor.size
    return before, axis[at], after


def combined(one: Axis, other: Axis) -> Axis | None:
    """The axis of a broadcast of two; None where only one of two long axes holds tokens, or they lie differently."""
    if not one or not other:
        return one or other
    if holds_tokens(one) != holds_tokens(other):
        return None
    if holds_tokens(one) and layout_of_tokens(one) != layout_of_tokens(other):
        return None
    return one if sum(bool(f.label) for f in one) >= sum(bool(f.label) for f in other) else other


def regrouped(axes: Axes, sizes: Sequence[int]) -> Axes | None:
    """The axes after a reshape to `sizes`; None where tokens or batch would be torn apart."""
    left = [f for axis in axes for f in axis]
    result: list[Axis] = []
    for size in sizes:
        group: list[Factor] = []
        if size == 1 and left and left[0].size == 1:
            group.append(left.pop(0))  # a static batch of one keeps its label
        while size > 1:
            while left and left[0].size == 1:
                left.pop(0)
            if not left:
                return None
            factor = left.pop(0)
            if size % factor.size == 0:
                group.append(factor)
                size //= factor.size
            elif not factor.label and factor.size % size == 0:
                group.append(Factor(size))
                left.insert(0, Factor(factor.size // size))
                size = 1
            else:
                return None
        result.append(tuple(group))
    return tuple(result) if all(f.size == 1 for f in left) else None
