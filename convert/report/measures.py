"""What drift and time are made of: the base of all parts, a comparison with the float model, the times of one call."""

import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

EXACT_SQNR_DB = 200.0


class Part(BaseModel):
    """Base of all parts: immutable, and a field nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_alias=True, serialize_by_alias=True)


class Signal(Part):
    """A ratio of signal to noise, with the encoding of what is not a number."""

    sqnr_db: FiniteFloat | None = Field(description="10 log10(signal power / noise power); 200 with exact.")
    exact: bool = Field(default=False, description="True when no value differs: an SQNR of +infinity.")
    undefined: str | None = Field(default=None, description="Why there is no SQNR at all, in words.")

    @model_validator(mode="before")
    @classmethod
    def _encode_non_finite(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        value = data.get("sqnr_db")
        if value is None and data.get("exact"):
            value = math.inf
        if not isinstance(value, float) or math.isfinite(value):
            return data
        if value == math.inf:
            return {**data, "sqnr_db": EXACT_SQNR_DB, "exact": True}
        default = "the values compared are not all finite" if math.isnan(value) else "the reference is zero"
        return {**data, "sqnr_db": None, "undefined": data.get("undefined") or default}

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if (self.sqnr_db is not None) == (self.undefined is not None):
            raise ValueError("give exactly one of sqnr_db and undefined")
        if self.exact and self.sqnr_db != EXACT_SQNR_DB:
            raise ValueError(f"exact: true goes with sqnr_db {EXACT_SQNR_DB:g}, exactly one meaning")
        return self


class Stage(Signal):
    """One row of the drift waterfall: the outputs after this stage, compared with the float model's.

    `cosine` is the mean over samples; `max_abs` is in the unit of the outputs; `top1_agreement` is the share of
    samples [0, 1] whose largest output stays the same, null for a model that does not classify.
    """

    stage: str
    cosine: float | None = Field(ge=-1.000001, le=1.000001, allow_inf_nan=False)
    max_abs: float | None = Field(ge=0, allow_inf_nan=False)
    top1_agreement: float | None = Field(default=None, ge=0, le=1)
    on: str | None = Field(default=None, description="The address it ran at; null for this machine.")
    samples: int | None = Field(default=None, ge=1, description="Where fewer samples than the evaluation's were run.")


class Latency(Part):
    """Times of one call, in milliseconds, of the artifact and of its float twin, measured in turns.

    `speedup` is float_p50_ms / p50_ms: below 1 the artifact is slower than float. `ratio_interval` is its interval, the
    95 % bootstrap made wide enough for another run (`convert/latency.py`). All float fields are null when no float twin
    was timed.
    """

    where: str = Field(description='"host", or the device\'s address.')
    runs: int = Field(ge=1)
    float_runs: int | None = None
    p50_ms: float = Field(gt=0, allow_inf_nan=False)
    p90_ms: float = Field(gt=0, allow_inf_nan=False)
    p99_ms: float = Field(gt=0, allow_inf_nan=False)
    cv: float = Field(ge=0, allow_inf_nan=False, description="Standard deviation / mean, all runs kept.")
    float_p50_ms: FiniteFloat | None = None
    float_p90_ms: FiniteFloat | None = None
    float_p99_ms: FiniteFloat | None = None
    float_cv: FiniteFloat | None = None
    float_artifact: str | None = Field(default=None, description="The float file that was timed.")
    speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ratio_interval: tuple[FiniteFloat, FiniteFloat] | None = None
    stable: bool
    threads: int = Field(ge=1)
    cpu: str
    governor: str | None = Field(default=None, description="Frequency governor, where it can be read.")
    warnings: tuple[str, ...] = ()
    load_ms: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="Loading the file, once.")
    first_ms: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="The first call after that.")
    quantiles_ms: tuple[FiniteFloat, ...] = Field(default=(), description="Percentiles 0, 1, ..., 100 of all runs.")
    float_quantiles_ms: tuple[FiniteFloat, ...] = Field(default=(), description="The same of the float twin.")

    @property
    def surely_slower(self) -> bool:
        """Whether the artifact is slower than float beyond what the timing leaves open."""
        if self.speedup is None or self.ratio_interval is None:
            return False
        return self.speedup < 1 and self.ratio_interval[1] < 1

    @model_validator(mode="after")
    def _float_twin_is_whole(self) -> Self:
        twin = (self.float_runs, self.float_p50_ms, self.float_p90_ms, self.float_p99_ms, self.float_cv)
        if len({value is None for value in (*twin, self.speedup, self.ratio_interval)}) != 1:
            raise ValueError("a float twin was timed or it was not: its fields are all given or all null")
        return self
