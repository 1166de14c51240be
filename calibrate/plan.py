"""What is to be quantized and how: decided in `convert` from recipe and profile, handed to the steps as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ActivationType = Literal["int8", "uint8", "int16"]
WeightKind = Literal["int", "palette", "float16", "float8_e4m3", "float8_e5m2"]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored: `bits` per value, plus scales.

    "int": symmetric codes, one scale per output channel or, with `group`, per so many neighbours along the input axis
    (linear and embedding; a layer whose input is no multiple of it keeps one scale per channel). `power_of_two`: scales
    are powers of two (block-wise storage, BCT, arXiv 2304.01483). "palette": indices into a table of 2^bits values, one
    table per tensor, Core ML only. "float16": half-precision numbers without scales; the layer computes in float.
    "float8_*": 8-bit floats with one scale per output channel.
    """

    bits: int = 8
    group: int | None = None
    kind: WeightKind = "int"
    power_of_two: bool = False

    @property
    def label(self) -> str:
        """Such as "int4, groups of 32"."""
        name = f"int{self.bits}" if self.kind == "int" else f"{self.bits}-bit palette"
        if self.kind.startswith("float"):
            name = self.kind
        groups = f", groups of {self.group}" if self.group else ""
        return name + groups + (", powers of two" if self.power_of_two else "")


HALF = WeightFormat(16, kind="float16")
"""Half-precision weights in front of float arithmetic."""


@dataclass(frozen=True)
class Plan:
    """The wishes of one conversion; the steps record layer by layer what they did with them.

    `quantize_inputs` names the kinds (calibrate/graph.py) whose activation inputs carry Q/DQ, `quantize_outputs` those
    whose output the runtime's kernel writes as codes, `shared_scale` those that move codes without changing scale.
    `residual_add` is "both" (an add reads two quantized tensors), "skip" (only the skip branch is quantized, the other
    stays inside the convolution's kernel) or "none". `half_scales`: scales are float16 numbers, for runtimes that keep
    them so. `keep_float` maps layer names to the reason they stay float. `weight` is how weights are stored, `formats`
    where a layer differs. `levels` maps the layers that a mixed plan binarizes to their binarizers, None where the step
    binarize decides by itself. `parameters` maps a step's name to what the recipe set for it.
    """

    steps: tuple[str, ...]
    activation: ActivationType = "int8"
    symmetric: bool = False
    per_channel: bool = True
    weight_max: int = 127
    int32_bias: bool = True
    half_scales: bool = False
    quantize_inputs: frozenset[str] = frozenset({"conv", "linear"})
    quantize_outputs: frozenset[str] = frozenset()
    shared_scale: frozenset[str] = frozenset()
    fixed_output: dict[str, tuple[float, int]] = field(default_factory=dict)
    residual_add: Literal["both", "skip", "none"] = "both"
    dynamic_scheme: Literal["tensor_uint8", "row_int8"] = "tensor_uint8"
    dynamic_kinds: frozenset[str] = frozenset({"linear"})
    keep_float: dict[str, str] = field(default_factory=dict)
    observers: tuple[str, ...] = ("minmax", "percentile", "mse", "sweep")
    weight: WeightFormat = WeightFormat()
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    levels: dict[str, str] | None = None
    parameters: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def format_of(self, layer: str) -> WeightFormat:
        """The format of a layer's weight: its own in a mixed plan, else the plan's."""
        return self.formats.get(layer, self.weight)

    def code_range(self, bits: int) -> tuple[int, int]:
        """The least and largest weight code: ±weight_max for 8 bits, else all codes of so many bits: 4 -> -8, 7."""
        return (-self.weight_max, self.weight_max) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: what a step did to a layer, or why it left it alone."""

    step: str
    layer: str
    action: str
    reason: str = ""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor: real = (code - zero_point) * scale, code in [qmin, qmax]."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: ActivationType
    observer: str = ""
