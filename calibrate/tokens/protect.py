"""Which tokens a model reads by their place, and which inputs its tokens come from."""

import math

from torch.fx import GraphModule

from ..errors import CalibrationError
from ..padding import ids
from .attention import sites
from .axis import follow

# A class token and a distillation token are two; more than this many read by place is no encoder we know.
MOST = 3


def protected(graph: GraphModule, restored: bool = False) -> int:
    """How many tokens in front the model reads by their place: 0 where it pools, 1 for a class token, 2 for a distilled
    DeiT; 1 at least where tokens are ids of text, whose first is [CLS].

    Raises CalibrationError, with the reason, where the tokens behind the first block cannot be followed at all. With
    `restored` all tokens are put back where the model needs them, so that nothing need be followed: then it is what
    is left of the tokens beside a square of patches, 1 for a class token.
    """
    site = sites(graph)[0]
    problem: CalibrationError | None = None
    for count in range(MOST + 1):
        try:
            follow(graph, site.residual, count)
        except CalibrationError as error:
            problem = error
        else:
            return max(count, 1 if ids(graph) else 0)
    assert problem is not None
    if not restored:
        raise problem
    return next((n for n in range(MOST + 1) if math.isqrt(site.tokens - n) ** 2 == site.tokens - n), 0)
