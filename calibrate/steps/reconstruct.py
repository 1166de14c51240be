"""Learn which way each weight of few bits rounds, block by block, from what the float block computes (AdaRound)."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.adaround import Rounding
from calibrate.blocks import Unit, UnitData, block_units, layer_units, walk_units
from calibrate.coded import CodedLayer
from calibrate.errors import CalibrationError
from calibrate.graph import constant, weight_nodes
from calibrate.lockstep import partners
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.training import Coins, Runner, Saved, carrier
from calibrate.training_clock import Clock
from calibrate.training_samples import TOO_FEW, Rows, Samples, output_db

NAME = "reconstruct"
# Share of the iterations without the regulariser that drives roundings to 0 or 1; its exponent's way, soft to hard.
WARM, SOFTEST, HARDEST = 0.2, 20.0, 2.0
# Learning rates relative to that of the roundings.
SCALE_RATE, BIAS_RATE = 0.02, 0.1
# The loss is looked at every so many iterations; below this relative fall it no longer falls.
LOOK, FALL = 50, 0.01
# What a layer takes to run and train besides, in multiplications for each sample of a minibatch.
OVERHEAD = 10**6


class Reconstruct:
    """AdaRound (arXiv 2004.10568) over layers or blocks (BRECQ, arXiv 2102.05426) with half of what a block reads, and
    of what its quantizers round, taken as it is (QDrop, arXiv 2203.05740).

    A block that does not come closer to the float block on held-out samples is put back, and so is everything when the
    model's output doesn't. Random choices come from the context's seed; two runs differ only where `time_limit_s` cut
    one short, which the ledger then says.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {
        "unit": "block",
        "iterations": 300,
        "samples": 256,
        "batch": 16,
        "lr": 0.1,
        "learn_scales": True,
        "drop": 0.5,
        "max_bits": 4,
        "time_limit_s": 120.0,
        "regularizer": 0.3,
    }

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = context.parameters
        reference = context.float_graph
        assert reference is not None
        if wish["unit"] not in ("layer", "block"):
            raise CalibrationError(f'reconstruct takes unit = "layer" or "block", not "{wish["unit"]}"')
        units = (block_units if wish["unit"] == "block" else layer_units)(reference, graph)
        if not any(_few(graph, layer, wish["max_bits"]) for u in units for layer in u.layers):
            return [Entry(NAME, "model", "left alone", f"no layer has weights of {wish['max_bits']} bits or fewer")]
        samples = Samples.of(graph, context, wish["samples"])
        if samples is None:
            return [Entry(NAME, "model", "left alone", TOO_FEW)]
        before = output_db(reference, graph, samples.held)
        work = _Work(graph, context, samples, units)
        walk_units(reference, graph, samples.all, units, work.visit)
        graph.recompile()  # biases are other nodes now
        after = output_db(reference, graph, samples.held)
        if after > before:
            return work.ledger
        for saved in work.changed:
            saved.restore(graph)
        reason = f"rolled back: the output was {before:.1f} dB on held-out samples and came to {after:.1f} dB"
        if work.stopped:
            reason += ", in the time that time_limit_s leaves: another run may differ"
        return [Entry(NAME, "model", "left alone", reason)]

    def ensures(self, graph: GraphModule) -> str | None:
        return None


class _Work:
    """One pass over the units; collects the ledger and what it changed."""

    def __init__(self, graph: GraphModule, context: Context, samples: Samples, units: Sequence[Unit]) -> None:
        self.graph, self.context, self.samples = graph, context, samples
        # What is still to be done: units get their part of the time by it.
        self.ahead = sum(_work(u) for u in units if self._wanted(u))
        self.ledger: list[Entry] = []
        self.changed: list[Saved] = []
        self.done, self.count = 0, len(units)
        self.stopped = False
        self.generator = torch.Generator().manual_seed(context.seed)
        self.end = time.monotonic() + float(context.parameters["time_limit_s"])
        assert context.float_graph is not None
        self.partners = partners(context.float_graph, graph)

    def visit(self, data: UnitData) -> None:
        """Reconstruct one unit, or say why not."""
        wish = self.context.parameters
        layers = self._wanted(data.unit)
        self.done += 1
        if not layers:
            reason = f"its weights have more than {wish['max_bits']} bits, where rounding to nearest does"
            self._say(data.unit.layers, "left alone", reason)
            return
        work, left = _work(data.unit), self.end - time.monotonic()
        if left <= 0:
            reason = f"the time limit of {wish['time_limit_s']:.0f} s was reached before: another run may differ"
            self._say(layers, "left alone", reason)
            self.stopped = True
        else:
            self._reconstruct(data, layers, left * work / self.ahead)
        self.ahead -= work
        self.context.progress(NAME, self.done, self.count)

    def _wanted(self, unit: Unit) -> list[CodedLayer]:
        """The layers of few enough bits."""
        return [x for x in unit.layers if _few(self.graph, x, self.context.parameters["max_bits"])]

    def _reconstruct(self, data: UnitData, layers: list[CodedLayer], seconds: float) -> None:
        graph, plan = self.graph, self.context.plan
        saved = [Saved.of(graph, x) for x in layers]
        held = [self._rows(data, i) for i in range(self.samples.held_from, len(self.samples.all))]
        before = _error(graph, data.unit, held)
        scales = bool(self.context.parameters["learn_scales"])
        forms = [Rounding(graph, x, self._weight(x), plan, scales) for x in layers]
        clock = self._optimise(data, forms, seconds, before)
        self.stopped |= clock.stopped
        moved = [f.store(graph, plan) for f in forms]
        after = _error(graph, data.unit, held)
        beside = "" if len(layers) == 1 else f", together with {len(layers) - 1} more"
        if after < before:
            self.changed += saved
            for layer, part in zip(layers, moved, strict=True):
                reason = f"{_db(before):.1f} -> {_db(after):.1f} dB on held-out samples{beside}"
                self._say([layer], "rounding learned", f"{reason}, {part:.0%} of codes moved{clock.note()}")
            return
        for old in saved:
            old.restore(graph)
        reason = f"rolled back: {_db(before):.1f} dB on held-out samples came to {_db(after):.1f} dB{clock.note()}"
        self._say(layers, "left alone", reason)

    def _optimise(self, data: UnitData, forms: list[Rounding], seconds: float, before: float) -> Clock:
        wish, unit = self.context.parameters, data.unit
        rows = Rows([self._rows(data, i) for i in range(self.samples.held_from)], self.samples.rowwise)
        given = {}
        for form in forms:
            given[carrier(form.layer)] = form.weight
            form.unit = float(rows.spread)
            if form.layer.bias is not None:
                given[form.layer.bias] = form.moved_bias
        coins = Coins(float(wish["drop"]), self.generator)
        runner = Runner(self.graph, given, drop=coins)
        optimizer = torch.optim.Adam(_groups(forms, float(wish["lr"])))
        clock = Clock(int(wish["iterations"]), seconds)
        # Both parts of the loss then speak of the same: 1 is the error of the present rounding.
        whole = max(before * rows.spread**2, 1e-30)
        recent: list[float] = []
        looked = math.inf
        while clock.done < 1:
            batch = rows.minibatch(int(wish["batch"]), self.generator)
            got, wanted = _forward(runner, unit, batch, coins)
            loss = (got - wanted).square().mean()
            cost = loss / whole
            recent.append(float(cost.detach()))
            if clock.done > WARM:
                beta = HARDEST + (SOFTEST - HARDEST) * (1 - (clock.done - WARM) / (1 - WARM))
                cost = cost + float(wish["regularizer"]) * sum(f.cost(beta) for f in forms)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            clock.tick()
            if clock.done < WARM and len(recent) % LOOK == 0:  # no longer falling: on to the part that decides
                now = sum(recent[-LOOK:]) / LOOK
                if now > (1 - FALL) * looked:
                    clock.skip_to(WARM)
                looked = now
        return clock

    def _rows(self, data: UnitData, index: int) -> list[Tensor | None]:
        return [
            *self.samples.all[index],
            data.inputs[index] if data.inputs is not None else None,
            data.wanted[index] if data.wanted is not None else None,
            data.targets[index],
        ]

    def _weight(self, layer: CodedLayer) -> Tensor | None:
        twin = self.partners.get(layer.node)
        source = weight_nodes(twin)[0] if twin is not None else None
        reference = self.context.float_graph
        return constant(reference, source) if source is not None and reference is not None else None

    def _say(self, layers: Iterable[CodedLayer], action: str, reason: str) -> None:
        self.ledger += [Entry(NAME, layer.name, action, reason) for layer in layers]


def _few(graph: GraphModule, layer: CodedLayer, most: int) -> bool:
    """Whether a weight takes so few bits: its codes do, or its rows have two to four levels."""
    return layer.bits <= most or (most >= 2 and layer.levels(graph) is not None)


def _work(unit: Unit) -> int:
    """What one sample costs in the unit's layers, in multiplications."""
    total = 0
    for layer in unit.layers:
        shape, made = layer.codes.meta["val"].shape, layer.node.meta.get("val")
        places = math.prod(s for s in made.shape[1:] if isinstance(s, int)) if isinstance(made, Tensor) else 1
        total += places * math.prod(shape[1:]) + OVERHEAD
    return total


def _groups(forms: list[Rounding], rate: float) -> list[dict[str, Any]]:
    scales = [f.scale.log for f in forms if f.learns_scale]
    moves = [f.move for f in forms if f.move is not None]
    groups = [
        {"params": [f.up for f in forms], "lr": rate},
        {"params": scales, "lr": rate * SCALE_RATE},
        {"params": moves, "lr": rate * BIAS_RATE},
    ]
    return [g for g in groups if g["params"]]


def _forward(
    runner: Runner, unit: Unit, rows: list[Tensor | None], coins: Coins | None = None
) -> tuple[Tensor, Tensor]:
    """What the unit computes and what it should, for rows [inputs of the graph..., read, float read, target]."""
    *graph_inputs, read, wanted, target = rows
    env: dict[Node, Any] = dict(zip(runner.placeholders, graph_inputs, strict=True))
    if unit.entry is not None:
        assert read is not None
        if coins is not None and wanted is not None:
            read = coins.mix(read, wanted)
        env[unit.entry] = read
    runner.run(unit.side, env)
    runner.run(unit.nodes, env)
    assert target is not None
    return env[unit.exit], target


def _error(graph: GraphModule, unit: Unit, held: list[list[Tensor | None]]) -> float:
    """Squared error of the unit as the graph now stands, relative to the power of what it should compute."""
    runner = Runner(graph, {})
    error = power = 0.0
    with torch.no_grad():
        for rows in held:
            got, wanted = _forward(runner, unit, rows)
            error += float((got - wanted).double().square().sum())
            power += float(wanted.double().square().sum())
    return error / power if power else error


def _db(error: float) -> float:
    """A relative squared error as signal to noise in dB."""
    return -10 * math.log10(error) if error > 0 else math.inf


STEP = Reconstruct()
