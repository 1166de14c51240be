"""Small transformers of every layout, with outlier channels planted where trained ones have them."""

from collections.abc import Callable
from functools import cache

import torch
from small_graphs import capture
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.graph import run

TOKENS, WIDTH, HEADS = 6, 32, 4


def tokens(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, TOKENS, 8, generator=torch.Generator().manual_seed(seed))


def planted(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give LayerNorms weights and biases as training leaves them: spread, with a few channels far out."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.weight.data = torch.rand(norm.weight.shape, generator=generator) + 0.3
            norm.bias.data.normal_(0, 0.3, generator=generator)
            norm.weight.data[[3, 17]] *= 25
    return module.eval()


class Block(nn.Module):
    """An encoder block; `attention` says how it is written, `before` that LayerNorms come before (pre-LN)."""

    def __init__(self, attention: str, before: bool, layer_scale: bool = False) -> None:
        super().__init__()
        self.written, self.before = attention, before
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if attention in ("fused", "rotary"):
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=b) for b in (True, False, True))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.1) if layer_scale else None

    def attend(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], TOKENS, HEADS, WIDTH // HEADS)
        if self.written == "fused":  # timm
            q, k, v = self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.written == "rotary":  # half of every key turned round: another product than the layer's own
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k + torch.tanh(k), v)
        else:
            q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
            if self.written == "separate":
                y = nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                scores = torch.matmul(q, k.transpose(-1, -2)) / 3.0
                y = torch.matmul(scores.softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(x.shape[0], TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.scaled(self.attend(self.norm1(x)))
            return x + self.scaled(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale


class Encoder(nn.Module):
    """tokens [N, 6, 8] -> scores [N, 5]: embedding with class token and positions, two blocks, norm, head."""

    def __init__(self, attention: str, before: bool, pooled: bool = False, layer_scale: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention, before, layer_scale) for _ in range(2)))
        self.norm = nn.LayerNorm(WIDTH) if before else nn.Identity()
        self.head = nn.Linear(WIDTH, 5)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(x) + self.position))
        return self.head(x.mean(1) if self.pooled else x[:, 0])


@cache
def encoder(attention: str = "fused", before: bool = True, **options: bool) -> GraphModule:
    return capture(planted(Encoder(attention, before, **options)), tokens())


@cache
def torch_encoder(before: bool) -> GraphModule:
    """torch's own encoder: tokens first inside, heads folded into the batch, one input projection."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, "gelu", batch_first=True, norm_first=before)
    inner = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH) if before else None, enable_nested_tensor=False)
    return capture(planted(nn.Sequential(nn.Linear(8, WIDTH), inner, nn.Linear(WIDTH, 5))), tokens())


LAYOUTS: dict[str, Callable[[bool], GraphModule]] = {
    "fused": lambda before: encoder("fused", before),
    "separate": lambda before: encoder("separate", before),
    "by hand": lambda before: encoder("by hand", before),
    "torch": torch_encoder,
}


def difference(graph: GraphModule, other: GraphModule, *inputs: Tensor) -> float:
    """The largest difference in the outputs, relative to their reach, on samples that nothing was made from."""
    inputs = inputs or (tokens(5, seed=9),)
    (before,), (after,) = run(graph, inputs), run(other, inputs)
    assert before.shape == after.shape
    return float((before - after).abs().max() / before.abs().max())


def operators(graph: GraphModule) -> int:
    """How many operators run; constants are none."""
    return sum(n.op == "call_function" for n in graph.graph.nodes)


def sqnr(graph: GraphModule, other: GraphModule, *inputs: Tensor) -> float:
    """Signal over noise of `other` beside `graph`, in dB."""
    (before,), (after,) = run(graph, inputs), run(other, inputs)
    return float(10 * torch.log10(before.square().sum() / (after - before).square().sum()))
