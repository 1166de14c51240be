"""What one artifact did on one device, real or emulated: outputs, instructions or times, and the state of the board."""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from .measures import Latency, Part, Stage


class Instructions(Part):
    """Instructions that an emulated processor executed for one inference, by class. A cost, and not a time.

    `simd` is every vector or scalar floating-point instruction, `dot` sdot and udot, `mla` widening integer
    multiply(-accumulate)s, `fmla` float ones; null where the emulated processor's are not told apart.
    """

    where: str = Field(description="The address it was counted at.")
    all: int = Field(ge=1)
    simd: int | None = Field(default=None, ge=0)
    dot: int | None = Field(default=None, ge=0)
    mla: int | None = Field(default=None, ge=0)
    fmla: int | None = Field(default=None, ge=0)
    load_store: int | None = Field(default=None, ge=0)
    branch: int | None = Field(default=None, ge=0)
    inferences: int = Field(ge=1, description="How many were counted; the figures are their median.")
    spread: float = Field(ge=0, description="(Largest - smallest) / median of `all` over these inferences.")
    float_all: int | None = Field(default=None, ge=1, description="The float twin's, counted in the same way.")


class HostAgreement(Part):
    """The outputs there compared with those of the same file on this machine."""

    exact: bool
    share_equal: float = Field(ge=0, le=1)
    max_abs: float | None = Field(ge=0, allow_inf_nan=False, description="Null when an output is not finite.")


class BoardState(Part):
    """What the board said of itself at one moment; null is what it does not say."""

    moment: str = Field(description="before, during or after the timing.")
    minute: float | None = Field(default=None, description="Minutes since the timing began.")
    clock_mhz: FiniteFloat | None = None
    temperature_c: FiniteFloat | None = None
    governor: str | None = None
    throttled: str | None = Field(default=None, description="What slows it down at this moment, in words.")
    power_w: FiniteFloat | None = None


class SustainedPoint(Part):
    """The median of one stretch of a sustained run."""

    minute: float = Field(ge=0)
    p50_ms: float = Field(gt=0, allow_inf_nan=False)
    temperature_c: FiniteFloat | None = None
    clock_mhz: FiniteFloat | None = None


class DeviceRun(Part):
    """One artifact at one address.

    A run that did not come to an end has `failure` and no numbers. `latency` is null on emulated devices, and where a
    measurement was void; `latency_note` says why.
    """

    on: str = Field(description="The address.")
    machine: str = Field(default="", description="What the device calls itself.")
    emulated: bool
    executor: str = Field(default="", description="The runtime there, with its version.")
    failure: str | None = Field(default=None, description="Why it did not run, in words.")
    samples: int = Field(default=0, ge=0)
    drift: Stage | None = Field(default=None, description="Its outputs against the float model's.")
    host: HostAgreement | None = None
    latency: Latency | None = None
    latency_note: str | None = None
    void: str | None = Field(default=None, description="Why the times do not count: the board was throttled.")
    sustained: tuple[SustainedPoint, ...] = ()
    energy_mj: FiniteFloat | None = Field(default=None, description="Energy per inference, where the board reports it.")
    peak_rss_mib: FiniteFloat | None = Field(default=None, description="Of the agent with runtime and both files.")
    instructions: Instructions | None = None
    instructions_note: str | None = None
    board: tuple[BoardState, ...] = ()
    facts: dict[str, str] = Field(default_factory=dict, description="System, kernel, versions, emulator.")
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole_or_failed(self) -> Self:
        if (self.failure is None) != (self.drift is not None):
            raise ValueError("a run has outputs or a failure")
        if self.failure is None and self.latency is None and not self.latency_note:
            raise ValueError("a run without latency says why")
        if self.emulated and self.latency is not None:
            raise ValueError("emulated time is no latency")
        return self


class Estimate(Part):
    """What one call should take on the device, where nothing was measured there. Not a latency: no gate reads it."""

    word: Literal["estimate"] = "estimate"
    low_ms: float = Field(gt=0, allow_inf_nan=False, description="The 90 % interval's lower end.")
    mid_ms: float = Field(gt=0, allow_inf_nan=False)
    high_ms: float = Field(gt=0, allow_inf_nan=False, description="Its upper end.")
    float_mid_ms: FiniteFloat | None = Field(default=None, description="The float model's, with the same uncertainty.")
    threads: int | None = Field(default=None, ge=1, description="Of a processor; null for an accelerator.")
    basis: str = Field(description="What it rests on, in words.")
    fitted_on: int = Field(ge=1, description="How many public measurements its factors are fitted on.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low_ms <= self.mid_ms <= self.high_ms:
            raise ValueError("an estimate lies inside its interval")
        return self
