"""What one command was asked, and what its conversions share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrate.samples import CalibrationSet, InputSpec
from convert import output
from convert.capture import Captured
from convert.compress import Builder, Effort
from convert.embedding_stage import Embedded
from convert.gates import Budget
from convert.progress import Progress
from convert.pruning import Pruned, Pruner


@dataclass(frozen=True)
class Options:
    """Everything `tightfit convert` was asked; see its --help for the meaning."""

    model: str
    devices: tuple[str, ...]
    out: Path
    calibration: str | None = None
    evaluation: str | None = None
    labels: str | None = None
    targets: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # (device, target), instead of every device with every target
    recipe: str = "auto"
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    preprocessing: Path | None = None
    samples: int | None = None
    batch: int | None = None
    threads: int = 1
    seed: int = 0
    synthetic: bool = False
    python: Path | None = None
    search_path: Path | None = None  # where a module:function may be found besides PYTHONPATH
    force: bool = False
    name: str | None = None
    effort: Effort = "normal"
    budget_mib: float | None = None
    budget_ms: float | None = None
    keep: float | None = None  # mean share of tokens, for recipes that prune
    max_drop: float | None = None  # percent of the answers that may change, likewise
    budget: Budget = field(default_factory=Budget)
    on: tuple[str, ...] = ()  # addresses where artifacts run besides this machine
    quick: bool = False  # fewer timed calls there
    command: str = "tightfit convert"


@dataclass(frozen=True)
class Samples:
    """Calibration and evaluation samples, disjoint, and where the latter come from."""

    calibration: CalibrationSet
    evaluation: CalibrationSet
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What the conversions of one command share.

    `pruned`: the model with fewer tokens that one conversion works on, and `shelf` those that others may take over;
    `pruners`: what removes tokens, by method and its options. `embedded`: `captured` is the user's model with a head
    that makes bits of its embedding.
    """

    options: Options
    captured: Captured
    samples: Samples
    folder: Path
    twins: Path
    reference: output.Reference
    progress: Progress
    batch: int
    reference_samples: int
    builder: Builder
    pruned: Pruned | None = None
    embedded: Embedded | None = None
    shelf: dict[Any, tuple[Pruned, Builder]] = field(default_factory=dict)
    pruners: dict[str, Pruner] = field(default_factory=dict)

    @property
    def model(self) -> Captured:
        """What the steps work on: the captured model, with fewer tokens where the recipe removes some."""
        return self.pruned.captured if self.pruned else self.captured
