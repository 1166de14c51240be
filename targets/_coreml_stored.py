"""What a constexpr operator of a Core ML program stores: how many bits, in which form, and which system reads it."""

import math
from dataclasses import dataclass
from typing import Any

from ._coreml_weights import SYSTEMS


@dataclass(frozen=True)
class Stored:
    """`name` such as "int4 weights, groups of 32"; `int8`: codes that an int8 kernel reads; `system`: the first to
    read this form."""

    name: str
    system: str = "iOS16"
    int8: bool = False

    def label(self, profile: str) -> str:
        """The name, with the system where it is later than the profile's deployment target."""
        later = SYSTEMS.index(self.system) > SYSTEMS.index(profile)
        return f"{self.name}, {self.system}" if later else self.name


def stored(op: Any) -> Stored | None:
    """How this operator of a program that was read back holds weights; None for one that is no constexpr operator."""
    if op.op_type == "constexpr_affine_dequantize":
        return Stored("int8 weights", int8=True)
    if op.op_type == "constexpr_blockwise_shift_scale":
        return _codes(op)
    if op.op_type == "constexpr_lut_to_dense":
        return _table(op)
    names = {"constexpr_cast": "float16 weights", "constexpr_sparse_to_dense": "sparse weights"}
    return Stored(names[op.op_type]) if op.op_type in names else None


def _codes(op: Any) -> Stored:
    from coremltools.converters.mil.mil import types

    bits = int(types.builtin_to_string(op.inputs["data"].dtype).removeprefix("u").removeprefix("int"))
    groups = _groups(op.inputs["data"].shape, op.inputs["scale"].shape)
    plain = bits == 8 and not groups
    return Stored(f"int{bits} weights{groups}", "iOS16" if plain else "iOS18", plain)


def _table(op: Any) -> Stored:
    """A table for the whole tensor is a palette; one per channel or group is how codes of few bits are stored."""
    indices, table = op.inputs["indices"], op.inputs["lut"]
    if "shape" in op.inputs:  # the form of iOS 16
        return Stored(f"{int(math.log2(table.shape[0]))}-bit palette")
    bits, blocks = int(math.log2(table.shape[-2])), table.shape[:-2]
    if all(count == 1 for count in blocks):
        return Stored(f"{bits}-bit palette", "iOS18" if bits == 3 else "iOS16")
    kind = "1-bit weights" if bits == 1 else f"int{bits} weights"
    return Stored(f"{kind}{_groups(indices.shape, blocks)}", "iOS18")


def _groups(shape: tuple[int, ...], blocks: tuple[int, ...]) -> str:
    """Such as ", groups of 32" where the second axis has several blocks; else nothing."""
    return f", groups of {shape[1] // blocks[1]}" if len(shape) > 1 and blocks[1] > 1 else ""
