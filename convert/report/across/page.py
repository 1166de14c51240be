"""The report across conversions as one self-contained HTML page."""

from collections import Counter

from ..html import page as rendered
from ..runs import Instructions
from . import pictures
from .schema import Across, Entry, Place


def page(across: Across) -> str:
    """The page as text; everything that came from a user is escaped by the template."""
    return rendered(
        "across/across.html.j2",
        across=across,
        points=pictures,
        verdict=verdict(across),
        matrix=matrix(across),
        targets=list(dict.fromkeys(e.target for e in across.current)),
        best_place=best_place,
        shown_instructions=shown_instructions,
        shared_layers=shared_layers(across),
        several_models=len({s.model for s in across.sources}) > 1,
    )


def verdict(across: Across) -> tuple[str, str]:
    """("ok", "bad" or "none", one sentence): for how many devices there is an artifact that meets its gates."""
    if all(e.judgement == "unjudged" for e in across.current):
        return "none", "No gate was set: nothing was judged"
    wanted = "meets the budget" if across.budget else "passed every gate"
    several = len({e.model for e in across.current}) > 1
    places = dict.fromkeys((e.model, e.device) for e in across.current)
    good = {(e.model, e.device) for e in across.current if e.judgement == "meets"}
    missing = [f"{device} ({model})" if several else device for model, device in places if (model, device) not in good]
    if missing:
        return "bad", f"No artifact {wanted} for {', '.join(missing)}; {len(good)} of {len(places)} have one"
    fail = sum(e.judgement == "fails" for e in across.current)
    rest = f"; {fail} of {len(across.current)} artifacts fail" if fail else ""
    every = "There is" if len(places) == 1 else "For every model and device there is" if several else "Every device has"
    return "ok", f"{every} an artifact that {wanted}{rest}"


def matrix(across: Across) -> dict[tuple[str, str], dict[str, list[Entry]]]:
    """The current entries by (model, device), then by target."""
    rows: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for entry in across.current:
        rows.setdefault((entry.model, entry.device), {}).setdefault(entry.target, []).append(entry)
    return rows


def best_place(entry: Entry) -> Place | None:
    """Where an artifact was timed on a device, if anywhere: the first place with a time that is not void."""
    return next((p for p in entry.places if not p.here and p.latency and p.outcome != "void"), None)


def shown_instructions(entry: Entry) -> list[Instructions]:
    """An artifact's instructions as a table shows them: those on the emulated device itself, else all there are."""
    found = [p.instructions for p in entry.places if p.instructions]
    return [i for i in found if i.where == f"emulated:{entry.device}"] or found


def shared_layers(across: Across) -> list[tuple[str, str, int, int]]:
    """(model, layer, in how many artifacts it is among the worst, of how many): those in at least two, most first."""
    found = []
    for model in dict.fromkeys(e.model for e in across.current):
        own = [e for e in across.current if e.model == model and e.worst_layers]
        counts = Counter(layer.layer for e in own for layer in e.worst_layers)
        found += [(model, layer, count, len(own)) for layer, count in counts.most_common(5) if count > 1]
    return found
