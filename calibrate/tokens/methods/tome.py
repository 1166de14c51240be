"""Merge the tokens that are most alike into one, weighted by how many each stands for (ToMe, arXiv 2210.09461).

The tokens behind the protected ones are split in turns into sets A and B; each token of A finds the token of B whose
key is most like its own (cosine, mean over heads), and those with the best match are merged into it (section 3).
Attention behind adds the logarithm of a token's size to its scores (proportional attention, equation 1), and means over
tokens weigh them by size. Models pre-trained by masking do better with `proportional` off (section 4.2).

All but the ranks is comparisons and products, in either form: no scatter. The tokens keep their order.
"""

from typing import Any, ClassVar

from ..attention import Site
from ..builder import Builder
from ..merging import alternating, grouped, matched, merged, removed, similarity, sized
from ..selection import Reduction
from . import Request


class ToMe:
    attention = False
    halves = True
    defaults: ClassVar[dict[str, Any]] = {"proportional": True}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        gone = removed(site, request)
        size = sized(build, site, request)
        goes, becomes = matched(build, similarity(build, site), *alternating(site.tokens, request.protected), gone)
        return merged(build, grouped(build, goes, becomes, gone), size)


METHOD = ToMe()
