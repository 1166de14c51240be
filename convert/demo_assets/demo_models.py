"""The demo's two models, in plain PyTorch; used as `demo_models:digits_cnn` and `demo_models:digits_vit`.

Stand-alone: imports torch and nothing else, because it is loaded in a child interpreter like any user's model.
Both map images [N, 1, 32, 32] float32 (see `digits_arrays`) to logits [N, 10].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def conv_bn_relu(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; 'same' padding for odd kernels."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """relu(x + body(x)), x [N, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm(self.second(self.first(x))))


class DigitsCNN(nn.Module):
    """Stem, residual blocks and one depthwise-separable step down, global average pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(1, 16)
        self.down = conv_bn_relu(16, 32, stride=2)
        self.wide = Residual(32)
        self.depthwise = conv_bn_relu(32, 32, stride=2, groups=32)
        self.pointwise = conv_bn_relu(32, 64, kernel=1)
        self.deep = Residual(64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.down(self.stem(x)))
        x = self.deep(self.pointwise(self.depthwise(x)))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to q, k and v; x [N, tokens, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        merged: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return merged


class Block(nn.Module):
    """Pre-norm transformer block; x [N, tokens, dim]."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        widened: Tensor = x + self.mlp(self.norm2(x))
        return widened


class DigitsViT(nn.Module):
    """A vision transformer: 4x4 patches (64 tokens) and a class token, whose last state is classified."""

    def __init__(self, dim: int = 96, depth: int = 3, heads: int = 3, hidden: int = 192) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 65, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def digits_cnn() -> nn.Module:
    """The CNN, untrained; its weights are `digits_cnn.safetensors`."""
    return DigitsCNN().eval()


def digits_vit() -> nn.Module:
    """The ViT, untrained; its weights are `digits_vit.safetensors`."""
    return DigitsViT().eval()
