"""Small models that together hold what coremltools' frontend meets in vision and text models."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Residual convolutions with a strided slice and channel padding as shortcut, as CIFAR ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.norm(self.body(x)) + shortcut)
        return self.head(x.mean((2, 3)))


class Squeeze(nn.Module):
    """A MobileNet block: depthwise convolution, relu6, hardswish, squeeze-and-excitation, ceil-mode pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.transposed = nn.ConvTranspose2d(12, 6, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.expand(x)))
        x = F.hardswish(self.depth(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = F.max_pool2d(x * gate, 3, 2, ceil_mode=True)
        x = F.interpolate(self.pool(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.silu(self.transposed(x)).flatten(1)


class TokenEncoder(nn.Module):
    """A BERT-like encoder: token ids and an integer mask in, an additive mask made by new_ones and masked_fill."""

    def __init__(self, dim: int = 16, heads: int = 2, vocabulary: int = 50, length: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.register_buffer("position_ids", torch.arange(length).expand((1, -1)), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        n, length = input_ids.shape
        x = self.norm(self.tokens(input_ids) + self.positions(self.position_ids[:, :length]))
        causal = input_ids.new_ones((length, length), dtype=torch.bool).tril()
        keep = causal[None, None] & (attention_mask[:, None, None, :] != 0)
        bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
        q, k, v = (f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, -1))
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        pooled = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1), x


class BoolMask(nn.Module):
    """Attention with a bool mask as input and as sdpa argument, and masks of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("causal", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * 0.5 + self.causal
        first = scores.softmax(-1) @ v
        second = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=keep[:, None, None])
        third = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)
        return first + second[:, 0] + third[:, 0]


class Oddments(nn.Module):
    """What converters stumble on: scalar `where`, tensor indices, -1 in expand, unbind, split, detach, topk."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = x.unbind(1)[:2]
        low, high = y.split([2, 4], dim=-1)
        z = torch.where(a > 0, a, 0.5).detach() + high[:, :1].expand(-1, 4)
        z = z + torch.where(b > 0, 1.0, -1.0)
        picked = x[:, torch.tensor([2, 0])].amax(1)
        values, indices = picked.topk(2, dim=-1)
        w = torch.stack([a, b], 1).to(torch.float32, copy=True).roll(1, -1)
        w[:, 0] = 1.5
        x = x.transpose(1, 2).contiguous().view(2, 3, 4)
        ones = x.new_full((x.shape[0], 4), 2.0) * torch.arange(4, dtype=x.dtype)
        mean = w.var(-1, keepdim=True, unbiased=False) + w.std(-1, keepdim=True)
        return z * ones + low.sum(-1, keepdim=True), values + mean.sum((1, 2))[:, None], indices


Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[str, ...], tuple[str, ...]]


def transformer() -> nn.Module:
    """torch's own encoder, in the mode that does not take its fused inference path."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def cases() -> dict[str, Case]:
    """name -> (model, example inputs, input names, output names); the inputs come from a fixed seed."""
    g = torch.Generator().manual_seed(0)
    image, tokens = torch.randn(1, 3, 16, 16, generator=g), torch.randn(1, 6, 16, generator=g)
    ids = torch.randint(1, 50, (1, 8), generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    x, y = torch.randn(2, 3, 4, generator=g), torch.randn(2, 6, generator=g)
    keep = torch.tensor([[True, True, False, True, True, False]])
    return {
        "cnn": (SmallCNN, (image,), ("image",), ("logits",)),
        "mobile": (Squeeze, (image,), ("image",), ("features",)),
        "transformer": (transformer, (tokens,), ("tokens",), ("encoded",)),
        "encoder": (TokenEncoder, (ids, mask), ("input_ids", "attention_mask"), ("embedding", "hidden")),
        "bool_mask": (BoolMask, (torch.randn(1, 6, 8, generator=g), keep), ("x", "keep"), ("y",)),
        "oddments": (Oddments, (x, y), ("x", "y"), ("first", "second", "third")),
    }
