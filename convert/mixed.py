"""The recipe `mixed`: each layer its own format, chosen under a budget of bytes or of measured milliseconds.

A layer's score is what the whole model loses when that layer alone changes format (output KL for class scores,
relative squared error else); the choice is an integer linear programme (as in HAWQ-V3, arXiv 2011.10680). Scores of
single layers mislead, so several plans are built whole and judged by the simulation; the best of those counts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import steps as known
from calibrate.coded import coded
from calibrate.graph import (
    add_constant,
    clone,
    constant,
    constant_made,
    finish,
    is_table,
    is_weighted,
    kind,
    layer_name,
    run,
)
from calibrate.plan import Entry, WeightFormat
from calibrate.weights import fitted_scales, spread, weight_codes, weight_index
from convert import recipes
from convert.automatic import quantized_layers
from convert.compress import Builder, Compressed
from convert.costs import costs
from convert.drift import classifies
from convert.errors import TightfitError
from convert.planning import Decision, keeping_float, weighted_layers, with_formats

FLOAT = "float"
MIB = 2**20
# Plans between the smallest and the largest that are built and judged when no budget is given.
SWEEP = 6
# How often a plan is measured and its budget of estimated time corrected.
ROUNDS = 4
CHOSEN = "chosen by mixed precision: in codes it costs more than its share of the budget brings"


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


@dataclass(frozen=True)
class Table:
    """One row per layer, one column per option: `scores` (loss of the output), `bytes`, and each layer's `macs`."""

    layers: tuple[str, ...]
    options: tuple[str, ...]
    scores: np.ndarray
    bytes: np.ndarray
    macs: np.ndarray
    fixed_bytes: int


def search(
    builder: Builder, decision: Decision, budgets: Budgets, goal_db: float, trial: Try | None = None
) -> Compressed:
    """The plan with the least drift inside the budgets; without any, the smallest that holds `goal_db`.

    `trial` lowers and measures a plan; a budget needs it. Raises TightfitError where no plan fits.
    """
    table = _table(builder, decision, _options(decision))
    if budgets == Budgets():
        return _smallest(builder, decision, table, goal_db)
    assert trial is not None
    return _within(builder, decision, table, budgets, trial)


def _options(decision: Decision) -> tuple[str, ...]:
    """Formats that a layer may get, the smallest first. Two bits are for weights alone: activations add their own."""
    alone = "quantize_weights" in decision.plan.steps
    return ("2", "4", "8", FLOAT) if alone else ("4", "8", FLOAT)


def _format(decision: Decision, option: str) -> WeightFormat:
    bits = int(option)
    group = decision.plan.weight.group if bits < 8 else None
    return replace(decision.plan.weight, bits=bits, group=group, kind="int")


def _table(builder: Builder, decision: Decision, options: tuple[str, ...]) -> Table:
    """Score every layer in every format, the others at 8 bits."""
    plain = _plain(decision)
    base = builder.build(plain)
    quantized = set(quantized_layers(base))
    layers = tuple(n for n in weighted_layers(builder.captured.graph, tables=True) if n in quantized)
    if not layers:
        raise TightfitError("mixed precision has nothing to choose: no layer of this model can be quantized here.")
    before = base.exact or builder.captured.graph
    weights = _weights(before)
    loss = Loss(builder)
    start = loss(base.graph)
    scores, sizes = np.zeros((len(layers), len(options))), np.zeros((len(layers), len(options)))
    for row, layer in enumerate(layers):
        for column, option in enumerate(options):
            sizes[row, column] = stored_bytes(weights[layer], None if option == FLOAT else _format(decision, option))
            if option == "8":
                continue
            if option == FLOAT:
                made = builder.build(keeping_float(plain, {layer: CHOSEN})).graph
            else:
                made = _with_format(base.graph, decision, layer, weights[layer], option)
            scores[row, column] = loss(made) - start
        builder.progress("sensitivity", row + 1)
    macs = {c.name: c.macs or 0 for c in costs(builder.captured.graph, builder.captured.inputs)}
    others = sum(v.numel() * v.element_size() for v in _constants(before)) - 4 * sum(
        w.numel() for w in weights.values()
    )
    work = np.array([float(macs.get(n, 0)) for n in layers])
    return Table(layers, options, scores, sizes, work, max(others, 0))


def _weights(graph: GraphModule) -> dict[str, Tensor]:
    """The float weight of every layer and table, by the layer's name."""
    fixed = constant_made(graph.graph.nodes)
    found = {}
    for node in graph.graph.nodes:
        if is_weighted(node) or is_table(node, fixed):
            source = node.args[weight_index(node)]
            assert isinstance(source, Node)
            found[layer_name(node)] = constant(graph, source)
    return found


def _constants(graph: GraphModule) -> Iterable[Tensor]:
    return [*graph.parameters(), *graph.buffers()]


def _plain(decision: Decision) -> Decision:
    """The decision at 8 bits throughout, without the steps that refine codes: what single layers are judged against."""
    steps = tuple(s for s in decision.plan.steps if not known.refines(s))
    plan = replace(decision.plan, steps=steps, weight=replace(decision.plan.weight, bits=8, group=None), formats={})
    return replace(decision, plan=plan)


def stored_bytes(weight: Tensor, form: WeightFormat | None) -> float:
    """What a weight [out, ...] takes in a file: codes and float32 scales; float32 without a format."""
    if form is None:
        return 4.0 * weight.numel()
    groups = weight.numel() / form.group if form.group and weight.dim() == 2 else len(weight)
    return weight.numel() * form.bits / 8 + 4.0 * groups


def _with_format(graph: GraphModule, decision: Decision, layer: str, weight: Tensor, option: str) -> GraphModule:
    """A copy of a quantized graph with one layer's weight rounded to another format."""
    copy = clone(graph)
    form = _format(decision, option)
    scales = fitted_scales(weight, decision.plan, form)
    codes = weight_codes(weight, scales, *decision.plan.code_range(form.bits))
    for node in list(copy.graph.nodes):
        if layer_name(node) != layer or kind(node) not in ("conv", "linear", "embedding"):
            continue
        found = coded(node)
        if found is not None and found.dynamic:
            found.set_codes(copy, codes)
            found.set_scales(copy, scales)
        else:
            index = weight_index(node)
            rounded = (codes.double() * spread(scales.double(), weight.shape)).float()
            fresh = add_constant(copy, f"{layer}_judged", rounded, node)
            node.args = (*node.args[:index], fresh, *node.args[index + 1 :])
    return finish(copy)


class Loss:
    """What a graph loses against float on the judging samples: mean KL of class scores, or relative squared error."""

    def __init__(self, builder: Builder) -> None:
        self.judge = builder.judge
        first = self.judge.expected[0]
        named = {str(i): v.numpy() for i, v in enumerate(first)}
        self.by_kl = classifies(named, None)

    def __call__(self, graph: GraphModule) -> float:
        total, count = 0.0, 0
        for inputs, expected in zip(self.judge.inputs, self.judge.expected, strict=True):
            got = run(graph, inputs)
            if self.by_kl:
                total += float(_kl(expected[0], got[0]).sum())
                count += len(expected[0])
                continue
            for want, have in zip(expected, got, strict=True):
                if want.is_floating_point():
                    total += float(
                        (have - want).double().square().sum() / want.double().square().sum().clamp(min=1e-30)
                    )
                    count += 1
        return total / max(count, 1)


def _kl(wanted: Tensor, got: Tensor) -> Tensor:
    p, q = torch.log_softmax(wanted.double(), 1), torch.log_softmax(got.double(), 1)
    return (p.exp() * (p - q)).sum(1)


def solve(
    table: Table, limits: Iterable[tuple[np.ndarray, float]], banned: Iterable[np.ndarray] = ()
) -> np.ndarray | None:
    """For each layer the column with the least total score within every limit; None where there is none.

    `limits`: (cost of each layer in each option, what their sum may be). `banned`: choices that must differ in at least
    one layer (no-good cuts).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows, columns = table.scores.shape
    constraints = [LinearConstraint(np.kron(np.eye(rows), np.ones(columns)), 1, 1)]
    constraints += [LinearConstraint(costs_.reshape(1, -1), -np.inf, limit) for costs_, limit in limits]
    for choice in banned:
        cut = np.zeros((rows, columns))
        cut[np.arange(rows), choice] = 1
        constraints.append(LinearConstraint(cut.reshape(1, -1), -np.inf, rows - 1))
    # Among equals the smaller wins.
    objective = table.scores.reshape(-1) + 1e-9 * table.bytes.reshape(-1) / max(float(table.bytes.max()), 1e-30)
    found = milp(objective, constraints=constraints, integrality=np.ones(rows * columns), bounds=Bounds(0, 1))
    return None if found.x is None else np.round(found.x).reshape(rows, columns).argmax(1)


def _built(builder: Builder, decision: Decision, table: Table, choice: np.ndarray) -> tuple[float, Compressed]:
    """The whole plan of a choice, and its simulated SQNR in dB."""
    floats, formats = {}, {}
    for layer, column in zip(table.layers, choice, strict=True):
        option = table.options[column]
        if option == FLOAT:
            floats[layer] = CHOSEN
        else:
            formats[layer] = _format(decision, option)
    made = builder.build(with_formats(keeping_float(decision, floats), formats))
    score = builder.score(made)
    entries = tuple(
        Entry("mixed", layer, table.options[c] if table.options[c] == FLOAT else f"int{table.options[c]}",
              f"alone it costs {table.scores[r, c]:+.2g} of output loss against 8 bits")
        for r, (layer, c) in enumerate(zip(table.layers, choice, strict=True))
    )  # fmt: skip
    return score, replace(made, ledger=(*made.ledger, *entries))


def _tally(table: Table, choice: np.ndarray) -> str:
    counts = [(name, int((choice == i).sum())) for i, name in enumerate(table.options)]
    return ", ".join(f"{n} layers in {'float' if o == FLOAT else f'{o} bits'}" for o, n in counts if n)


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
        builder.progress("measure formats", column + 1)
    return np.outer(table.macs / max(table.macs.sum(), 1.0), np.array(whole))


def _smallest(builder: Builder, decision: Decision, table: Table, goal_db: float) -> Compressed:
    """Sweep from the smallest plan up, each judged whole, and take the first that holds the goal."""
    least, most = table.bytes.min(1).sum(), table.bytes[:, table.options.index("8")].sum()
    best = None
    for count, limit in enumerate([*np.geomspace(least * 1.0001, most * 1.0001, SWEEP), table.bytes.max(1).sum()]):
        choice = solve(table, [(table.bytes, float(limit))])
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
