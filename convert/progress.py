"""How long work tells what it is doing; the command line shows it, a library caller may ignore it."""

from typing import Protocol


class Progress(Protocol):
    """`stage` opens a new piece of work; `advance` says how far it is, `total` None when nobody knows."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int | None = None, what: str = "") -> None: ...


class Silent:
    """Says nothing."""

    def stage(self, text: str) -> None:
        """Ignore it."""

    def advance(self, done: int, total: int | None = None, what: str = "") -> None:
        """Ignore it."""
