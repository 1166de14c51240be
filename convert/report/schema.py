"""The report as data: exactly what `report.json` holds, documented in docs/report.md.

JSON has no infinity. A comparison without any difference has an SQNR of +inf; it is written as `exact: true` with
`sqnr_db` at 200, a value no float32 comparison reaches, so that a reader may compare numbers. Where no ratio exists at
all (an output is NaN, the reference is zero), `sqnr_db` is null and `undefined` says why. Models accept `math.inf` and
NaN for `sqnr_db` and turn them into this encoding.
"""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

SCHEMA_VERSION: Literal[1] = 1
EXACT_SQNR_DB = 200.0


class Part(BaseModel):
    """Base of all parts: immutable, and a field nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_alias=True, serialize_by_alias=True)


class ModelFacts(Part):
    """The model that was converted."""

    name: str
    parameters: int = Field(ge=0, description="Number of weights of the float model.")
    fingerprint: str = Field(description="SHA-256 of the captured model, hexadecimal.")


class Calibration(Part):
    """The samples that ranges were chosen on."""

    samples: int = Field(ge=0)
    fingerprint: str = Field(description="SHA-256 of every calibration sample, hexadecimal.")
    synthetic: bool = Field(description="True when the samples are random numbers that nobody measured.")


class Evaluation(Part):
    """The samples that drift was judged on; none of them served calibration."""

    samples: int = Field(ge=1)
    fingerprint: str = Field(description="SHA-256 of every evaluation sample, hexadecimal.")
    source: str = Field(description="Where they come from, in words: a file, or the part set aside.")
    labelled: bool


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


class LayerDrift(Signal):
    """One layer's output in the quantized graph, compared with the same layer's in the float graph."""

    layer: str


class FirstJump(Part):
    """The first stage at which the SQNR falls much, and the layers that lose most there."""

    stage: str
    worst_layers: tuple[str, ...] = ()


class Drift(Part):
    """The waterfall, in the order in which things happened; its last stage is the artifact, run from disk."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    layers: tuple[LayerDrift, ...] = ()
    first_jump: FirstJump | None = None

    @model_validator(mode="after")
    def _jump_is_a_stage(self) -> Self:
        if self.first_jump and self.first_jump.stage not in {s.stage for s in self.stages}:
            raise ValueError(f"first_jump names '{self.first_jump.stage}', which is not among the stages")
        return self

    @property
    def artifact(self) -> Stage:
        """The drift of the artifact itself."""
        return self.stages[-1]


class Match(Part):
    """The artifact's outputs compared with the torch simulation of the final graph."""

    exact: bool
    max_abs: float | None = Field(ge=0, allow_inf_nan=False, description="Null when an output is not finite.")
    output_step: float | None = Field(ge=0, description="The step of the output's format; null for float.")
    within_one_step: bool
    share_equal: float = Field(ge=0, le=1, description="Share of output values that are equal.")
    reason: str = Field(description="Why they may differ; empty only when exact.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.exact and (self.max_abs != 0 or self.share_equal != 1 or not self.within_one_step):
            raise ValueError("an exact match has max_abs 0, share_equal 1 and within_one_step true")
        if not self.exact and not self.reason:
            raise ValueError("a match that is not exact needs a reason")
        return self


class ClassAgreement(Part):
    """How often float model and artifact agree on the samples of one class."""

    label: int
    samples: int = Field(ge=1)
    agreement: float = Field(ge=0, le=1)


class Accuracy(Part):
    """Task accuracy, as shares [0, 1] of correct samples, of float model and artifact on the same samples."""

    float_: float = Field(alias="float", ge=0, le=1)
    artifact: float = Field(ge=0, le=1)
    samples: int = Field(ge=1)
    classes: int = Field(ge=2, description="Number of classes; guessing is right for 1 / classes.")
    per_class: tuple[ClassAgreement, ...] = ()


class Latency(Part):
    """Times of one call, in milliseconds, of the artifact and of its float twin, measured in turns.

    `speedup` is float_p50_ms / p50_ms: below 1 the artifact is slower than float. `ratio_interval` is its 95 %
    bootstrap interval. All float fields are null when no float twin was timed.
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


class FallbackFact(Part):
    """A node that does not run as wanted, and why."""

    node: str
    reason: str


class PlacementFacts(Part):
    """Which operators of the artifact, read back from disk, compute in which format."""

    int8_ops: int = Field(ge=0)
    float_ops: int = Field(ge=0)
    conversions: int = Field(ge=0, description="Steps between formats that remain at run time.")
    fallbacks: tuple[FallbackFact, ...] = ()
    kinds: dict[str, int] = Field(default_factory=dict, description='Operators by "<format> <operator>".')

    @property
    def narrow(self) -> str:
        """What the operators counted as `int8_ops` compute in: "int8", or "float8" for 8-bit floats."""
        return "float8" if any(kind.startswith("float8 ") for kind in self.kinds) else "int8"


class LedgerEntry(Part):
    """What one step did to one layer, or why it left the layer alone."""

    step: str
    layer: str
    action: str
    reason: str = ""


class GateResult(Part):
    """A limit, what was measured against it, and the verdict. A metric that was not measured fails."""

    gate: str
    limit: FiniteFloat
    value: FiniteFloat | None = Field(description="Null when it was not measured or has no number.")
    passed: bool
    reason: str = Field(default="", description="What the comparison means, in words.")
    subject: str = Field(default="", description='"<device>/<target>" that was judged.')

    @model_validator(mode="after")
    def _failure_has_a_reason(self) -> Self:
        if not self.passed and not self.reason:
            raise ValueError("a failed gate says why")
        return self


class TokenCut(Part):
    """Where tokens are removed, and how many stay."""

    layer: str
    block: int = Field(ge=1, description="The block of the model, from 1, between whose attention and MLP the cut is.")
    before: int = Field(ge=1)
    after: int = Field(ge=1)


class TokenSample(Part):
    """What became of the tokens of one evaluation sample.

    `became[i]` is for cut i the place, among the tokens that stay, of what each of the model's tokens went into; -1:
    it is gone. `grid`: rows and columns of the patches, null for text. `image`: the sample as a PNG in base64.
    """

    became: tuple[tuple[int, ...], ...]
    grid: tuple[int, int] | None = None
    image: str | None = None


class TokenFacts(Part):
    """The tokens of a transformer, block by block."""

    method: str
    form: str = Field(description='How tokens are taken: "topk" (top-k and gather) or "rank" (products alone).')
    protected: int = Field(ge=0, description="Tokens in front that always stay, such as a class token.")
    tokens: int = Field(ge=1, description="Tokens of the model before any cut.")
    share: float = Field(gt=0, le=1, description="Mean share of the tokens that leave a block.")
    per_block: tuple[int, ...] = Field(description="Tokens that leave each block.")
    cuts: tuple[TokenCut, ...] = ()
    changed: float = Field(description="Percent of answers that changed on calibration samples, or 100 (1 - cosine).")
    samples: tuple[TokenSample, ...] = ()


class Result(Part):
    """One artifact: one device, one target."""

    device: str
    target: str
    artifact: str = Field(description="Path of the artifact, relative to the report.")
    bytes: int = Field(ge=1, description="Size on disk of the artifact.")
    float_bytes: int = Field(ge=1, description="Size on disk of the float twin of the same format.")
    recipe: str
    recipe_reason: str = Field(description="Why this recipe: asked for, or the profile's reason.")
    executor: str = Field(description="What ran the artifact here, with its version.")
    drift: Drift
    match: Match
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    latency_note: str | None = Field(default=None, description="Why there is no latency.")
    placement: PlacementFacts
    tokens: TokenFacts | None = Field(default=None, description="Where a recipe removed tokens.")
    gates: tuple[GateResult, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()

    @model_validator(mode="after")
    def _missing_latency_is_explained(self) -> Self:
        if self.latency is None and not self.latency_note:
            raise ValueError("a result without latency needs a latency_note")
        return self

    @property
    def subject(self) -> str:
        """How gates and warnings name this result."""
        return f"{self.device}/{self.target}"


class Environment(Part):
    """Where it ran: versions of everything that can change a number."""

    python: str
    packages: dict[str, str] = Field(description="Version of each installed package that took part.")
    os: str
    cpu: str


class Report(Part):
    """Everything one `convert` measured."""

    schema_version: Literal[1] = SCHEMA_VERSION
    command: str = Field(description="The command line that made this report.")
    seed: int
    model: ModelFacts
    calibration: Calibration
    evaluation: Evaluation
    environment: Environment
    warnings: tuple[str, ...] = Field(default=(), description="What a reader must know before any number.")
    results: tuple[Result, ...] = Field(min_length=1)
    convert_seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_rss_mib: float = Field(gt=0, allow_inf_nan=False, description="Peak resident memory, MiB.")

    @model_validator(mode="after")
    def _results_are_distinct(self) -> Self:
        subjects = [r.subject for r in self.results]
        if len(set(subjects)) != len(subjects):
            raise ValueError("two results have the same device and target")
        return self
