"""What LiteRT's kernels compute on 16-bit activations: codes int16 with zero point 0, weights int8.

Found with LiteRT 2.3.0 without one difference in its ranges (tests/targets/test_tflite_int16.py holds it to that). A
real factor is a 31-bit fixed-point multiplier times a power of two (`multiplier`); three roundings are in use:

- conv: the accumulator is int64, the multiplier is cut to 15 bits, one rounding shift, half up (`shifted_once`).
- linear, add, mean: the doubled high half of a 32 x 32 bit product, half away from zero, then a rounding shift, half
  away from zero (`doubled_high`).
- add: each operand is shifted left by 15 and scaled by its own factor below 1/2, the sum is scaled once more.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def multiplier(real: float) -> tuple[int, int]:
    """`real` as (mantissa in [2^30, 2^31), exponent): real = mantissa / 2^31 * 2^exponent; (0, 0) for 0."""
    if real == 0:
        return 0, 0
    fraction, exponent = math.frexp(real)
    mantissa = round(fraction * 2**31)
    return (mantissa // 2, exponent + 1) if mantissa == 2**31 else (mantissa, exponent)


def shifted_once(total: Tensor, factors: Sequence[float], axis: int) -> Tensor:
    """Convolution: int64 accumulators times one factor per index of `axis`, int64."""
    mantissas, shifts = [], []
    for factor in factors:
        mantissa, exponent = multiplier(factor)
        mantissas.append((mantissa + (1 << 15)) >> 16 if mantissa < 0x7FFF0000 else 0x7FFF)
        shifts.append(15 - exponent)
    shape = [1] * total.dim()
    shape[axis] = -1
    cut, shift = torch.tensor(mantissas).view(shape), torch.tensor(shifts).view(shape)
    return (total.long() * cut + torch.bitwise_left_shift(torch.ones_like(shift), shift - 1)) >> shift


def doubled_high(total: Tensor, factor: float) -> Tensor:
    """Linear, add and mean: int32 accumulators (held as int64) times `factor`, int64."""
    mantissa, exponent = multiplier(factor)
    return _scaled(total.long(), mantissa, exponent)


def _scaled(total: Tensor, mantissa: int, exponent: int) -> Tensor:
    product = total * (1 << max(exponent, 0)) * mantissa
    high = torch.where(product >= 0, product + (1 << 30), product + 1 - (1 << 30))
    high = torch.div(high, 1 << 31, rounding_mode="trunc")
    right = max(-exponent, 0)
    mask = (1 << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0).long()).long()


def linear_codes(total: Tensor, input_scale: float, weight_scales: Tensor, output_scale: float) -> Tensor:
    """Accumulators (..., out) with the bias in them -> codes before clamping, int64."""
    factors = [input_scale * float(s) / output_scale for s in weight_scales]
    columns = [doubled_high(total[..., i], factor) for i, factor in enumerate(factors)]
    return torch.stack(columns, -1)


def conv_codes(total: Tensor, input_scale: float, weight_scales: Tensor, output_scale: float) -> Tensor:
    """Accumulators (N, out, ...) with the bias in them -> codes before clamping, int64."""
    return shifted_once(total, [input_scale * float(s) / output_scale for s in weight_scales], 1)


def add_codes(a: Tensor, scale_a: float, b: Tensor, scale_b: float, output_scale: float) -> Tensor:
    """Codes of a sum before clamping, int64."""
    twice = 2 * max(scale_a, scale_b)
    left = doubled_high(a.long() << 15, scale_a / twice)
    right = doubled_high(b.long() << 15, scale_b / twice)
    return doubled_high(left + right, twice / (2**15 * output_scale))


def mean_codes(total: Tensor, count: int, input_scale: float, output_scale: float) -> Tensor:
    """Sums of `count` codes -> codes of their mean before clamping, int64; the division is in the multiplier."""
    mantissa, exponent = multiplier(input_scale / output_scale)
    shift = min(count.bit_length() - 1, 32, 31 + exponent)
    return _scaled(total.long(), (mantissa << shift) // count, exponent - shift)


def fits(dtype: torch.dtype) -> bool:
    """Whether codes of `dtype` are what these kernels write."""
    return dtype == torch.int16
