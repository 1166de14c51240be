"""What convolution and pooling share: how much a window's axes are padded."""

from collections.abc import Sequence

from targets.errors import TargetError

Pads = list[tuple[int, int]]


def pads_of(
    pad_type: str,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Pads:
    """(before, after) for every spatial axis; "same" puts the odd element after, "same_lower" before."""
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        flat = list(pad) if pad is not None else [0] * (2 * len(kernel))
        return [(flat[2 * i], flat[2 * i + 1]) for i in range(len(kernel))]
    if pad_type not in ("same", "same_lower"):
        raise TargetError(f"MIL has no pad_type '{pad_type}'")
    pads: Pads = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if pad_type == "same" else (large, small))
    return pads


def flat(pads: Pads) -> list[int]:
    """The pads in the order torch.nn.functional.pad takes them: last axis first."""
    return [side for pair in reversed(pads) for side in pair]


def symmetric(pads: Pads) -> bool:
    return all(before == after for before, after in pads)
