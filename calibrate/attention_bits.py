"""What the ways to binarize attention share: what an attention sees in calibration, and signs and bits fitted to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import kept, signs
from .attention_parts import Attention, float_between
from .errors import CalibrationError
from .lockstep import Run
from .plan import Plan
from .ranges import representable
from .tokens.builder import Builder, aten

THRESHOLDS = ("channel", "tensor", "zero")
SHARES = tuple(i / 20 for i in range(1, 20))
TINY = 1e-12


class Unfit(Exception):
    """Why a method has no form for an attention."""


@dataclass(frozen=True)
class Seen:
    """One batch at an attention before it was binarized, float32, with the heads that thresholds may tell apart on
    axis 1 (one where they are folded into the batch): `query` [B, H, N, d], `keys` [B, H, M, d], `value` [B, H, M, e],
    `output` [B, H, N, e]; `pairs` bool [B, H, N, M]: which keys each query sees."""

    query: Tensor
    keys: Tensor
    value: Tensor
    output: Tensor
    pairs: Tensor

    @cached_property
    def seen(self) -> Tensor:
        """Which keys are no padding: some query sees them; bool [B, H, M]."""
        return self.pairs.any(-2)

    @cached_property
    def asking(self) -> Tensor:
        """Which queries count, bool [B, H, N]: in self-attention those that are no padding themselves."""
        same = self.query.shape[2] == self.keys.shape[2]
        return self.seen if same else torch.ones(self.query.shape[:3], dtype=torch.bool)

    def centred(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N, M] less each row's mean over the keys it sees, which no softmax notices; else 0."""
        weight = (self.pairs & self.asking.unsqueeze(-1)).to(scores.dtype)
        mean = (scores * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
        return (scores - mean) * weight


@dataclass
class Place:
    """An attention to binarize, in its graph, with the samples to fit bits to."""

    graph: GraphModule
    attention: Attention
    batches: Sequence[list[Tensor]]
    plan: Plan
    seed: int = 0

    @cached_property
    def samples(self) -> list[Seen]:
        """What the attention saw and gave while it was real."""
        a = self.attention
        rows = values(self.graph, self.batches, [a.query, a.keys, a.value, a.probabilities, a.output])
        return [Seen(_heads(q), _heads(k.mT), _heads(v), _heads(o), _heads(p) > 0) for q, k, v, p, o in rows]

    @property
    def codes(self) -> tuple[object, ...]:
        """The form of codes of signs (`signs.write`)."""
        return signs.UINT8 if self.plan.activation == "uint8" else signs.INT8

    def build(self, before: Node) -> Builder:
        """A builder of operators in front of `before`."""
        return Builder(self.graph, before, f"{self.attention.name}.bits", chooses=False)

    def shaped(self, numbers: Tensor) -> Tensor:
        """Constants [H, ...] of two axes behind the heads, as the graph's tensors have them: [1, H, ...], or without H
        where heads lie in the batch."""
        return numbers.unsqueeze(0) if self.attention.query.meta["val"].dim() == 4 else numbers


def values(graph: GraphModule, batches: Sequence[list[Tensor]], nodes: Sequence[Node]) -> list[list[Tensor]]:
    """What `nodes` compute, for each batch."""
    found = []
    with torch.no_grad():
        for batch in batches:
            run, got = Run(graph, batch), {}
            for node in graph.graph.nodes:
                value = run.step(node)
                if node in nodes:
                    got[node] = value
                    if len(got) == len(set(nodes)):
                        break
                run.forget(node)
            found.append([got[n] for n in nodes])
    return found


def _heads(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.reshape(-1, 1, *x.shape[-2:])


def thresholds(samples: Sequence[tuple[Tensor, Tensor]], where: str) -> Tensor:
    """Thresholds [H, d] for rows [B, H, N, d] of which bool [B, H, N] count. Raises CalibrationError for an unknown
    `where`."""
    if where not in THRESHOLDS:
        raise CalibrationError(f"signs of attention have no threshold {where!r}: use {', '.join(THRESHOLDS)}")
    mean = channel_means(samples)
    if where == "channel":
        return mean.float()
    return torch.full_like(mean, 0.0 if where == "zero" else float(mean.mean())).float()


def channel_means(samples: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean [H, d], float64, of rows [B, H, N, d] of which bool [B, H, N] count."""
    total = torch.stack([(x.double() * m.unsqueeze(-1)).sum((0, 2)) for x, m in samples]).sum(0)
    return total / torch.stack([m.sum((0, 2)) for _, m in samples]).sum(0).clamp(min=1).unsqueeze(-1)


def around(x: Tensor, threshold: Tensor) -> Tensor:
    """Signs +1 and -1 of [B, H, N, d] around thresholds [H, d], +1 on them."""
    return torch.where(x - threshold.unsqueeze(1) >= 0, 1.0, -1.0)


@dataclass(frozen=True)
class SignedScores:
    """Signs of queries and keys as fitted: thresholds [H, d] and the scale of either."""

    query: Tensor
    keys: Tensor
    query_scale: float
    keys_scale: float

    def product(self, seen: Seen) -> Tensor:
        """The scores [B, H, N, M], before scale and mask, that these signs give."""
        both = around(seen.query, self.query) @ around(seen.keys, self.keys).mT
        return both * (self.query_scale * self.keys_scale)


def sign_scores(place: Place, where: str) -> SignedScores:
    """Let queries and keys become signs -s and +s, in the graph too.

    The product of both scales is the least-squares fit of the real scores; rows are compared less their means, as
    softmax does. So a mean of the keys costs nothing, and a threshold there takes nothing away.
    """
    samples = place.samples
    float_between(place.attention)
    query = thresholds([(s.query, s.asking) for s in samples], where)
    keys = thresholds([(s.keys, s.seen) for s in samples], where)
    own = _mean_distance([(s.query, s.asking) for s in samples], query)
    plain = SignedScores(query, keys, 1.0, 1.0)
    both = own * _mean_distance([(s.keys, s.seen) for s in samples], keys)
    dot = power = 0.0
    for seen in samples:
        made = seen.centred(plain.product(seen))
        dot += float((made * seen.centred(seen.query @ seen.keys.mT)).sum(dtype=torch.float64))
        power += float(made.square().sum(dtype=torch.float64))
    # Signs that say nothing of the scores are better small than wrong.
    product = max(dot / max(power, TINY), 1e-3 * both, TINY)
    scales = (representable(own, place.plan), representable(product / own, place.plan))
    _write_signs(place, query, keys, scales)
    return SignedScores(query, keys, *scales)


def _write_signs(place: Place, query: Tensor, keys: Tensor, scales: tuple[float, float]) -> None:
    scores = place.attention.scores
    build = place.build(scores)
    left, right = place.attention.query, place.attention.keys
    _, q = signs.write(build, left, place.shaped(query.unsqueeze(1)), place.codes, scales[0])
    _, k = signs.write(build, right, place.shaped(keys.unsqueeze(2)), place.codes, scales[1])
    scores.args = (q, k, *scores.args[2:])


def _mean_distance(samples: Sequence[tuple[Tensor, Tensor]], threshold: Tensor) -> float:
    total = sum(
        float(((x - threshold.unsqueeze(1)).abs() * m.unsqueeze(-1)).sum(dtype=torch.float64)) for x, m in samples
    )
    return total / (sum(int(m.sum()) for _, m in samples) * threshold.shape[1]) or 1.0


def keep_probabilities(place: Place, share: object, signed: bool) -> Node:
    """Let probabilities become {0, s}: those of at least `share` (a number, or "fitted") of their row's largest.

    Share and s are those that come closest to the attention's real output in least squares. With `signed` the values
    become signs around their means, too; rows of real probabilities sum to 1, so that those means are in every output,
    and what is missing on average comes back as a constant. Returns the output, [..., N, e]. Raises CalibrationError
    for a share that is none.
    """
    a, samples = place.attention, place.samples
    tried = _shares(share)
    given = [_heads(row[0]) for row in values(place.graph, place.batches, [a.probabilities])]
    read = [s.value for s in samples]
    build = place.build(a.output)
    back = a.value
    if signed:
        rows = [(s.value, s.seen) for s in samples]
        threshold = thresholds(rows, "channel")
        scale = representable(_mean_distance(rows, threshold), place.plan)
        read = [scale * around(s.value, threshold) for s in samples]
        _, back = signs.write(build, a.value, place.shaped(threshold.unsqueeze(1)), place.codes, scale)
    best = min((_scale_of(given, samples, read, each, signed) for each in tried), key=lambda f: f.error)
    dtype = torch.uint8 if place.plan.activation == "uint8" else torch.int8
    bits = kept.insert(build, a.probabilities, dtype, best.share, representable(best.scale, place.plan))
    a.output.args = (bits, back, *a.output.args[2:])
    return add(place, a.output, best.offset) if signed else a.output


@dataclass(frozen=True)
class _Scale:
    """`scale` * bits @ values + `offset` [H, e] is off by `error` less a constant."""

    share: float
    error: float
    scale: float
    offset: Tensor


def _scale_of(
    given: Sequence[Tensor], samples: Sequence[Seen], read: Sequence[Tensor], share: float, shifted: bool
) -> _Scale:
    """The least-squares scale beside the real output, and with `shifted` a constant per channel."""
    sums = [torch.zeros(()).double() for _ in range(5)]
    for probabilities, seen, value in zip(given, samples, read, strict=True):
        count = seen.asking.unsqueeze(-1)
        bits = (probabilities - share * probabilities.amax(-1, keepdim=True) >= 0).float()
        x, y = ((bits @ value) * count).double(), (seen.output * count).double()
        new = [(x * y).sum(), x.square().sum(), x.sum((0, 2)), y.sum((0, 2)), count.sum((0, 2)).double()]
        sums = [a + b for a, b in zip(sums, new, strict=True)]
    dot, power, x, y, n = sums
    if shifted:
        dot, power = dot - (x * y / n).sum(), power - (x * x / n).sum()
    if dot <= 0:  # nothing in common with the real output: as little as a scale can give
        return _Scale(share, 0.0, TINY, y / n)
    scale = float(dot / power)
    return _Scale(share, -scale * float(dot), scale, (y - scale * x) / n)


def _shares(share: object) -> Sequence[float]:
    if share == "fitted":
        return SHARES
    if isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1:
        return [float(share)]
    raise CalibrationError(f"the share of a row's largest probability is 'fitted' or in (0, 1], not {share!r}")


def add(place: Place, output: Node, numbers: Tensor) -> Node:
    """`output` with constants [H, e] added to it, for all its readers."""
    build = place.build(output.next)
    made = build.call(aten.add.Tensor, output, build.constant("offset", place.shaped(numbers.float().unsqueeze(1))))
    output.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made
