"""The report as data: exactly what `report.json` holds, documented in docs/report.md.

JSON has no infinity. A comparison without any difference has an SQNR of +inf; it is written as `exact: true` with
`sqnr_db` at 200, a value no float32 comparison reaches, so that a reader may compare numbers. Where no ratio exists at
all (an output is NaN, the reference is zero), `sqnr_db` is null and `undefined` says why. Models accept `math.inf` and
NaN for `sqnr_db` and turn them into this encoding.
"""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from .measures import EXACT_SQNR_DB, Latency, Part, Signal, Stage
from .runs import DeviceRun, Estimate, Instructions

__all__ = ["EXACT_SQNR_DB", "DeviceRun", "Estimate", "Instructions", "Latency", "Part", "Signal", "Stage"]

SCHEMA_VERSION: Literal[1] = 1


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


class LayerDrift(Signal):
    """One layer's output in the quantized graph, compared with the same layer's in the float graph."""

    layer: str


class FirstJump(Part):
    """The first stage at which the SQNR falls much, and the layers that lose most there."""

    stage: str
    worst_layers: tuple[str, ...] = ()


class Drift(Part):
    """The waterfall, in the order in which things happened: the artifact, run from disk, then the same on devices."""

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
        """The drift of the artifact itself, on this machine: the last stage before those of devices."""
        return [s for s in self.stages if s.on is None][-1]


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
    float_: float | None = Field(default=None, alias="float", ge=0, le=1, description="Accuracy of float on the class.")
    artifact: float | None = Field(default=None, ge=0, le=1, description="Accuracy of the artifact on the class.")


class Accuracy(Part):
    """Task accuracy, as shares [0, 1] of correct samples, of float model and artifact on the same samples."""

    float_: float = Field(alias="float", ge=0, le=1)
    artifact: float = Field(ge=0, le=1)
    samples: int = Field(ge=1)
    classes: int = Field(ge=2, description="Number of classes; guessing is right for 1 / classes.")
    per_class: tuple[ClassAgreement, ...] = ()


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


class Resident(Part):
    """Memory that a model keeps: what a further session of it adds to a process, loaded and run once, activations too.

    Measured here, in a process of its own, with this machine's runtime.
    """

    bytes: int = Field(ge=0, description="Of the artifact.")
    float_bytes: int = Field(ge=0, description="Of its float twin.")


class Result(Part):
    """One artifact: one device, one target."""

    device: str
    target: str
    artifact: str = Field(description="Path of the artifact, relative to the report.")
    bytes: int = Field(ge=1, description="Size on disk of the artifact.")
    float_bytes: int = Field(ge=1, description="Size on disk of the float twin of the same format.")
    resident: Resident | None = Field(default=None, description="What both keep in memory here.")
    resident_note: str | None = Field(default=None, description="Why that is not known.")
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
    runs: tuple[DeviceRun, ...] = Field(default=(), description="What it did elsewhere: boards, emulated ones too.")
    instructions: Instructions | None = Field(
        default=None, description="Instructions per inference: those of the emulated device, else of the first counted."
    )
    estimate: Estimate | None = Field(default=None, description="Of the latency on the device itself: not measured.")
    estimate_note: str | None = Field(default=None, description="Why there is no estimate.")
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
