"""Writes the tables of the documentation that come from the code, between their markers.

    python docs/tables.py

In a page, `<!-- table: NAME -->` starts such a table and `<!-- end -->` ends it; tests/test_docs.py holds the pages to
what this script would write.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from convert import recipes
from convert.gates import GATES
from device_profiles import load, names

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "recipes.md")
TABLE = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def device_choices() -> Iterator[tuple[str, ...]]:
    """What auto picks on each device's own target, devices of one choice and one reason together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names():
        profile = load(name)
        rules = profile.rules(profile.default_target)
        choice = (
            f"{profile.default_target} ({rules.runtime})",
            rules.recipe.cnn,
            rules.recipe.transformer,
            rules.recipe_reason.cnn,
        )
        groups.setdefault(choice, []).append(f"`{name}`")
    yield "device", "format (runtime)", "CNN", "transformer", "why, for a CNN"
    for (target, cnn, transformer, why), devices in groups.items():
        yield ", ".join(devices), target, cnn, transformer, why


def transformer_reasons() -> Iterator[tuple[str, ...]]:
    """Why a transformer gets its recipe, by device's own target."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names():
        profile = load(name)
        rules = profile.rules(profile.default_target)
        groups.setdefault((rules.recipe.transformer, rules.recipe_reason.transformer), []).append(f"`{name}`")
    yield "transformers on", "get", "because"
    for (recipe, why), devices in groups.items():
        yield ", ".join(devices), recipe, why


def recipe_steps() -> Iterator[tuple[str, ...]]:
    """The recipes that come with Tightfit."""
    yield "recipe", "what comes out", "steps"
    for name in recipes.names():
        recipe = recipes.load(name)
        steps = [f"`{step}`" for step in recipe.steps]
        if recipe.tokens:
            steps.insert(0, f"tokens by `{recipe.tokens.method}`")
        yield f"`{name}`", recipe.summary, ", ".join(steps)


def gate_names() -> Iterator[tuple[str, ...]]:
    """The gates of a budget."""
    yield "gate", "limits"
    for gate in GATES.values():
        yield f"`{gate.name}`", gate.metric


TABLES = {
    "devices": device_choices,
    "transformers": transformer_reasons,
    "recipes": recipe_steps,
    "gates": gate_names,
}


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], f"|{'---|' * columns}", *lines[1:]]) + "\n"


def renewed(page: str) -> str:
    """The page with every marked table as the code has it now."""
    return TABLE.sub(lambda found: found[1] + markdown(TABLES[found["name"]]()) + found[3], page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
