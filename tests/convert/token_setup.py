"""Small captured encoders of image tokens and of text, with samples and a judge, for the tests of pruning."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from small_models import Samples, captured
from torch import Tensor, nn

from calibrate.samples import Batch
from convert.capture import Captured
from convert.compress import Judge
from convert.pruning import Pruner
from convert.recipes import Tokens

WIDTH, HEADS, SIDE = 16, 2, 4


class Block(nn.Module):
    """Pre-norm attention and MLP on [B, N, 16]; `extra` is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, extra: Tensor | None = None, causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, extra, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Images [B, 1, 8, 8] in 16 patches behind a class token -> scores [B, 5]; `reads` says what the head sees."""

    def __init__(self, reads: str = "class token", depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patches, self.reads = nn.Conv2d(1, WIDTH, 2, 2), reads
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, SIDE * SIDE + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x, causal=self.reads == "causal")
        x = self.head(self.norm(x))
        return x if self.reads == "dense" else x[:, 0]


class Windows(nn.Module):
    """The same patches without a class token; attention sees windows of four of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.patches, self.block, self.head = nn.Conv2d(1, WIDTH, 2, 2), Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.block(x.reshape(-1, SIDE, WIDTH)).reshape(-1, SIDE * SIDE, WIDTH)
        return self.head(x.mean(1))


class Text(nn.Module):
    """Ids and mask [B, 8] -> scores [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table, self.head = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, extra = self.table(ids), (1.0 - mask[:, None, None, :].float()) * -10000.0
        for block in self.blocks:
            x = block(x, extra)
        return self.head(x[:, 0])


@functools.cache
def vit() -> tuple[Captured, Samples]:
    """The captured ViT and 24 images; not to be changed."""
    model = captured(Vit(), torch.zeros(2, 1, 8, 8))
    return model, Samples(model.inputs[0].name, images(24))


@functools.cache
def text() -> Captured:
    """The captured text encoder; not to be changed."""
    ids = torch.ones(2, 8, dtype=torch.long)
    return captured(Text(), ids, ids.clone())


def images(count: int) -> NDArray[np.float32]:
    """[count, 1, 8, 8], the same every time."""
    return np.random.default_rng(7).standard_normal((count, 1, 8, 8)).astype("float32")


@functools.cache
def pruner(method: str = "evit", **options: object) -> Pruner:
    """A pruner of the ViT, shared: schedules that were scored are remembered."""
    model, data = vit()
    return Pruner(model, Judge(model, data), Tokens(method, options=options), data)


@dataclass
class Sentences:
    """A `CalibrationSet` of ids and masks in memory."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    labels: None = None
    fingerprint: str = "made"
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.ids), size):
            yield {"ids": self.ids[start : start + size], "mask": self.mask[start : start + size]}

    def select(self, indices: NDArray[np.int64]) -> "Sentences":
        return Sentences(self.ids[indices], self.mask[indices])


def sentences(closes: int = 9, hidden: bool = True) -> Sentences:
    """Ids [6, 8] that start with 1 and end with `closes`, of 8 down to 3 tokens, then zeros, which the mask hides."""
    ids = np.random.default_rng(8).integers(10, 30, (6, 8))
    lengths = np.arange(8, 2, -1)
    mask = (np.arange(8)[None] < lengths[:, None]).astype(np.int64)
    ids[:, 0] = 1
    ids[np.arange(6), lengths - 1] = closes
    return Sentences(ids * mask, mask if hidden else np.ones_like(mask))
