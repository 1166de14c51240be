"""What there is, printed: devices, steps and recipes, targets, and what is installed. Readable in 80 columns."""

import ast
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from convert.console import out, print_json

if TYPE_CHECKING:
    from device_profiles import DeviceProfile

NETWORKS = ("cnn", "transformer", "other")
UNVERIFIED = "unverified:"


def show_devices(json: bool) -> None:
    """All devices, one line each."""
    from device_profiles import names, title

    if json:
        print_json([{"name": n, "title": title(n)} for n in names()])
        return
    table = _table()
    for name in names():
        table.add_row(f"[bold]{name}[/bold]", escape(title(name)))
    out.print(table)
    out.print("\n[dim]One in full: tightfit devices NAME. Your own: --device ./my-board.toml[/dim]")


def show_device(name: str, json: bool) -> None:
    """One device: what `auto` does on it, and its facts with their sources. Raises TightfitError."""
    from convert.errors import user_errors
    from device_profiles import load
    from targets import names

    with user_errors():
        profile = load(name)
    if json:
        content = profile.model_dump(mode="json")
        content["rules"] = {t: profile.rules(t).model_dump(mode="json") for t in names()}
        print_json(content)
        return
    out.print(f"[bold]{escape(profile.title)}[/bold]\n{escape(profile.summary)}\n")
    out.print("[bold]What auto picks[/bold], by target and kind of network")
    for target in sorted(names(), key=lambda t: t != profile.default_target):
        _print_choices(profile, target)
    _print_facts(profile)


def _print_choices(profile: "DeviceProfile", target: str) -> None:
    rules = profile.rules(target)
    default = ", the default" if target == profile.default_target else ""
    out.print(f"  {target} on {rules.runtime}{default}")
    table = _table()
    for sort in NETWORKS:
        recipe, why = getattr(rules.recipe, sort), getattr(rules.recipe_reason, sort)
        table.add_row(sort, f"[bold]{recipe}[/bold]", escape(why))
    out.print(Padding(table, (0, 0, 0, 4)))


def _print_facts(profile: "DeviceProfile") -> None:
    """Facts by table of the profile; a number leads to the source, a question mark says it is unverified."""
    sources: dict[str, int] = {}
    groups: dict[str, Table] = {}
    for field, value in _facts(profile):
        group, _, key = field.partition(".")
        source = profile.source(field) or ""
        number = sources.setdefault(source, len(sources) + 1)
        mark = "?" if source.startswith(UNVERIFIED) else ""
        table = groups.setdefault(group, _table())
        table.add_row(key, escape(value), f"[dim]\\[{number}{mark}][/dim]")
    for group, table in groups.items():
        out.print(f"\n[bold]{group}[/bold]")
        out.print(Padding(table, (0, 0, 0, 2)))
    if any(source.startswith(UNVERIFIED) for source in sources):
        out.print("\n[bold]sources[/bold] [dim](? marks what nobody has verified)[/dim]")
    else:
        out.print("\n[bold]sources[/bold]")
    listing = _table()
    for source, number in sources.items():
        listing.add_row(f"[dim]{number}[/dim]", f"[dim]{escape(source)}[/dim]")
    out.print(Padding(listing, (0, 0, 0, 2)))


def _facts(profile: "DeviceProfile") -> Iterator[tuple[str, str]]:
    """(dotted field, value as text) of every fact about the device itself; its rules are shown as choices."""
    values = profile.model_dump(mode="json")
    for field in profile.facts():
        if field.startswith("targets."):
            continue
        value: Any = values
        for part in field.split("."):
            value = value[part]
        if isinstance(value, bool):
            yield field, "yes" if value else "no"
        else:
            yield field, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_steps(json: bool) -> None:
    """Steps, and the recipes made of them."""
    from convert.recipes import FOLDER

    steps = {name: first_line("calibrate.steps", name) for name in _modules("calibrate.steps")}
    recipes = {p.stem: tomllib.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.toml"))}
    if json:
        print_json({"steps": steps, "recipes": recipes})
        return
    out.print("[bold]Recipes[/bold] (--recipe NAME, or NAME+NAME)")
    table = _table()
    auto = "one of these, picked by the device's profile and the kind of network; see tightfit devices NAME"
    table.add_row("[bold]auto[/bold]", auto)
    for name, recipe in recipes.items():
        tokens = [f"tokens by {recipe['tokens']['method']}"] if "tokens" in recipe else []
        made_of = f"[dim]{' → '.join([*tokens, *recipe['steps']])}[/dim]"
        table.add_row(f"[bold]{name}[/bold]", f"{escape(recipe['summary'])}\n{made_of}")
    out.print(Padding(table, (0, 0, 1, 2)))
    out.print("[bold]Steps[/bold]")
    table = _table()
    for name, text in steps.items():
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    out.print(Padding(table, (0, 0, 0, 2)))


def show_targets(json: bool) -> None:
    """Targets, and whether they can be used here."""
    from targets import find, names

    rows = [{"name": n, "summary": first_line("targets", n), "missing": find(n).missing()} for n in names()]
    if json:
        print_json(rows)
        return
    table = _table()
    for row in rows:
        missing = row["missing"]
        state = "[green]ready[/green]" if missing is None else f"[yellow]missing:[/yellow] {escape(str(missing))}"
        table.add_row(f"[bold]{row['name']}[/bold]", f"{escape(str(row['summary']))}\n{state}")
    out.print(table)


def show_doctor(json: bool) -> bool:
    """What is installed; True when everything the core needs is there."""
    from convert.doctor import diagnose

    found = diagnose()
    fine = all(f.state == "ok" for f in found if f.kind == "core")
    if json:
        print_json({"ok": fine, "findings": [f.model_dump(mode="json") for f in found]})
        return fine
    table = _table()
    colours = {"ok": "green", "missing": "yellow", "unsuitable": "red"}
    for f in found:
        # A command stays on a line of its own, to be copied.
        note = "\n".join(filter(None, (f"[dim]{escape(f.note)}[/dim]" if f.note else "", escape(f.command or ""))))
        table.add_row(f"[{colours[f.state]}]{f.state}[/{colours[f.state]}]", escape(f.name), f.version or "", note)
    out.print(table)
    return fine


def first_line(package: str, name: str) -> str:
    """The first line of a module's docstring, read from its file: nothing is imported."""
    path = _folder(package) / f"{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _modules(package: str) -> list[str]:
    return sorted(p.stem for p in _folder(package).glob("*.py") if not p.stem.startswith("_") and p.stem != "errors")


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _table() -> Table:
    """Columns two blanks apart, no lines, no header; the last column wraps under itself."""
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
