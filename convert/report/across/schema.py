"""The report across conversions as data: what its `report.json` holds, documented in docs/report.md."""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from ..measures import Latency, Part, Stage
from ..runs import Estimate, Instructions
from ..schema import GateResult, LayerDrift

KIND: Literal["across"] = "across"
ACROSS_VERSION: Literal[1] = 1

Outcome = Literal["ran", "throttled", "void", "failed"]
Judgement = Literal["meets", "fails", "unjudged"]


class Source(Part):
    """One folder that was read, in the order given."""

    folder: str
    model: str
    parameters: int = Field(ge=0)
    fingerprint: str = Field(description="SHA-256 of the captured model.")
    evaluation: str = Field(description="SHA-256 of the samples that drift was judged on.")
    cpu: str = Field(description="The host that converted it.")
    command: str
    warnings: tuple[str, ...] = ()


class Place(Part):
    """What an artifact did at one place: on the host that converted it, or at an address."""

    where: str = Field(description='"host", or an address.')
    machine: str
    emulated: bool
    outcome: Outcome
    note: str = Field(default="", description="Why it failed, is void, or was not timed.")
    executor: str
    samples: int | None = Field(default=None, description="How many samples ran; null: all of the evaluation's.")
    drift: Stage | None = Field(default=None, description="Null where it did not run.")
    equal_to_host: float | None = Field(default=None, ge=0, le=1, description="Share of values equal to the host's.")
    latency: Latency | None = None
    instructions: Instructions | None = None
    energy_mj: FiniteFloat | None = None
    peak_rss_mib: FiniteFloat | None = None

    @property
    def here(self) -> bool:
        """Whether it is the host that converted, also where it was asked for by its address."""
        return self.where in ("host", "local")


class Entry(Part):
    """One artifact. `number` names it in tables and pictures."""

    number: int = Field(ge=1)
    folder: str
    model: str
    device: str
    target: str
    recipe: str
    artifact: str
    bytes: int = Field(ge=1)
    float_bytes: int = Field(ge=1)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    float_accuracy: float | None = Field(default=None, ge=0, le=1)
    fallbacks: int = Field(ge=0)
    judgement: Judgement
    reasons: tuple[str, ...] = Field(default=(), description="Why it fails, in words.")
    gates: tuple[GateResult, ...] = ()
    current: bool = Field(description="False where a folder given later has the same artifact, made again.")
    places: tuple[Place, ...] = Field(min_length=1, description="The host first, then every address.")
    worst_layers: tuple[LayerDrift, ...] = ()
    estimate: Estimate | None = Field(default=None, description="Of the latency on the device: decides nothing.")

    @property
    def name(self) -> str:
        """How words and pictures call it: "3 raspberry-pi-4b/tflite"."""
        return f"{self.number} {self.device}/{self.target}"

    @model_validator(mode="after")
    def _failure_has_a_reason(self) -> Self:
        if (self.judgement == "fails") != bool(self.reasons):
            raise ValueError("an artifact that fails says why, and only that one does")
        return self


class Choice(Part):
    """The best artifact of a model for a device, and by which rule; none when all fail."""

    model: str
    device: str
    entry: int | None = Field(description="The number of the entry.")
    rule: str


class HistoryPoint(Part):
    """One artifact in its history; null is what was not measured, or not at the place that its successors were."""

    entry: int
    folder: str
    recipe: str
    sqnr_db: FiniteFloat | None
    bytes: int
    p50_ms: FiniteFloat | None
    p50_stable: bool | None = Field(description="Null without a median.")
    instructions: int | None


class History(Part):
    """The same model for the same device and target, oldest first, in the order in which folders were given."""

    model: str
    device: str
    target: str
    p50_where: str | None = Field(description="Where the medians were taken.")
    instructions_where: str | None
    points: tuple[HistoryPoint, ...] = Field(min_length=2)
    worse: tuple[str, ...] = Field(default=(), description="What the last one does worse than the one before.")


class Across(Part):
    """Everything that several conversions measured, side by side."""

    kind: Literal["across"] = KIND
    schema_version: Literal[1] = ACROSS_VERSION
    command: str
    budget: str | None = Field(description="The budget file; null: the gates recorded in each report.")
    warnings: tuple[str, ...] = ()
    sources: tuple[Source, ...] = Field(min_length=1)
    entries: tuple[Entry, ...] = Field(min_length=1)
    choices: tuple[Choice, ...]
    histories: tuple[History, ...] = ()

    def entry(self, number: int) -> Entry:
        """The entry of that number."""
        return self.entries[number - 1]

    @property
    def current(self) -> tuple[Entry, ...]:
        """The entries without those that were made again later."""
        return tuple(entry for entry in self.entries if entry.current)

    @model_validator(mode="after")
    def _numbered(self) -> Self:
        if [e.number for e in self.entries] != list(range(1, len(self.entries) + 1)):
            raise ValueError("entries are numbered from 1")
        return self
