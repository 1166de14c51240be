"""What is asked of the agent on a device, and what comes back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Batch


@dataclass(frozen=True)
class Timing:
    """How to time: each artifact at least `min_runs` calls and `min_seconds`, in turns; see `targets/agent/timing.py`.

    `sustained_minutes` > 0 goes on that long, for heat. `affinity` "big" binds to the fastest cores where that can be.
    """

    min_runs: int = 1024
    min_seconds: float = 2.0
    warmup_seconds: float = 0.5
    sustained_minutes: float = 0.0
    affinity: str | None = "big"


@dataclass(frozen=True)
class Errand:
    """One artifact and, where there is one, its float twin, to be run on `inputs` [n, ...] in slices of `batch`.

    `timing` None: not timed. `count` > 0: so many inferences of each are counted, where the transport can.
    """

    artifact: Path
    twin: Path | None
    inputs: Batch
    batch: int
    threads: int = 1
    timing: Timing | None = None
    count: int = 0
    seconds: float = 3600.0


@dataclass(frozen=True)
class FileAnswer:
    """What one file did there. Times in milliseconds; `blocks` are the timed calls in seconds, one array a round.

    `counts`: instructions of each counted inference, by class, as INSTRUCTIONS has them.
    """

    executor: str
    outputs: Batch
    load_ms: float
    first_ms: float
    blocks: list[NDArray[np.float64]] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """All that came back. `twin` is None where none was sent. `board`: as the report's `BoardState`.

    `facts`: system, kernel, python, packages of the device. `void`: why the times do not count, else None.
    `others`: the share of its cores' time that other processes took while it was timed, where that is known.
    """

    artifact: FileAnswer
    twin: FileAnswer | None
    facts: dict[str, str]
    board: list[dict[str, Any]] = field(default_factory=list)
    sustained: list[dict[str, Any]] = field(default_factory=list)
    peak_rss_mib: float | None = None
    energy_mj: float | None = None
    void: str | None = None
    others: float | None = None
    warnings: tuple[str, ...] = ()
