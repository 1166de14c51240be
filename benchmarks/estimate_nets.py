"""Well-known networks as torch modules in the form they run in: batch norms folded away, weights untrained.

They are what public latency figures are about. Only their operators and shapes matter here: `estimate.py --nets` writes
these down for the estimate. Sources: arXiv 1704.04861 (MobileNetV1), 1801.04381 (V2), 1905.02244 (V3), 1512.03385
(ResNet), 1409.1556 (VGG), github.com/forresti/SqueezeNet (SqueezeNet 1.1), 2010.11929 (ViT).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inside: int, outside: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the grid at stride 1."""
    return nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups)


def head(width: int, classes: int = 1000) -> nn.Sequential:
    """Mean over the grid, then one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 1.0."""
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    layers: list[nn.Module] = [conv(3, 32, 3, 2), nn.ReLU()]
    width = 32
    for wider, stride in widths:
        layers += [conv(width, width, 3, stride, width), nn.ReLU(), conv(width, wider, 1), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, head(width))


class Inverted(nn.Module):
    """The inverted residual of MobileNetV2 and V3; `squeeze` adds V3's squeeze-and-excite."""

    def __init__(
        self,
        inside: int,
        wide: int,
        outside: int,
        size: int = 3,
        stride: int = 1,
        squeeze: bool = False,
        act: Callable[[], nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        self.skip = stride == 1 and inside == outside
        self.expand = nn.Sequential(conv(inside, wide, 1), act()) if wide != inside else nn.Identity()
        self.depthwise = nn.Sequential(conv(wide, wide, size, stride, wide), act())
        narrow = (wide // 4 + 4) // 8 * 8
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), conv(wide, narrow, 1), nn.ReLU(), conv(narrow, wide, 1), nn.Hardsigmoid()
            )
            if squeeze
            else None
        )
        self.project = conv(wide, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.squeeze is not None:
            y = y * self.squeeze(y)
        y = self.project(y)
        return x + y if self.skip else y


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers: list[nn.Module] = [conv(3, 32, 3, 2), nn.ReLU6()]
    width = 32
    for factor, outside, count, stride in stages:
        for index in range(count):
            layers.append(Inverted(width, width * factor, outside, stride=stride if index == 0 else 1))
            width = outside
    return nn.Sequential(*layers, conv(width, 1280, 1), nn.ReLU6(), head(1280))


def mobilenet_v3_large() -> nn.Module:
    """MobileNetV3-Large 1.0."""
    rows = [  # wide, out, kernel, stride, squeeze, hard swish
        (16, 16, 3, 1, False, False),
        (64, 24, 3, 2, False, False),
        (72, 24, 3, 1, False, False),
        (72, 40, 5, 2, True, False),
        (120, 40, 5, 1, True, False),
        (120, 40, 5, 1, True, False),
        (240, 80, 3, 2, False, True),
        (200, 80, 3, 1, False, True),
        (184, 80, 3, 1, False, True),
        (184, 80, 3, 1, False, True),
        (480, 112, 3, 1, True, True),
        (672, 112, 3, 1, True, True),
        (672, 160, 5, 2, True, True),
        (960, 160, 5, 1, True, True),
        (960, 160, 5, 1, True, True),
    ]
    layers: list[nn.Module] = [conv(3, 16, 3, 2), nn.Hardswish()]
    width = 16
    for wide, outside, size, stride, squeeze, hard in rows:
        layers.append(Inverted(width, wide, outside, size, stride, squeeze, nn.Hardswish if hard else nn.ReLU))
        width = outside
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, conv(160, 960, 1), nn.Hardswish(), *tail)


class Residual(nn.Module):
    """ResNet's block: two 3x3 convolutions, or with `bottleneck` 1x1, 3x3, 1x1."""

    def __init__(self, inside: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outside = width * 4 if bottleneck else width
        if bottleneck:
            self.body = nn.Sequential(
                conv(inside, width, 1), nn.ReLU(), conv(width, width, 3, stride), nn.ReLU(), conv(width, outside, 1)
            )
        else:
            self.body = nn.Sequential(conv(inside, width, 3, stride), nn.ReLU(), conv(width, width, 3))
        self.shortcut = conv(inside, outside, 1, stride) if stride != 1 or inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(counts: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """ResNet-18 with (2, 2, 2, 2), ResNet-50 with (3, 4, 6, 3) and `bottleneck`."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        for index in range(count):
            layers.append(Residual(inside, width, 2 if stage and index == 0 else 1, bottleneck))
            inside = width * 4 if bottleneck else width
    return nn.Sequential(*layers, head(inside))


def vgg16() -> nn.Module:
    """VGG-16."""
    layers: list[nn.Module] = []
    inside = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [conv(inside, width, 3), nn.ReLU()]
            inside = width
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class Fire(nn.Module):
    """SqueezeNet's block."""

    def __init__(self, inside: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = conv(inside, narrow, 1), conv(narrow, wide, 1), conv(narrow, wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()),
        *(Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)),
        *(Fire(384, 64, 256), Fire(512, 64, 256), conv(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class Block(nn.Module):
    """A transformer's block with 64 numbers a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (p.reshape(batch, tokens, self.heads, 64).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT-B/16."""

    def __init__(self, width: int = 768, depth: int = 12, patch: int = 16, side: int = 14) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


# Name -> how it is built, and the side of its square image.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v1": (mobilenet_v1, 224),
    "mobilenet_v2": (mobilenet_v2, 224),
    "mobilenet_v3_large": (mobilenet_v3_large, 224),
    "resnet18": (lambda: resnet((2, 2, 2, 2), False), 224),
    "resnet50": (lambda: resnet((3, 4, 6, 3), True), 224),
    "resnet50_299": (lambda: resnet((3, 4, 6, 3), True), 299),
    "squeezenet": (squeezenet, 224),
    "squeezenet_227": (squeezenet, 227),
    "vgg16": (vgg16, 224),
    "vit_b16": (VisionTransformer, 224),
}
