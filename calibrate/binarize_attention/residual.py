"""Softmax-aware bits with what the signs' scores lost estimated by products of rank one (BiPFT, arXiv 2312.08937)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..attention_bits import Place, Seen, SignedScores, keep_probabilities, sign_scores
from ..errors import CalibrationError
from ..tokens.builder import aten

DAMPING = 1e-4  # of the mean second moment: channels that say nothing new get no weight


class Residual:
    """The scores of signs, plus (q a + c)(k b)ᵀ for `rank` pairs of directions a, b of each head.

    The paper adds q_m k_pᵀ + q_p k_mᵀ + q_p k_pᵀ, which spans just what two such products do: hence rank 2. Its
    estimators read the layer's input, alike for all heads, and are trained; these read the head's own queries and
    keys, and are fitted by least squares to what the signs' scores lost. The other options are those of softmax_aware.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "threshold": "channel",
        "share": "fitted",
        "signed_values": False,
        "rank": 2,
    }

    def write(self, place: Place, options: Mapping[str, Any]) -> Node:
        """See `AttentionBinarizer.write`. Raises CalibrationError for a rank that is none."""
        rank, size = options["rank"], int(place.attention.query.meta["val"].shape[-1])
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= size:
            raise CalibrationError(
                f"the rank of residual attention is from 1 to a head's {size} channels, not {rank!r}"
            )
        samples, query, keys = place.samples, place.attention.query, place.attention.keys
        fitted = sign_scores(place, options["threshold"])
        left, bias, right = estimators(samples, fitted, rank)
        scores = place.attention.scores
        build = place.build(scores.next)
        a, c, b = (
            build.constant(name, place.shaped(numbers))
            for name, numbers in (("left", left), ("bias", bias), ("right", right.mT))
        )
        one = build.call(aten.add.Tensor, build.call(aten.matmul.default, query, a), c)
        both = build.call(aten.matmul.default, one, build.call(aten.matmul.default, b, keys))
        total = build.call(aten.add.Tensor, scores, both)
        scores.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        return keep_probabilities(place, options["share"], bool(options["signed_values"]))


def estimators(samples: Sequence[Seen], fitted: SignedScores, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a [H, d, rank], c [H, 1, rank], b [H, d, rank]), float32, of the least error in the scores.

    The best matrix between queries (with a 1) and keys under their mean second moments, cut to its rank; then the
    weight of each product by exact least squares. A constant beside the keys would move whole rows: softmax drops it.
    """
    cross, left, right = _moments(samples, fitted)
    lower, upper = _root(left), _root(right)
    white = torch.linalg.solve_triangular(lower, cross, upper=False)
    white = torch.linalg.solve_triangular(upper, white.mT, upper=False).mT
    u, _, v = torch.linalg.svd(white)
    a = torch.linalg.solve_triangular(lower.mT, u[..., :rank], upper=True)
    b = torch.linalg.solve_triangular(upper.mT, v.mT[..., :rank], upper=True)
    a = a * _weights(samples, fitted, a, b).unsqueeze(-2)
    return a[:, :-1].float(), a[:, -1:].float(), b.float()


def _moments(samples: Sequence[Seen], fitted: SignedScores) -> tuple[Tensor, Tensor, Tensor]:
    """queriesᵀ lost keys [H, d + 1, d], queriesᵀ queries and keysᵀ keys, float64."""
    sums: list[Tensor] = []
    for seen in samples:
        q, k = _with_one(seen), _centred_keys(seen)
        new = [q.mT @ _lost(seen, fitted) @ k, q.mT @ q, k.mT @ k]
        new = [x.sum(0) for x in new]
        sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
    return sums[0], sums[1], sums[2]


def _weights(samples: Sequence[Seen], fitted: SignedScores, a: Tensor, b: Tensor) -> Tensor:
    """What each product (q a)(k b)ᵀ counts in the least-squares fit, [H, rank]."""
    rank = a.shape[-1]
    gram, dot = torch.zeros(a.shape[0], rank, rank).double(), torch.zeros(a.shape[0], rank).double()
    for seen in samples:
        left, right = _with_one(seen) @ a, seen.keys.double() @ b
        parts = [seen.centred(left[..., i : i + 1] @ right[..., i : i + 1].mT) for i in range(rank)]
        lost = _lost(seen, fitted)
        for i, part in enumerate(parts):
            dot[:, i] += (part * lost).sum((0, 2, 3))
            for j, other in enumerate(parts):
                gram[:, i, j] += (part * other).sum((0, 2, 3))
    return torch.linalg.solve(_damped(gram), dot)


def _lost(seen: Seen, fitted: SignedScores) -> Tensor:
    """What the signs' scores lack, rows less their means; float64 [B, H, N, M]."""
    return seen.centred((seen.query @ seen.keys.mT - fitted.product(seen)).double())


def _with_one(seen: Seen) -> Tensor:
    """The queries that count, with a 1 behind each; float64 [B, H, N, d + 1]."""
    one = torch.ones(*seen.query.shape[:3], 1).double()
    return torch.cat([seen.query.double(), one], -1) * seen.asking.unsqueeze(-1)


def _centred_keys(seen: Seen) -> Tensor:
    """The keys that are seen less their mean in each sample; float64 [B, H, M, d]."""
    weight = seen.seen.unsqueeze(-1).double()
    keys = seen.keys.double()
    return (keys - (keys * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)) * weight


def _root(moments: Tensor) -> Tensor:
    return torch.linalg.cholesky(_damped(moments))


def _damped(moments: Tensor) -> Tensor:
    size = moments.shape[-1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return moments + torch.eye(size).double() * (DAMPING * mean).view(-1, 1, 1)


METHOD = Residual()
