"""The recipe `mixed`: each layer its own format, chosen under a budget of bytes or of measured milliseconds.

Scores of single layers (`convert/mixed_table.py`) mislead, so several plans are built whole and judged by the
simulation; the best of those counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from calibrate.plan import Entry
from convert import recipes
from convert.compress import Builder, Compressed
from convert.errors import TightfitError
from convert.mixed_table import CHOSEN, EIGHT, FLOAT, LEVELS, Table, build_table, form_of, solve
from convert.planning import Decision, keeping_float, with_formats, with_levels

MIB = 2**20
TOLD = {FLOAT: "float", "sign": "1 bit", "planes": "two planes"}
# Plans between the smallest and the largest that are built and judged when no budget is given.
SWEEP = 6
# How often a plan is measured and its budget of estimated time corrected.
ROUNDS = 4


@dataclass(frozen=True)
class Budgets:
    """What the artifact may take: bytes on disk, milliseconds at the median as measured here; None: no limit."""

    mib: float | None = None
    ms: float | None = None

    def said(self, mib: str, ms: str) -> str:
        """The limits that there are, in these words: {} is the number."""
        found = [(mib, self.mib), (ms, self.ms)]
        return " and ".join(text.format(f"{value:g}") for text, value in found if value is not None)


@dataclass(frozen=True)
class Trial:
    """What one plan's artifact was measured to take: bytes on disk, and milliseconds at the median where asked for."""

    bytes: int
    ms: float | None


# Lowers a plan; the flag asks for its time too.
Try = Callable[[Compressed, bool], Trial]


def search(
    builder: Builder, decision: Decision, budgets: Budgets, goal_db: float, trial: Try | None = None
) -> Compressed:
    """The plan with the least drift inside the budgets; without any, the smallest that holds `goal_db`.

    `trial` lowers and measures a plan; a budget needs it. Raises TightfitError where no plan fits.
    """
    table = build_table(builder, decision)
    if budgets == Budgets():
        return _smallest(builder, decision, table, goal_db)
    assert trial is not None
    return _within(builder, decision, table, budgets, trial)


def _built(builder: Builder, decision: Decision, table: Table, choice: np.ndarray) -> tuple[float, Compressed]:
    """The whole plan of a choice, and its simulated SQNR in dB."""
    floats, formats, levels = {}, {}, {}
    labels = {}
    for row, (layer, column) in enumerate(zip(table.layers, choice, strict=True)):
        allowed = np.isfinite(table.bytes[row, column])
        option = labels[layer] = table.options[column] if allowed else EIGHT  # a uniform plan of few levels has some
        if option == FLOAT:
            floats[layer] = CHOSEN
        elif option in LEVELS:
            levels[layer] = option
        else:
            formats[layer] = form_of(decision, option)
            labels[layer] = formats[layer].label.split(",")[0]
    made = builder.build(with_levels(with_formats(keeping_float(decision, floats), formats), levels))
    score = builder.score(made)
    entries = tuple(
        Entry("mixed", layer, labels[layer], f"alone it costs {table.scores[r, c]:+.2g} of output loss against 8 bits")
        for r, (layer, c) in enumerate(zip(table.layers, choice, strict=True))
    )
    return score, replace(made, ledger=(*made.ledger, *entries))


def _tally(table: Table, choice: np.ndarray) -> str:
    counts = [(name, int((choice == i).sum())) for i, name in enumerate(table.options)]
    return ", ".join(f"{n} layers in {TOLD.get(o, f'{o} bits')}" for o, n in counts if n)


def _within(builder: Builder, decision: Decision, table: Table, budgets: Budgets, trial: Try) -> Compressed:
    """Solve with estimates, lower and measure the plan, correct the estimates by what was measured, and again.

    Estimated are the bytes beside weights, and each layer's milliseconds: a uniform plan's, shared out by
    multiply-accumulates. What decides is the file and the time of each whole plan.
    """
    room = np.inf if budgets.mib is None else budgets.mib * MIB - table.fixed_bytes
    if table.bytes.min(1).sum() > room:
        raise TightfitError(_too_small(table, budgets))
    times, span = None, np.inf
    if budgets.ms is not None:
        times, span = _times(builder, decision, table, trial), budgets.ms
    best: tuple[float, Compressed] | None = None
    tried: set[tuple[int, ...]] = set()
    measured: list[Trial] = []
    for count in range(ROUNDS):
        limits = [(table.bytes, room)] * (budgets.mib is not None) + ([] if times is None else [(times, span)])
        found = _best(builder, decision, table, limits)
        if found is None or tuple(found[2]) in tried:
            break
        score, made, choice = found
        tried.add(tuple(choice))
        measured.append(took := trial(made, times is not None))
        builder.progress("measure plans", count + 1)
        over = took.bytes - (np.inf if budgets.mib is None else budgets.mib * MIB)
        late = 0.0 if budgets.ms is None or took.ms is None else took.ms / budgets.ms
        if over <= 0 and late <= 1:
            if best is None or score > best[0]:
                best = score, replace(made, notes=(_note(table, budgets, choice, took, score),))
            if times is None:
                break
        rows = np.arange(len(choice))
        if over > 0:
            room = table.bytes[rows, choice].sum() - over
        if times is not None and late:  # both ways: a plan with time to spare may have wider layers
            span = times[rows, choice].sum() * 0.98 / late
    if best is None:
        raise TightfitError(_none_fits(budgets, measured))
    return best[1]


def _note(table: Table, budgets: Budgets, choice: np.ndarray, took: Trial, score: float) -> str:
    found = f"{took.bytes / MIB:.3g} MiB" + ("" if took.ms is None else f" and {took.ms:.3g} ms")
    within = budgets.said("{} MiB", "{} ms")
    return (
        f"Mixed precision within {within}: {_tally(table, choice)}; {found} measured here, {score:.1f} dB on "
        "calibration samples."
    )


def _too_small(table: Table, budgets: Budgets) -> str:
    least = table.bytes.min(1).sum()
    return (
        f"no plan fits --budget-mib {budgets.mib:g}: the smallest weights of these formats take {least / MIB:.3g} MiB, "
        f"and what is not quantized another {table.fixed_bytes / MIB:.3g} MiB. Give at least "
        f"{(least + table.fixed_bytes) / MIB * 1.05:.3g}."
    )


def _none_fits(budgets: Budgets, measured: list[Trial]) -> str:
    """Why no plan was taken, by what the plans tried were measured to be."""
    asked = budgets.said("--budget-mib {}", "--budget-ms {}")
    least = [f"the smallest file {min(m.bytes for m in measured) / MIB:.3g} MiB"] if measured else []
    times = [m.ms for m in measured if m.ms is not None]
    least += [f"the fastest {min(times):.3g} ms"] if times else []
    told = f" Of the plans that were measured, {' and '.join(least)}." if least else ""
    return f"no plan was measured within {asked}.{told} Give a larger budget, or a smaller model."


def _best(
    builder: Builder, decision: Decision, table: Table, limits: list[tuple[np.ndarray, float]]
) -> tuple[float, Compressed, np.ndarray] | None:
    """Of the programme's two best plans and the best uniform one that fits, the one whose simulation is closest."""
    tried: list[np.ndarray] = []
    for _ in range(2):
        choice = solve(table, limits, tried)
        if choice is not None:
            tried.append(choice)
    for column in reversed(range(len(table.options))):
        uniform = np.full(len(table.layers), column)
        if all(costs_[:, column].sum() <= limit for costs_, limit in limits):
            if not any((uniform == t).all() for t in tried):
                tried.append(uniform)
            break
    found = [(*_built(builder, decision, table, choice), choice) for choice in tried]
    return max(found, key=lambda f: f[0], default=None)


def _times(builder: Builder, decision: Decision, table: Table, trial: Try) -> np.ndarray:
    """Estimated milliseconds of each layer in each option: the measured time of all layers in it, shared out by
    multiply-accumulates."""
    whole = []
    for column in range(len(table.options)):
        _, made = _built(builder, decision, table, np.full(len(table.layers), column))
        took = trial(made, True).ms
        assert took is not None
        whole.append(took)
        builder.progress("measure formats", column + 1, len(table.options))
    return np.outer(table.macs / max(table.macs.sum(), 1.0), np.array(whole))


def _smallest(builder: Builder, decision: Decision, table: Table, goal_db: float) -> Compressed:
    """Sweep from the smallest plan up, each judged whole, and take the first that holds the goal."""
    totals, eight = table.bytes.sum(0), table.options.index(EIGHT)
    limits = [*np.geomspace(table.bytes.min(1).sum(), totals[eight], SWEEP), *totals[eight + 1 :]]
    best = None
    for count, limit in enumerate(limits):
        choice = solve(table, [(table.bytes, float(limit) * 1.0001)])
        assert choice is not None
        score, made = _built(builder, decision, table, choice)
        builder.progress("mixed", count + 1)
        note = (
            f"Mixed precision, as small as {goal_db:.0f} dB allows: {_tally(table, choice)}; {score:.1f} dB on "
            "calibration samples."
        )
        best = replace(made, notes=(note,))
        if score >= goal_db:
            break
    assert best is not None
    return best


def quantizes_mixed(decision: Decision, budgets: Budgets) -> bool:
    """Whether layers get formats of their own: the recipe says so, or `auto` has a budget to meet."""
    return decision.search == "mixed" or (decision.automatic and budgets != Budgets())


def mixed_decision(decision: Decision) -> Decision:
    """`auto` under a budget: the profile's quantizing step with the steps that refine codes of few bits."""
    if decision.search == "mixed":
        return decision
    present = [s for s in decision.plan.steps if s != "correct_bias"]
    at = next((i for i, s in enumerate(present) if recipes.quantizes(s)), None)
    if at is None:
        return decision
    steps = (*present[: at + 1], "gptq", *present[at + 1 :])
    return replace(decision, plan=replace(decision.plan, steps=steps), search="mixed")
