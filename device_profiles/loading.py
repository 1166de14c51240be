"""From a TOML file to a checked profile; every complaint names file, line and field."""

import functools
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .errors import ProfileError
from .locate import FieldLines, syntax_error_line
from .overlay import merged, nearest
from .schema import DeviceProfile, TargetRules, leaves, source_of

_DEFAULTS = Path(__file__).parent / "defaults"
_Model = TypeVar("_Model", bound=BaseModel)
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


class _Document:
    """A TOML file, parsed, that can say where a field stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ProfileError(f"there is no profile file {path}; check the path.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path} cannot be read as a UTF-8 text file: {error}") from error
        try:
            self.data: dict[str, Any] = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            line = syntax_error_line(error, self.text)
            raise ProfileError(f"{path.name}, line {line}: not valid TOML: {error}") from error

    def error(self, field: tuple[str | int, ...], problem: str) -> ProfileError:
        line = FieldLines(self.text).line(field)
        return ProfileError(f"{self.path.name}, line {line}, {_dotted(field)}: {problem}")


def read_profile(path: Path) -> DeviceProfile:
    """The profile in a TOML file; raises ProfileError with file, line and field of what is wrong with it."""
    document = _Document(path)
    profile = _validated(DeviceProfile, document.data, document)
    if profile.default_target not in default_targets():
        hint = nearest(profile.default_target, default_targets())
        raise document.error(("default_target",), f"there is no target '{profile.default_target}'; {hint}")
    for target, differences in profile.targets.items():
        if target not in default_targets():
            hint = nearest(target, default_targets())
            raise document.error(("targets", target), f"there is no target '{target}'; {hint}")
        if "target" in differences:
            raise document.error(("targets", target, "target"), "the table says it; remove this field.")
        complete = merged(default_rules(target), differences)
        _validated(TargetRules, complete, document, ("targets", target))
    _check_sources(list(profile.facts()), profile.sources, document)
    return profile


@functools.cache
def default_targets() -> tuple[str, ...]:
    """The targets that have generic rules, sorted."""
    return tuple(sorted(path.stem for path in _DEFAULTS.glob("*.toml")))


@functools.cache
def default_rules(target: str) -> Mapping[str, Any]:
    """The generic rules of a target as plain data: all of them, each with a source, checked."""
    document = _Document(_DEFAULTS / f"{target}.toml")
    rules, sources = {"target": target, **document.data["rules"]}, document.data["sources"]
    _validated(TargetRules, rules, document, ("rules",))
    _check_sources(list(leaves(document.data["rules"], "rules")), sources, document)
    return rules


def _check_sources(facts: list[str], sources: Mapping[str, str], document: _Document) -> None:
    """Every fact has a source, and every source a fact: else one of the two has been forgotten."""
    for fact in facts:
        if source_of(fact, sources) is None:
            raise document.error(
                tuple(fact.split(".")),
                f'no source; add "{fact}" (or a prefix of it) to [sources], '
                'with a public source or "unverified: " and the reason.',
            )
    for entry in sources:
        if not any(fact == entry or fact.startswith(f"{entry}.") for fact in facts):
            raise document.error(("sources", entry), "this file states no such fact; remove its source.")


def _validated(
    model: type[_Model], data: Mapping[str, Any], document: _Document, prefix: tuple[str, ...] = ()
) -> _Model:
    """`data` as `model`; the first complaint becomes a ProfileError, further ones are counted."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A misspelt key explains why another one is missing, so it is told first.
        first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
        more = f" ({len(details) - 1} more after this one)" if len(details) > 1 else ""
        field = (*prefix, *(part for part in first["loc"] if part != "[key]"))
        raise document.error(field, _problem(first, model) + more) from error


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """A pydantic complaint in our words."""
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        *parents, key = detail["loc"]
        return f"unknown field '{key}'; {nearest(str(key), _fields(model, parents))}"
    if kind == "missing":
        return "this field is required."
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"expected one of {', '.join(allowed)}, got {value!r}; {nearest(str(value), allowed)}"
    if kind == "string_type" and detail["loc"][:1] == ("sources",) and isinstance(value, dict):
        return 'expected a text; quote a dotted field: "cpu.features" = "..."'
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {value!r}."
    return f"{detail['msg']}, got {value!r}."


def _fields(model: type[BaseModel], parents: list[str | int]) -> list[str]:
    """The known fields of the table at `parents` below `model`."""
    for parent in parents:
        if isinstance(parent, str) and parent in model.model_fields:
            inner = next(_models(model.model_fields[parent].annotation), None)
            if inner is not None:
                model = inner
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models within an annotation such as `Cpu`, `Cpu | None` or `tuple[Limit, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _dotted(field: tuple[str | int, ...]) -> str:
    """("a", "b", 0, "c") as "a.b[0].c"."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in field)
    return parts.lstrip(".")
