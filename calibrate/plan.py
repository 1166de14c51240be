"""What is to be quantized and how: decided in `convert` from recipe and profile, handed to the steps as data."""

from dataclasses import dataclass, field
from typing import Literal

ActivationType = Literal["int8", "uint8"]


@dataclass(frozen=True)
class Plan:
    """The wishes of one conversion; the steps record layer by layer what they did with them.

    `quantize_inputs` names the kinds (calibrate/graph.py) whose activation inputs carry Q/DQ, `quantize_outputs` those
    whose output the runtime's kernel writes as codes, `shared_scale` those that move codes without changing scale.
    `residual_add` is "both" (an add reads two quantized tensors), "skip" (only the skip branch is quantized, the other
    stays inside the convolution's kernel) or "none". `half_scales`: scales are float16 numbers, for runtimes that keep
    them so. `keep_float` maps layer names to the reason they stay float.
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
    observers: tuple[str, ...] = ("minmax", "percentile", "mse")


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
