"""What `tightfit report` prints: the best artifact for each device, and where to look."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ...console import out as terminal
from ...console import print_json
from .page import verdict
from .schema import Across

_COLOURS = {"ok": "green", "bad": "red", "none": "dim"}


def show(across: Across, folder: Path, json: bool) -> None:
    """A table of choices, what to beware of, what got worse, and where the page is; or all of it as JSON."""
    if json:
        print_json(across.model_dump(mode="json"))
        return
    terminal.print(_choices(across))
    for warning in across.warnings:
        terminal.print(f"[yellow]![/yellow] {escape(warning)}")
    for history in across.histories:
        if history.worse:
            text = f"{history.device}/{history.target}: {'; '.join(history.worse)}"
            terminal.print(f"[red]worse than before[/red] {escape(text)}")
    tone, sentence = verdict(across)
    terminal.print(f"[{_COLOURS[tone]}]{escape(sentence)}[/{_COLOURS[tone]}]")
    terminal.print(f"Look at [bold]{escape(str(folder / 'report.html'))}[/bold]")


def _choices(across: Across) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("device", "best", "because"):
        table.add_column(name, overflow="fold")
    for choice in across.choices:
        best = across.entry(choice.entry) if choice.entry else None
        name = (
            f"{escape(best.target)} {escape(best.recipe)}\n[dim]{escape(best.folder)}[/dim]"
            if best
            else "[red]none[/red]"
        )
        table.add_row(f"{escape(choice.device)}\n[dim]{escape(choice.model)}[/dim]", name, escape(choice.rule))
    return table
