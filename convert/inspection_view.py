"""An inspection as tables on a terminal."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from convert.report import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from convert.inspection import Fate, Inspection, Layer, Outlook

# More names than this say no more.
NAMES = 6
# Longer names of layers continue on the next line, after a dot: the table fits 80 columns.
NAME_WIDTH = 22


def render(inspection: "Inspection", console: "Console") -> None:
    """Print the totals, the layers that hold or multiply numbers, and the outlook on the device."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console.print(f"[bold]{escape(inspection.model)}[/bold] ({inspection.family}): {_totals(inspection)}")
    console.print(f"Inputs: {escape('; '.join(inspection.inputs))}")
    console.print(f"Operators: {', '.join(f'{n} {what}' for what, n in inspection.operators.items())}")
    if inspection.uncounted:
        console.print(f"MACs not counted of: {escape(_listed(inspection.uncounted))}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    _add_columns(table, inspection.outlook)
    fates = _fates(inspection.outlook)
    for layer in inspection.layers:
        if layer.parameters or layer.macs or layer.macs is None or layer.name in fates:
            table.add_row(*(escape(text) for text in _row(layer, inspection, fates)))
    console.print(table)
    lines = [] if inspection.findings is None else list(_diagnosis(inspection.findings))
    if inspection.outlook is not None:
        lines += _outlook(inspection, inspection.outlook)
    if lines:
        for line in lines:
            text = line.lstrip(" ")
            console.print(Padding(text, (0, 0, 0, len(line) - len(text))))


def _totals(inspection: "Inspection") -> str:
    size = f"{words.size(inspection.float_bytes)} of constants"
    return f"{inspection.parameters:,} parameters, {_count(inspection.macs)} MACs per sample, {size}"


def _count(number: float) -> str:
    """40551040 as "40.6 M"."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip() if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g} T"


def _add_columns(table: "Table", outlook: "Outlook | None") -> None:
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("output")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    if outlook is not None:
        table.add_column("plan")


def _fates(outlook: "Outlook | None") -> dict[str, list[str]]:
    """Layer -> what the plan does to it."""
    found: dict[str, list[str]] = defaultdict(list)
    for fate in outlook.fates if outlook is not None else ():
        found[fate.layer].append(fate.action)
    return found


def _row(layer: "Layer", inspection: "Inspection", fates: dict[str, list[str]]) -> list[str]:
    shape = "x".join(str(d) for d in layer.shape)
    macs = "?" if layer.macs is None else _count(layer.macs) if layer.macs else ""
    row = [_broken(layer.name), layer.kind, shape, f"{layer.parameters:,}" if layer.parameters else "", macs]
    if inspection.outlook is not None:
        row.append(", ".join(fates.get(layer.name, ())) or "float")
    return row


def _broken(name: str) -> str:
    """A layer's name in lines of at most `NAME_WIDTH` characters, where its dots and underscores allow."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]?", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > NAME_WIDTH:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _outlook(inspection: "Inspection", outlook: "Outlook") -> Iterator[str]:
    from rich.markup import escape

    yield f"\n[bold]{outlook.device}, {outlook.target}[/bold] on {outlook.runtime}: recipe {escape(outlook.recipe)}"
    yield f"  {escape(outlook.reason)}"
    share = f" ({100 * outlook.int8_macs / inspection.macs:.0f} %)" if inspection.macs else ""
    yield f"  MACs on int8 codes: {_count(outlook.int8_macs)}{share}; all else computes in {outlook.compute}"
    small, whole = words.size(outlook.estimated_bytes), words.size(inspection.float_bytes)
    yield f"  Artifact, estimated from its constants: {small}; as captured: {whole}"
    for limit in outlook.limits:
        colour = "red" if limit.verdict == "unsupported" else "yellow"
        yield f"  [{colour}]{limit.verdict}[/{colour}] {limit.kind}: {escape(limit.reason)}"
        yield f"    {escape(_listed(limit.layers))}"
    for reason, layers in _left(outlook).items():
        yield f"  [yellow]left float[/yellow]: {escape(reason)}"
        yield f"    {escape(_listed(tuple(layers)))}"
    for note in outlook.notes:
        yield f"  [dim]{escape(note)}[/dim]"


def _diagnosis(findings: "tuple[Fate, ...]") -> Iterator[str]:
    """What int8 would break, grouped by what helps."""
    from rich.markup import escape

    yield "\n[bold]Diagnosis[/bold] on calibration samples; auto does what it says"
    groups: dict[str, list[Fate]] = defaultdict(list)
    for finding in findings:
        groups[finding.action].append(finding)
    for action, members in groups.items():
        yield f"  [yellow]{escape(action)}[/yellow]"
        for finding in members[:NAMES]:
            yield f"    {escape(finding.layer)}: {escape(finding.reason)}"
        if len(members) > NAMES:
            yield f"    and {len(members) - NAMES} more"


def _left(outlook: "Outlook") -> dict[str, list[str]]:
    """Why layers stay float -> their names."""
    found: dict[str, list[str]] = defaultdict(list)
    for fate in outlook.fates:
        if fate.action.startswith("left") and fate.layer != "model":
            found[fate.reason].append(fate.layer)
    return found


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more
