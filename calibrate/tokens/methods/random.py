"""Keep tokens drawn by a seed, the same for every sample: the baseline of chance."""

import torch

from ..attention import Site
from ..builder import Builder
from ..selection import Fixed, Reduction
from . import Request


class Random:
    attention = False

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        first = request.protected
        generator = torch.Generator().manual_seed(request.seed)
        order = torch.randperm(site.tokens - first, generator=generator)[: request.keep - first]
        kept = sorted(first + int(i) for i in order)
        return Fixed([*range(first), *kept], site.tokens, request.form)


METHOD = Random()
