"""How many tokens stay behind which block: schedules, their share of tokens, and sets of blocks worth trying.

A schedule is static: which tokens go depends on the sample, how many never does. Few cuts beat a cut in every block at
equal work, since every selection costs operators of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# Sets of cuts that are tried, as shares of a model's depth.
PLACES = (
    (1 / 4, 1 / 2, 3 / 4),
    (1 / 6, 5 / 12, 2 / 3),
    (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6),
    (0.0, 1 / 3, 2 / 3),
    (1 / 3, 2 / 3),
    (1 / 4, 1 / 2),
    (0.0, 1 / 2),
    (1 / 2, 3 / 4),
    (1 / 3,),
    (1 / 4,),
    (1 / 6,),
    (0.0,),
    (1 / 2,),
)
BISECTIONS = 40


@dataclass(frozen=True)
class Schedule:
    """`cuts`: (block, tokens that stay behind its attention), blocks rising, counts falling; of `blocks` blocks."""

    blocks: int
    tokens: int
    cuts: tuple[tuple[int, int], ...] = ()

    @property
    def leaving(self) -> tuple[int, ...]:
        """The number of tokens that leave each block."""
        counts, now, kept = [], self.tokens, dict(self.cuts)
        for block in range(self.blocks):
            now = kept.get(block, now)
            counts.append(now)
        return tuple(counts)

    @property
    def entering(self) -> tuple[int, ...]:
        """The number of tokens that each block's attention sees."""
        return (self.tokens, *self.leaving[:-1])

    @property
    def share(self) -> float:
        """The mean share of tokens that leave a block."""
        return sum(self.leaving) / (self.blocks * self.tokens)


def geometric(
    blocks: int, tokens: int, places: tuple[int, ...], share: float, protected: int, halves: bool = False
) -> Schedule | None:
    """Cuts behind the blocks `places`, each keeping the same fraction of the unprotected tokens, to a mean `share`.

    With `halves` a cut removes at most half of the unprotected tokens, as a bipartite merge can. None where the share
    cannot be reached: it would leave no unprotected token behind the last cut, the cuts come too late, or one of them
    would remove nothing.
    """
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = _kept(blocks, tokens, places, middle, protected, halves)
        low, high = (middle, high) if found.share < share else (low, middle)
    found = min(
        (_kept(blocks, tokens, places, f, protected, halves) for f in (low, high)), key=lambda s: abs(s.share - share)
    )
    near = abs(found.share - share) * blocks * tokens <= max(1.0, len(places) * blocks / 2)
    counts = (tokens, *(keep for _, keep in found.cuts))
    falling = all(before > after for before, after in pairwise(counts))
    return found if near and falling and counts[-1] > protected + 1 else None


def _kept(blocks: int, tokens: int, places: tuple[int, ...], fraction: float, protected: int, halves: bool) -> Schedule:
    cuts, now = [], tokens
    for number, block in enumerate(places, 1):
        wanted = protected + round((tokens - protected) * fraction**number)
        if halves:
            wanted = max(wanted, now - (now - protected) // 2)
        now = min(now, max(wanted, protected + 1))
        cuts.append((block, now))
    return Schedule(blocks, tokens, tuple(cuts))


def places(blocks: int) -> Iterator[tuple[int, ...]]:
    """The sets of blocks that are tried in a model of so many blocks, each once."""
    seen = set()
    for shares in PLACES:
        found = tuple(dict.fromkeys(min(int(share * blocks), blocks - 1) for share in shares))
        if found not in seen:
            seen.add(found)
            yield found


def candidates(blocks: int, tokens: int, share: float, protected: int, halves: bool = False) -> list[Schedule]:
    """Every schedule that is tried for a mean share of tokens, none of them twice."""
    found = (geometric(blocks, tokens, p, share, protected, halves) for p in places(blocks))
    return list(dict.fromkeys(s for s in found if s is not None))
