"""What every Markdown view needs: foreign text made plain, and a length that a comment can hold."""

import re

COMMENT_LIMIT = 65_536  # characters GitHub accepts in one comment
MOST_ROWS = 40
_LONGEST_TEXT = 300
_ESCAPED = re.compile(r"([\\`*_\[\]|~#])")


def rest(count: int) -> list[str]:
    """The line that stands for the rows beyond MOST_ROWS; none when there are none."""
    return [f"\n…and {count - MOST_ROWS} more: see report.json"] if count > MOST_ROWS else []


def fitting(lines: list[str]) -> str:
    """The lines, as many as fit, and a word about those that do not."""
    note = "\n…the rest did not fit: see report.json\n"
    text = "\n".join(lines) + "\n"
    if len(text) < COMMENT_LIMIT:
        return text
    kept, length = [], len(note)
    for line in lines:
        length += len(line) + 1
        if length >= COMMENT_LIMIT:
            break
        kept.append(line)
    return "\n".join(kept) + note


def plain(text: str) -> str:
    """Foreign text as plain text: one line, no markup, no mention of anybody, not endless."""
    line = " ".join(text.split())
    if len(line) > _LONGEST_TEXT:
        line = line[: _LONGEST_TEXT - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return _ESCAPED.sub(r"\\\1", line)
