"""Keep the tokens that all others attend to, for text: padding goes first, separators never (PoWER-BERT, 2001.08950).

The significance of a token is the attention it receives, summed over heads and over the queries that are no padding
(section 3.2 of the paper). What the attention mask hides is padding and comes last. With `separator`, the id that
closes a sentence ([SEP], 102 in BERT's vocabulary), those tokens always stay, as the class token does. With
`proportional` what goes is still counted, with what it is most like (`counted`): it did not help MiniLM.
"""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...errors import CalibrationError
from ..attention import Site, probabilities, visible
from ..builder import Builder, aten
from ..counted import counted
from ..selection import Reduction, rank
from . import Request

# Below the class token, above every sum of attention.
SEPARATOR = 1.0e30
PLANE = "separators"


class Importance:
    attention = True
    defaults: ClassVar[dict[str, Any]] = {"separator": None, "proportional": False}

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        seen = visible(build, site)
        score = received(build, site, seen)
        if seen is not None:
            score = build.call(aten.where.ScalarOther, seen, score, -1.0)
        if request.options["separator"] is not None:
            plane = _separators(build, site, request)
            score = build.call(aten.where.ScalarSelf, plane, SEPARATOR, score)
        return counted(build, site, request, rank(build, score, request.protected), seen)


def received(build: Builder, site: Site, seen: Node | None) -> Node:
    """The attention that each token receives [B, N]: sum over queries (those in `seen`), mean over heads."""
    table = build.call(aten.mean.dim, probabilities(site), [1])
    if seen is not None:
        asked = build.call(aten.unsqueeze.default, build.call(aten.to.dtype, seen, torch.float32), 2)
        table = build.call(aten.mul.Tensor, table, asked)
    return build.call(aten.sum.dim_IntList, table, [1])


def _separators(build: Builder, site: Site, request: Request) -> Node:
    """Which tokens are separators, bool [B, N]: read from the ids at the first cut, carried along from there."""
    if PLANE not in request.planes:
        ids = [n for n in request.graph_inputs if _is_ids(n, site.tokens)]
        if not ids:
            raise CalibrationError(
                f"importance was given a separator, but no input of the model is the ids of {site.tokens} tokens that "
                "are looked up in a table: leave the option separator out."
            )
        request.planes[PLANE] = build.call(aten.eq.Scalar, ids[0], int(request.options["separator"]))
    return request.planes[PLANE]


def _is_ids(node: Node, tokens: int) -> bool:
    value = node.meta["val"]
    looked_up = any(str(u.target).startswith("aten.embedding") and u.args[1] is node for u in node.users)
    return looked_up and value.dim() == 2 and int(value.shape[1]) == tokens


METHOD = Importance()
