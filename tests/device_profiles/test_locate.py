"""The lines of fields in a TOML text."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.locate import FieldLines, syntax_error_line

TEXT = '''\
a = 1
b.c = "x"
[t]
text = """
d = 3
"""
list = [ # a comment ]
  1,

  2, 3,
]
[t.u]
inline = { x = 1, y = [ { z = 2 } ] }
[[many]]
k = 1
[[many]]
k = 2
'''


def test_fields_are_found_on_their_lines():
    lines = FieldLines(TEXT)
    where = {
        ("a",): 1, ("b", "c"): 2, ("t",): 3, ("t", "text"): 4, ("t", "list"): 7, ("t", "list", 0): 8,
        ("t", "list", 1): 10, ("t", "list", 2): 10, ("t", "u"): 12, ("t", "u", "inline", "x"): 13,
        ("t", "u", "inline", "y", 0, "z"): 13, ("many", 0, "k"): 15, ("many", 1, "k"): 17,
    }  # fmt: skip
    assert {path: lines.line(path) for path in where} == where


def test_keys_within_a_text_are_no_fields():
    assert FieldLines(TEXT).line(("t", "d")) == 3


def test_a_missing_field_is_on_the_line_of_its_table():
    assert FieldLines(TEXT).line(("t", "u", "none")) == 12
    assert FieldLines(TEXT).line(("none",)) == 1


def test_a_syntax_error_at_the_end_is_on_the_last_line():
    text = 'a = 1\nb = """'
    with pytest.raises(tomllib.TOMLDecodeError) as refused:
        tomllib.loads(text)
    assert syntax_error_line(refused.value, text) == 2


keys = st.text("abcdefgh-_", min_size=1, max_size=4)
values = st.one_of(st.integers(-9, 9).map(str), st.booleans().map(lambda b: str(b).lower()), st.just('"a # [b]"'))


@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=4), max_size=4), st.integers(0, 3))
def test_every_key_of_a_random_document_is_found_where_it_was_written(tables: dict[str, Any], blanks: int):
    written: dict[tuple[str, ...], int] = {}
    lines: list[str] = []
    for table, fields in tables.items():
        lines += ["# comment"] + [""] * blanks + [f"[{table}]"]
        written[(table,)] = len(lines)
        for key, value in fields.items():
            lines.append(f"{key} = {value}")
            written[(table, key)] = len(lines)
    found = FieldLines("\n".join(lines))
    assert {path: found.line(path) for path in written} == written
