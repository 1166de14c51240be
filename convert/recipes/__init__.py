"""Recipes: ordered lists of steps in TOML files; a file's name is the recipe's name."""

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from convert.errors import TightfitError

FOLDER = Path(__file__).parent
AUTO = "auto"
KEYS = {"summary", "steps", "compute", "version"}


@dataclass(frozen=True)
class Recipe:
    """`steps` in order; `compute` is the format of what is not quantized, None for what the profile says."""

    name: str
    steps: tuple[str, ...]
    compute: str | None = None
    summary: str = ""


def names() -> list[str]:
    """The recipes that come with Tightfit, without `auto`."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def load(text: str) -> Recipe:
    """Read `NAME[+NAME...]` or the path of a TOML file. Joined recipes run their steps in turn, each once.

    Raises TightfitError for an unknown name, a bad file, or recipes that exclude each other.
    """
    parts = [_one(name.strip()) for name in text.split("+")]
    steps = tuple(dict.fromkeys(step for part in parts for step in part.steps))
    computes = {part.compute for part in parts if part.compute}
    if len(computes) > 1:
        raise TightfitError(f"recipe '{text}' asks for {' and '.join(sorted(computes))} at once; name one of them")
    quantizing = [s for s in steps if s.startswith("quantize_")]
    if len(quantizing) > 1:
        raise TightfitError(
            f"recipe '{text}' quantizes the same layers twice ({', '.join(quantizing)}); name one of them"
        )
    # Half weights come last: what a quantizing step left float is what they are for.
    ordered = tuple(sorted(steps, key=lambda s: s == "half_weights"))
    return Recipe(text, ordered, computes.pop() if computes else None, "; ".join(p.summary for p in parts if p.summary))


def _one(name: str) -> Recipe:
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.exists():
        close = get_close_matches(name, [*names(), AUTO], 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise TightfitError(f"there is no recipe '{name}': {hint}There are {AUTO}, {', '.join(names())}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TightfitError(f"the recipe file {path} is not valid TOML: {error}") from error
    return _checked(path, content)


def _checked(path: Path, content: dict[str, object]) -> Recipe:
    from calibrate import steps as known_steps

    unknown = sorted(set(content) - KEYS)
    if unknown:
        raise TightfitError(
            f"the recipe file {path} has an unknown key '{unknown[0]}'; known are {', '.join(sorted(KEYS))}"
        )
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise TightfitError(f"the recipe file {path} needs `steps`, a list of names as `tightfit steps` shows them")
    for step in steps:
        if step not in known_steps.names():
            close = get_close_matches(step, known_steps.names(), 1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known_steps.names())}"
            raise TightfitError(f"the recipe file {path} names a step '{step}' that does not exist; {hint}")
    compute = content.get("compute")
    if compute not in (None, "float16", "float32"):
        raise TightfitError(f'the recipe file {path} has compute = {compute!r}; it takes "float16" or "float32"')
    return Recipe(
        path.stem, tuple(steps), compute if isinstance(compute, str) else None, str(content.get("summary", ""))
    )
