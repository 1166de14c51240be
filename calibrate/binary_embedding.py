"""Embeddings as bits: a centred rotation that loses little to the sign (ITQ), and residual planes behind it (BEBR)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.errors import CalibrationError

PLANES = (1, 2)
ROUNDS = 50


@dataclass(frozen=True)
class EmbeddingCode:
    """y = `weight` x + `bias`, plane 0 is sign(y), plane 1 is sign(y - `level` * sign(y)); sign(0) = +1.

    `weight` float64 [bits, d], `bias` and `level` float64 [bits]; `planes` 1 or 2.
    """

    weight: Tensor
    bias: Tensor
    level: Tensor
    planes: int

    def codes(self, x: Tensor) -> Tensor:
        """Embeddings [n, d] -> float64 [n, planes * bits] of ±1, plane 0 first."""
        y = x.double() @ self.weight.T + self.bias
        first = sign(y)
        return first if self.planes == 1 else torch.cat((first, sign(y - self.level * first)), 1)


def sign(y: Tensor) -> Tensor:
    """±1 of the same dtype; +1 for 0.0 and -0.0."""
    return torch.where(y >= 0, 1.0, -1.0).to(y.dtype)


def default_bits(width: int) -> int:
    """One bit per dimension, rounded up to whole bytes: rounding down would drop directions to save under a byte."""
    return -(-width // 8) * 8


def fit(
    x: Tensor, bits: int, planes: int = 1, seed: int = 0, rounds: int = ROUNDS, centre: bool = True
) -> EmbeddingCode:
    """The code of embeddings like `x` [n, d], from their mean, principal directions and an ITQ rotation.

    ITQ (Gong and Lazebnik, CVPR 2011) takes in turns B = sign(X Wᵀ) and the W with orthonormal rows or columns that is
    closest to B: the polar factor of Bᵀ X. Fewer bits than d see the first `bits` principal directions; for more, W has
    orthonormal columns (a tight frame). Planes as in BEBR (arXiv 2302.08714), untrained: plane 1 codes what the mean
    of |y| leaves. Same input and seed, same result. Raises CalibrationError for a wish that cannot be.
    """
    if bits < 8 or bits % 8 or isinstance(bits, bool):
        raise CalibrationError(f"an embedding code has whole bytes: bits = {bits} is no positive multiple of 8")
    if planes not in PLANES or isinstance(planes, bool):
        raise CalibrationError(f"an embedding code has one or two planes, not {planes!r}: set planes to 1 or 2")
    x = x.double()
    if not x.isfinite().all():
        raise CalibrationError("some calibration embeddings are not finite numbers: look at the model and its samples")
    mean = x.mean(0) if centre else torch.zeros_like(x[0])
    centred = x - mean
    weight = _rotation(centred, bits, seed, rounds)
    level = (centred @ weight.T).abs().mean(0)
    return EmbeddingCode(weight, -(weight @ mean), level, planes)


def _rotation(x: Tensor, bits: int, seed: int, rounds: int) -> Tensor:
    """W float64 [bits, d] for centred `x` [n, d]."""
    basis = _principal(x, bits) if bits < x.shape[1] else torch.eye(x.shape[1], dtype=torch.float64)
    seen = x @ basis.T
    weight = _random(bits, len(basis), seed)
    for _ in range(rounds):
        weight = _polar(sign(seen @ weight.T).T @ seen)
    return weight @ basis


def _principal(x: Tensor, count: int) -> Tensor:
    """The directions of most variance, float64 [count, d], each with its largest entry positive."""
    _, vectors = torch.linalg.eigh(x.T @ x)
    directions = vectors.flip(1)[:, :count].T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def _random(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix float64 [rows, columns], rows >= columns, with orthonormal columns."""
    start = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(start)[0]


def _polar(m: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is closest to `m` [rows, columns], rows >= columns."""
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v
