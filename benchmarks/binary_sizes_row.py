"""A line of the table of `binary_sizes.py`."""

from dataclasses import dataclass

from convert.report.schema import Match

COLUMNS = ("model", "recipe", "format", "KiB", "float KiB", "ratio", "bits + scales KiB", "off by %", "resident KiB")
COLUMNS += ("float's", "equals simulation", "weights stored as")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


@dataclass(frozen=True)
class Row:
    """One artifact. `predicted`: bytes of codes, scales and what stays wide; `resident`: its and float's, None where
    no runtime here tells."""

    model: str
    recipe: str
    target: str
    bytes: int
    float_bytes: int
    predicted: float
    resident: tuple[int, int] | None
    match: Match
    stored: str

    @property
    def ratio(self) -> float:
        """How many times smaller than float32."""
        return self.float_bytes / self.bytes

    def __str__(self) -> str:
        sizes = f"{self.bytes / 1024:.1f} | {self.float_bytes / 1024:.1f} | {self.ratio:.1f}"
        sizes += f" | {self.predicted / 1024:.1f} | {100 * (self.bytes / self.predicted - 1):+.1f}"
        kept = "- | -" if self.resident is None else " | ".join(f"{r / 1024:.0f}" for r in self.resident)
        cells = (self.model, self.recipe, self.target, sizes, kept, _told(self.match), self.stored)
        return f"| {' | '.join(cells)} |"


def _told(match: Match) -> str:
    """How far the artifact is from its simulation."""
    if match.exact:
        return "exactly"
    verdict = "yes" if match.within_one_step else "NO"
    return f"{verdict}: {match.max_abs:.1e}, step {match.output_step:.1e}, {100 * match.share_equal:.0f} % equal"
