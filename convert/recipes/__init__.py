"""Recipes: ordered lists of steps in TOML files; a file's name is the recipe's name."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from calibrate.plan import WeightFormat
from convert.errors import TightfitError

FOLDER = Path(__file__).parent
AUTO = "auto"
KEYS = {
    *("summary", "steps", "compute", "version", "weight", "activation_bits", "ends_bits", "parameters", "search"),
    *("tokens", "tables_group"),
}
TOKEN_KEYS = {"method", "keep", "options"}
WEIGHT_KEYS = {"bits", "group", "kind", "power_of_two"}
# Stands for the quantizing step that the device's profile picks by the kind of network.
QUANTIZE = "quantize"
EIGHT_BITS = WeightFormat()


@dataclass(frozen=True)
class Tokens:
    """How tokens are cut out of a transformer before anything else: a method of `calibrate/tokens/methods`, the mean
    share of tokens that is kept over the blocks, and the method's options."""

    method: str
    keep: float = 0.7
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """`steps` in order; `compute` is the format of what is not quantized, None for what the profile says.

    `weight`: the format of weights. `activation_bits`: 8, or 16 where the runtime has such kernels. `ends_bits`: the
    bits of the first and the last layer with weights, None for those of all. `tables_group`: the group of embedding
    tables whose width it divides, None for that of all. `parameters`: what steps are told. Runs of
    one step are told apart by words after a colon (`finetune:signs`), there and in `steps`. `search`: "mixed", layers
    get formats of their own under a budget. `tokens`: what is cut out before the steps.
    """

    name: str
    steps: tuple[str, ...]
    compute: str | None = None
    summary: str = ""
    weight: WeightFormat = EIGHT_BITS
    activation_bits: int = 8
    ends_bits: int | None = None
    parameters: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    search: str | None = None
    tokens: Tokens | None = None
    tables_group: int | None = None


def names() -> list[str]:
    """The recipes that come with Tightfit, without `auto`."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def load(text: str) -> Recipe:
    """Read `NAME[+NAME...]` or the path of a TOML file. Joined recipes run their steps in turn, those they share once.

    Raises TightfitError for an unknown name, a bad file, or recipes that exclude each other.
    """
    parts = [_one(name.strip()) for name in text.split("+")]
    steps = tuple(dict.fromkeys(step for part in parts for step in part.steps))
    computes = {part.compute for part in parts if part.compute}
    if len(computes) > 1:
        raise TightfitError(f"recipe '{text}' asks for {' and '.join(sorted(computes))} at once; name one of them")
    quantizing = [s for s in steps if quantizes(s)]
    if len(quantizing) > 1:
        own = [part.name for part in parts if QUANTIZE in part.steps]
        way = f"{own[0]} already quantizes as the device's profile picks: name it alone" if own else "name one of them"
        raise TightfitError(f"recipe '{text}' quantizes the same layers twice ({', '.join(quantizing)}); {way}")
    formats = {part.weight for part in parts if part.weight != WeightFormat()}
    if len(formats) > 1:
        raise TightfitError(f"recipe '{text}' asks for weights in two formats at once; name one of them")
    binarizing = [part.name for part in parts if "binarize" in part.steps]
    if len(binarizing) > 1:
        raise TightfitError(
            f"recipe '{text}' binarizes the same layers twice ({', '.join(binarizing)}); name one of them"
        )
    pruning = [part.name for part in parts if part.tokens]
    if len(pruning) > 1:
        raise TightfitError(f"recipe '{text}' removes tokens twice ({', '.join(pruning)}); name one of them")
    # Half weights come last: what a quantizing step left float is what they are for.
    ordered = tuple(sorted(steps, key=lambda s: s == "half_weights"))
    return Recipe(
        text,
        ordered,
        computes.pop() if computes else None,
        "; ".join(p.summary for p in parts if p.summary),
        formats.pop() if formats else WeightFormat(),
        max(part.activation_bits for part in parts),
        next((part.ends_bits for part in parts if part.ends_bits), None),
        {step: values for part in parts for step, values in part.parameters.items()},
        next((part.search for part in parts if part.search), None),
        next((part.tokens for part in parts if part.tokens), None),
        next((part.tables_group for part in parts if part.tables_group), None),
    )


def automatic(text: str) -> bool:
    """Whether a recipe's name leaves the quantizing to Tightfit: `auto`, alone or joined with one that prunes."""
    return AUTO in (part.strip() for part in text.split("+"))


def resolved(text: str, chosen: str) -> str:
    """The recipe's name with `auto` replaced by what was chosen."""
    return "+".join(chosen if part.strip() == AUTO else part.strip() for part in text.split("+"))


def quantizes(step: str) -> bool:
    """Whether a step turns float weights into codes: `quantize_*`, `palettize`, and the stand-in `quantize`."""
    return step.startswith("quantize") or step == "palettize"


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
        if step != QUANTIZE and known_steps.bare(step) not in known_steps.names():
            close = get_close_matches(step, known_steps.names(), 1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known_steps.names())}"
            raise TightfitError(f"the recipe file {path} names a step '{step}' that does not exist; {hint}")
    _refuse_repeated(path, steps)
    compute = content.get("compute")
    if compute not in (None, "float16", "float32"):
        raise TightfitError(f'the recipe file {path} has compute = {compute!r}; it takes "float16" or "float32"')
    return Recipe(
        path.stem,
        tuple(steps),
        compute if isinstance(compute, str) else None,
        str(content.get("summary", "")),
        _weight(path, content.get("weight", {})),
        _one_of(path, "activation_bits", content.get("activation_bits", 8), (8, 16)),
        _one_of(path, "ends_bits", content["ends_bits"], (8, 4)) if "ends_bits" in content else None,
        _parameters(path, content.get("parameters", {}), tuple(steps)),
        _one_of(path, "search", content["search"], ("mixed",)) if "search" in content else None,
        _tokens(path, content["tokens"]) if "tokens" in content else None,
        _one_of(path, "tables_group", content["tables_group"], (32, 64, 128)) if "tables_group" in content else None,
    )


def _refuse_repeated(path: Path, steps: list[str]) -> None:
    """Raise TightfitError for a step named twice, and for a step with words after a colon that runs but once."""
    from calibrate import steps as known_steps

    twice = next((s for s in steps if steps.count(s) > 1), None)
    if twice is not None:
        raise TightfitError(
            f"the recipe file {path} names the step {twice} twice: name it once, or, where it is finetune, tell the "
            "runs apart by words after a colon, such as finetune:signs, each with its own [parameters]"
        )
    for step in steps:
        name = known_steps.bare(step)
        if step != name and (step == f"{name}:" or not known_steps.repeats(name)):
            raise TightfitError(
                f"the recipe file {path} names a step '{step}': words after a colon tell runs of one step apart, and "
                f"are for steps that may run several times, such as finetune:signs; write {name}"
            )


def _one_of(path: Path, key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed or isinstance(value, bool):
        raise TightfitError(f"the recipe file {path} has {key} = {value!r}; it takes {' or '.join(map(repr, allowed))}")
    return value


def _weight(path: Path, table: Any) -> WeightFormat:
    """The table [weight]; what it holds decides together what is allowed."""
    if not isinstance(table, dict) or set(table) - WEIGHT_KEYS:
        raise TightfitError(f"[weight] in the recipe file {path} takes {', '.join(sorted(WEIGHT_KEYS))}")
    kind = _one_of(path, "weight.kind", table.get("kind", "int"), ("int", "palette", "float8_e4m3", "float8_e5m2"))
    bits = {"int": (2, 4, 8), "palette": (1, 2, 3, 4, 6, 8)}.get(kind, (8,))
    group = table.get("group")
    if group is not None and (kind != "int" or not isinstance(group, int) or group < 16 or group & (group - 1)):
        raise TightfitError(
            f"the recipe file {path} has weight.group = {group!r}; it takes a power of two from 16, with kind 'int'"
        )
    return WeightFormat(
        _one_of(path, "weight.bits", table.get("bits", 8), bits),
        group,
        kind,
        kind == "int" and bool(table.get("power_of_two", False)),
    )


def _tokens(path: Path, table: Any) -> Tokens:
    """The table [tokens]."""
    from calibrate.tokens import methods

    if not isinstance(table, dict) or set(table) - TOKEN_KEYS or "method" not in table:
        raise TightfitError(f"[tokens] in the recipe file {path} takes {', '.join(sorted(TOKEN_KEYS))}, method always")
    method = _one_of(path, "tokens.method", table["method"], tuple(methods.names()))
    keep = table.get("keep", Tokens.keep)
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise TightfitError(f"the recipe file {path} has tokens.keep = {keep!r}; it takes a share between 0 and 1")
    known = getattr(methods.find(method), "defaults", {})
    options = table.get("options", {})
    if not isinstance(options, dict):
        raise TightfitError(f"the recipe file {path} has tokens.options = {options!r}; it takes a table")
    for key in options:
        if key not in known:
            there = ", ".join(sorted(known)) or "none"
            raise TightfitError(f"the token method {method} has no option '{key}' (recipe file {path}); it has {there}")
    return Tokens(method, keep, dict(options))


def _parameters(path: Path, tables: Any, steps: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """The tables [parameters.STEP], each key one that the step has."""
    from calibrate import steps as known_steps

    if not isinstance(tables, dict):
        raise TightfitError(f"`parameters` in the recipe file {path} holds one table for each step")
    for step, values in tables.items():
        if step not in steps:
            raise TightfitError(f"the recipe file {path} sets parameters of '{step}', which is not among its steps")
        if not isinstance(values, dict):
            raise TightfitError(f"the recipe file {path} has parameters.{step} = {values!r}; it takes a table")
        known = known_steps.defaults(step)
        for key in values:
            if key not in known:
                there = ", ".join(known) or "none"
                raise TightfitError(f"the step {step} has no parameter '{key}' (recipe file {path}); it has {there}")
    return {step: dict(values) for step, values in tables.items()}
