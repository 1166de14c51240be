"""Encoders that meet their tokens with masks, tables and pools, and models whose tokens cannot be removed."""

import math
from collections.abc import Callable
from functools import cache

import torch
from encoders import HEADS, TOKENS, WIDTH, encoder, planted, tokens
from small_graphs import Made, capture
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibrate.graph import clone
from calibrate.tokens.attention import Site, sites
from calibrate.tokens.builder import Builder, aten
from calibrate.tokens.insert import Cut, Done, reduce
from calibrate.tokens.methods import Request
from calibrate.tokens.selection import Reduction, ranked
from convert.normal_form import normalise

F = nn.functional
# float32 rounding of one attention.
ROUNDING = 1e-5


def captured(module: nn.Module, *inputs: Tensor) -> GraphModule:
    return normalise(capture(planted(module), *inputs))


def padding(count: int = 4, seed: int = 3) -> Tensor:
    """[count, 6] of ones and zeros: sample i has 6, 5, 4, 3 tokens, then padding."""
    return (torch.arange(TOKENS)[None, :] < TOKENS - torch.arange(count)[:, None] % 4).long()


class Heads(nn.Module):
    """Self-attention of four heads on [B, N, 32]; `extra` is added to the scores, or says which keys are seen."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.by_hand = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), by_hand

    def forward(self, x: Tensor, extra: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (
            p.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2) for p in self.qkv(x).chunk(3, -1)
        )
        if self.by_hand:
            scores = q @ k.transpose(-1, -2) / 3.0
            hidden = extra is not None and extra.dtype == torch.bool
            scores = scores.masked_fill(extra, float("-inf")) if hidden else scores if extra is None else scores + extra
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, extra, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH))


class Layer(nn.Module):
    def __init__(self, by_hand: bool = False, parallel: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Heads(by_hand)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.parallel = parallel

    def forward(self, x: Tensor, extra: Tensor | None = None, causal: bool = False) -> Tensor:
        if self.parallel:
            return x + self.attention(self.norm1(x), extra) + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x), extra, causal)
        return x + self.mlp(self.norm2(x))


class Masked(nn.Module):
    """tokens [B, 6, 8] and padding [B, 6] -> scores [B, 5]; `mask` is how padding reaches the attention."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head, self.mask = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5), mask
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.layers = nn.ModuleList(Layer(by_hand="by hand" in mask) for _ in range(3))

    def extra(self, keep: Tensor) -> Tensor:
        row = keep[:, None, None, :]
        if self.mask == "bool row":
            return row > 0
        if self.mask == "filled by hand":
            return row == 0
        if self.mask == "bool square":
            return (row > 0).expand(-1, 1, TOKENS, TOKENS)
        if self.mask == "infinite":
            return torch.zeros(1).masked_fill(row == 0, float("-inf"))
        return (1.0 - row.float()) * -10000.0

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(x) + self.position[:, : x.shape[1]]
        for layer in self.layers:
            x = layer(x, self.extra(keep))
        return self.head(x[:, 0])


MASKS = ("bool row", "bool square", "infinite", "added", "added by hand", "filled by hand")


class Biased(nn.Module):
    """A table of biases [1, 4, 6, 6] on the scores of every layer, and positions added in every layer."""

    def __init__(self, parallel: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5)
        # torch's attention takes another kernel, with other rounding, where the mask could have a gradient
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS), requires_grad=False)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.layers = nn.ModuleList(Layer(by_hand, parallel) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x + self.position, self.bias)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)[:, :WIDTH] + x.amax(1))


class TorchEncoder(nn.Module):
    """torch's own encoder with a pool; `masked` hands it the padding."""

    def __init__(self, before: bool, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, "gelu", batch_first=True, norm_first=before)
        norm = nn.LayerNorm(WIDTH) if before else None
        self.embed, self.head, self.masked = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5), masked
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.encoder(self.embed(x), src_key_padding_mask=keep == 0 if self.masked else None)
        return self.head(x[:, 0] if self.masked else x.mean(1) + keep.sum() * 0)


def twins(by_hand: bool, **options: bool) -> GraphModule:
    """Two blocks without positions, then a mean (or a sum, or a mean behind the class token)."""
    torch.manual_seed(0)

    def call(self: nn.Module, x: Tensor) -> Tensor:
        x = self.two(self.one(self.embed(x)))
        return self.head(x.sum(1) if options.get("summed") else x[:, 1:].mean(1) if options.get("rest") else x.mean(1))

    layers = {"embed": nn.Linear(8, WIDTH), "one": Layer(by_hand), "two": Layer(by_hand), "head": nn.Linear(WIDTH, 5)}
    return captured(Made(call, **layers), tokens())


class Text(nn.Module):
    """ids and padding [B, 6] -> [B, 5]; every second layer of attention is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 5)
        self.one, self.two = Layer(), Layer(by_hand=True)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        extra = (1.0 - keep[:, None, None, :].float()) * -10000.0
        return self.head(self.two(self.one(self.table(ids), extra), extra)[:, 0])


IDS = torch.tensor([[1, 5, 9, 7, 8, 9], [1, 9, 4, 6, 9, 0]])
KEEP = (IDS > 0).long()


@cache
def text() -> GraphModule:
    return captured(Text(), IDS, KEEP)


# The second and third token are alike, and so are the fourth and fifth.
PAIRED = (tokens(5, seed=9)[:, [0, 1, 1, 3, 3, 5]],)


@cache
def _graph(name: str) -> GraphModule:
    kind, _, rest = name.partition(": ")
    if kind == "encoder":
        layout, *options = rest.split(", ")
        graph = encoder(layout, "post" not in options, pooled="pooled" in options, layer_scale="scale" in options)
        return normalise(clone(graph))
    if kind == "masked":
        return captured(Masked(rest), tokens(), padding())
    if kind == "torch":
        return captured(TorchEncoder("post" not in rest, "masked" in rest), tokens(), padding())
    return captured(Biased("parallel" in rest, "by hand" in rest), tokens())


MODELS = (
    "encoder: fused, scale",
    "encoder: fused, post",
    "encoder: separate",
    "encoder: by hand, post, pooled",
    *(f"masked: {mask}" for mask in ("bool square", "infinite", "added by hand")),
    *(f"torch: {kind}" for kind in ("pre", "post masked")),
    *(f"biased: {kind}" for kind in ("parallel", "by hand")),
)


def graph_of(name: str) -> GraphModule:
    """A fresh clone of one of MODELS, which share their constants' memory."""
    return clone(_graph(name))


def feeds(name: str, count: int = 5, seed: int = 9) -> tuple[Tensor, ...]:
    """Samples for one of MODELS that nothing was made from."""
    two = name.startswith(("masked", "torch"))
    return (tokens(count, seed), padding(count)) if two else (tokens(count, seed),)


class Scored:
    """Keep the tokens of highest score, which the test computes from the residual [B, N, C] with `score`."""

    attention = False

    def __init__(self, score: Callable[[Builder, Site], object]) -> None:
        self.score = score

    def reduction(self, build: Builder, site: Site, request: Request) -> Reduction:
        return ranked(build, self.score(build, site), request.keep, request.protected, request.form)


def by_channel(build: Builder, site: Site) -> object:
    """The first channel of the residual: another order for every sample."""
    return build.call(aten.select.int, site.residual, 2, 0)


def in_order(build: Builder, site: Site) -> object:
    """Falling scores, so that rank order is the tokens' own order; computed, not constant."""
    falling = build.constant("falling", -torch.arange(site.tokens, dtype=torch.float32))
    none = build.call(aten.mul.Tensor, by_channel(build, site), 0.0)
    return build.call(aten.add.Tensor, none, falling)


def level(build: Builder, site: Site) -> object:
    """Nothing but ties."""
    return build.call(aten.mul.Tensor, by_channel(build, site), 0.0)


def cut(graph: GraphModule, *keep: int, method: object = "even", **options: object) -> list[Done]:
    """Cut behind block 0, 1, ... to `keep` tokens each."""
    return reduce(graph, [Cut(i, k, method) for i, k in enumerate(keep)], **options)


def values(graph: GraphModule, inputs: tuple[Tensor, ...], *nodes: Node) -> list[Tensor]:
    """What the nodes compute on the inputs."""
    seen: dict[Node, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Node) -> object:
            made = super().run_node(node)
            if node in nodes:
                seen[node] = made
            return made

    with torch.no_grad():
        Recorder(graph).run(*inputs)
    return [seen[n] for n in nodes]


def attention_of(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities [B, H, N, N], keys [B, H, N, d], residual [B, N, C]) of block 0."""
    graph = graph_of(name)
    site = sites(graph)[0]
    query, key, residual = values(graph, inputs, site.query, site.key, site.residual)
    divisor = 3.0 if "by hand" in name else math.sqrt(query.shape[-1])
    return (query @ key.transpose(-1, -2) / divisor).softmax(-1), key, residual


def is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max() / other.abs().max()) < ROUNDING
