"""Rotations that keep the vector of ones, and with it LayerNorm: LN(x R) = LN(x) R for LayerNorms without affine."""

import torch
from torch import Tensor

# Primes q with q % 4 == 3: Paley's construction gives a Hadamard matrix of order q + 1.
PRIMES = (11, 19, 23, 43, 47, 59, 67, 71, 79, 83, 103, 107, 131, 139)


def rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix R, float64 [size, size], with R 1 = 1, that spreads one channel over all.

    R = H diag(1, ±1, ...) Hᵀ, H the normalised Hadamard matrix whose first column is constant, where there is one of
    this size (2^k, 12·2^k, 20·2^k, ...); else H and Hᵀ are two random orthogonal matrices with that first column.
    """
    generator = torch.Generator().manual_seed(seed)
    h = hadamard(size)
    if h is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        signs[0] = 1.0
        return (h * signs) @ h.T / size
    left, right = (_beside_ones(size, generator) for _ in range(2))
    return left @ right.T


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix of ±1, float64, whose first column is all ones; None for sizes that this can't make."""
    if size < 1:
        return None
    for order in (1, *(q + 1 for q in PRIMES)):
        factor = size // order
        if size % order == 0 and factor & (factor - 1) == 0:
            h = _paley(order - 1) if order > 1 else torch.ones(1, 1, dtype=torch.float64)
            step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            while len(h) < size:
                h = torch.kron(h, step)
            return h * h[:, :1]
    return None


def _paley(q: int) -> Tensor:
    """Paley's first construction (1933): I + S, S the bordered matrix of quadratic characters modulo q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:] = 1.0
    s[1:, 0] = -1.0
    s[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return torch.eye(q + 1, dtype=torch.float64) + s


def _beside_ones(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64, whose first column is constant and positive."""
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    start[:, 0] = 1.0
    q, _ = torch.linalg.qr(start)
    q[:, 0] = q[:, 0].abs()
    return q
