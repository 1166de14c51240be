"""Keep evenly spaced tokens, the same for every sample: a baseline that looks at nothing.

Every method that costs operators must beat it.
"""

from ..attention import Site
from ..builder import Builder
from ..selection import Fixed, Reduction
from . import Request


class Even:
    attention = False

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        first, rest = request.protected, site.tokens - request.protected
        kept = request.keep - first
        spaced = [first + (2 * i + 1) * rest // (2 * kept) for i in range(kept)]
        return Fixed([*range(first), *spaced], site.tokens, request.form)


METHOD = Even()
