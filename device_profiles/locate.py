"""Where in a TOML text a field stands, so that an error can name its line."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

Path = tuple[str | int, ...]


class FieldLines:
    """The line of every field of a TOML document that parses; items of a list are fields numbered from 0."""

    def __init__(self, text: str) -> None:
        self._first: dict[Path, int] = {}
        for path, line in _statements(text.splitlines()):
            self._first.setdefault(path, line)

    def line(self, path: Sequence[str | int]) -> int:
        """The line, counted from 1, of the field at `path`, else of the nearest table around it, else 1."""
        for end in range(len(path), 0, -1):
            found = self._first.get(tuple(path[:end]))
            if found is not None:
                return found
        return 1


def syntax_error_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    """The line, counted from 1, that a TOML syntax error is on."""
    found = re.search(r"at line (\d+)", str(error))
    return int(found.group(1)) if found else max(1, len(text.splitlines()))


def _statements(lines: list[str]) -> Iterator[tuple[Path, int]]:
    """Every path that a statement of the document writes, with its line."""
    table: Path = ()
    tables_seen: dict[Path, int] = {}
    start = 0
    while start < len(lines):
        first = lines[start].lstrip()
        if not first or first.startswith("#"):
            start += 1
            continue
        end, value = _statement(lines, start)
        if first.startswith("["):
            table = tuple(key for key in _deepest(value))
            if first.startswith("[["):
                number = tables_seen[table] = tables_seen.get(table, -1) + 1
                table = (*table, number)
            yield from ((table[:n], start + 1) for n in range(1, len(table) + 1))
        else:
            for path, inner in _paths(value):
                yield table + path, start + 1
                if isinstance(inner, list):
                    yield from (((*table, *path, i), line) for i, line in _items(lines[start:end], path, start))
        start = end


def _statement(lines: list[str], start: int) -> tuple[int, dict[str, Any]]:
    """The end (exclusive) and the value of the statement at a line: the shortest text that parses."""
    for end in range(start + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("\n".join(lines[start:end]))
        except tomllib.TOMLDecodeError:
            continue
    raise ValueError(f"line {start + 1} starts no TOML statement")


def _paths(value: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths and values of all keys in a table, tables and values alike."""
    for key, inner in value.items():
        yield (*above, key), inner
        if isinstance(inner, dict):
            yield from _paths(inner, (*above, key))


def _deepest(header: dict[str, Any]) -> Iterator[str]:
    """The keys of a table header, outermost first: {"a": {"b": {}}} or {"a": {"b": [{}]}} gives a, b."""
    while header:
        key, inner = next(iter(header.items()))
        yield key
        header = inner[-1] if isinstance(inner, list) else inner


def _items(lines: list[str], path: tuple[str, ...], start: int) -> Iterator[tuple[int, int]]:
    """The numbers and lines of a list's items: one is complete on the first line where the list can close."""
    seen = 0
    for end in range(1, len(lines) + 1):
        text = "\n".join(lines[:end])
        try:
            value: Any = tomllib.loads(text if end == len(lines) else text + "\n]")
        except tomllib.TOMLDecodeError:
            continue
        for key in path:
            value = value[key]
        while seen < len(value):
            yield seen, start + end
            seen += 1
