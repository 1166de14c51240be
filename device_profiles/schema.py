"""The fields of a device profile and of the rules of one target, with their units."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from .errors import ProfileError
from .kinds import OpKind
from .overlay import merged, nearest

Recipe = Literal["int8", "int8-dynamic", "int8-weights", "float16", "float32"]
Positive = Annotated[StrictFloat, Field(gt=0)]
Count = Annotated[StrictInt, Field(gt=0)]
Text = Annotated[StrictStr, Field(min_length=1)]


class Facts(BaseModel):
    """A table of a profile: immutable, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FixedOutput(Facts):
    """What a runtime's kernel prescribes for its output: real = (code - zero_point) * scale."""

    scale: Positive
    zero_point: StrictInt


class Limit(Facts):
    """A kind of operator that the device's runtime does not run on its fast path, and why."""

    op: OpKind
    reason: Text


class Recipes(Facts):
    """What the recipe `auto` stands for, by the family of the model."""

    cnn: Recipe
    transformer: Recipe
    other: Recipe


class Reasons(Facts):
    """Why `auto` stands for that, one sentence for each family of models."""

    cnn: Text
    transformer: Text
    other: Text


class TargetRules(Facts):
    """How a graph is prepared for one target on one device: all that planning and lowering ask about it.

    `quantize_inputs` are the kinds whose inputs, activations and weights, carry Q/DQ; `quantize_outputs`
    those whose output is quantized again, as the kernel wants it; `shared_scale` those that work on codes,
    so that output and input have the same scale and zero point; `fixed_output` those whose output
    parameters the kernel prescribes. `residual_add` says which inputs of an add that closes a residual block
    are quantized: both, only the skip connection, or none. `weight_max` is the largest weight code: 127, or
    63 where 16-bit sums would saturate. `dynamic_ops` are the kinds that run in int8 with ranges taken at
    run time, as `dynamic_scheme` says. `quantize_io` makes the artifact's own inputs and outputs int8;
    `float_format` is the format of all that is not quantized. `token_form` is how chosen tokens are taken: by top-k
    and gather, or by rank, in comparisons and products alone. `reuse_outputs` (target c) computes channels of
    binary layers from one another where their signs differ in few words. `unsupported` kinds leave the device's
    fast path for good, `costly` ones run but break it up.
    """

    target: Text
    runtime: Literal["onnxruntime", "litert", "coreml", "tensorrt", "edgetpu", "c99"]
    recipe: Recipes
    recipe_reason: Reasons
    activation_dtype: Literal["int8", "uint8"]
    symmetric_activations: StrictBool
    per_channel: StrictBool
    weight_max: Literal[127, 63]
    quantize_inputs: tuple[OpKind, ...]
    quantize_outputs: tuple[OpKind, ...]
    shared_scale: tuple[OpKind, ...]
    fixed_output: dict[OpKind, FixedOutput]
    residual_add: Literal["both", "skip", "none"]
    dynamic_scheme: Literal["tensor_uint8", "row_int8", "none"]
    dynamic_ops: tuple[OpKind, ...]
    quantize_io: StrictBool
    float_format: Literal["float32", "float16"]
    token_form: Literal["topk", "rank"]
    layout: Literal["NCHW", "NHWC"]
    opset: Annotated[StrictInt, Field(ge=13, le=25)] | None = None
    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18", "iOS26"] | None = None
    reuse_outputs: StrictBool | None = None
    unsupported: tuple[Limit, ...] = ()
    costly: tuple[Limit, ...] = ()


class Cpu(Facts):
    """The processor; `dotprod`, `fp16` and `i8mm` are the Arm extensions for fast int8 and half floats."""

    arch: Literal["aarch64", "armv7", "riscv64", "x86_64"]
    model: Text
    cores: Count | None = None
    big_cores: Count | None = None
    clock_ghz: Positive | None = None
    features: tuple[Text, ...] = ()
    dotprod: StrictBool | None = None
    fp16: StrictBool | None = None
    i8mm: StrictBool | None = None


class Accelerator(Facts):
    """What computes beside the processor. `int8_tops` is dense int8 in 10^12 operations per second."""

    kind: Literal["gpu", "npu", "tpu", "dla"]
    name: Text
    int8: StrictBool | None = None
    fp16: StrictBool | None = None
    fp8: StrictBool | None = None
    int8_tops: Positive | None = None


class Memory(Facts):
    """Main memory: size in MiB; bandwidth in 10^9 bytes per second."""

    ram_mib: Count | None = None
    bandwidth_gbs: Positive | None = None


class Peak(Facts):
    """Arithmetic peak of all cores in 10^9 operations per second; a multiply-add counts as two."""

    fp32_gflops: Positive | None = None
    fp16_gflops: Positive | None = None
    int8_gops: Positive | None = None


class Thermal(Facts):
    """Where the device slows down, in degrees Celsius, and what to watch in a measurement."""

    soft_limit_c: Positive | None = None
    hard_limit_c: Positive | None = None
    note: Text | None = None


class Reach(Facts):
    """How programs get onto the device; "none" where there is no way yet."""

    transports: Annotated[tuple[Literal["local", "ssh", "adb", "emulated", "none"], ...], Field(min_length=1)]


class DeviceProfile(Facts):
    """One device: facts, each with its source, and where its rules differ from a target's generic ones.

    `targets` holds those differences as written in the file; `rules` gives the complete rules of a target.
    `sources` maps a dotted field or a prefix of fields to a public source, or to "unverified" and the reason;
    what is not known is left out and reads None.
    """

    version: Literal[1]
    name: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: Text
    family: Text
    summary: Text
    cpu: Cpu
    accelerator: Accelerator | None = None
    memory: Memory = Memory()
    peak: Peak = Peak()
    thermal: Thermal = Thermal()
    reach: Reach
    default_target: Text
    targets: dict[str, dict[str, Any]] = {}
    sources: dict[str, Text] = {}

    def rules(self, target: str) -> TargetRules:
        """The generic rules of `target` overlaid with this device's; ProfileError for an unknown target."""
        from .loading import default_rules, default_targets

        if target not in default_targets():
            raise ProfileError(f"there is no target '{target}'; {nearest(target, default_targets())}")
        return TargetRules.model_validate(merged(default_rules(target), self.targets.get(target, {})))

    def facts(self) -> Iterator[str]:
        """The dotted names of all facts this profile states: what must have a source."""
        tables = ("cpu", "accelerator", "memory", "peak", "thermal")
        stated = self.model_dump(include=set(tables), exclude_unset=True, exclude_none=True)
        for table in tables:
            yield from leaves(stated.get(table, {}), table)
        yield from leaves(self.targets, "targets")

    def source(self, field: str) -> str | None:
        """The source of a dotted field: its own entry, else its longest prefix's, else None."""
        return source_of(field, self.sources)


def leaves(value: object, path: str) -> Iterator[str]:
    """The dotted paths of everything under `path` that is not a table; a list is one leaf."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path


def source_of(field: str, sources: Mapping[str, str]) -> str | None:
    """The entry of `sources` for a dotted field or its longest prefix, or None."""
    parts = field.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((sources[prefix] for prefix in prefixes if prefix in sources), None)
