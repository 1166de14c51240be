"""Mixed precision: plans stay inside their budgets, beat uniform ones of the same size, and are judged whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import cnn, planted, prepared

import targets
from calibrate.plan import HALF, WeightFormat
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from convert import mixed
from convert.compress import Builder, Compressed
from convert.errors import TightfitError
from convert.mixed import Budgets, Trial, Try, search
from convert.mixed_table import build_table, stored_bytes
from convert.planning import Decision, decide, with_formats
from device_profiles import load


@pytest.fixture(scope="module")
def started() -> tuple[Builder, Decision]:
    model, data = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    return Builder(model, data), decide(model.graph, load("generic-x86"), "onnx", "mixed")


def sizes(builder: Builder, made: Compressed) -> float:
    """Bytes of the weights as the ledger of `mixed` says they are stored."""
    weights = {n: p for n, p in cnn().named_parameters() if n.endswith("weight")}
    chosen = {e.layer: e.action for e in made.ledger if e.step == "mixed"}
    total = 0.0
    for name, weight in weights.items():
        action = chosen[name.removesuffix(".weight")]
        forms = {"float": None, "float16": HALF}
        total += stored_bytes(weight, forms[action] if action in forms else WeightFormat(int(action[3:])))
    return total


OVERHEAD = 300


def weighed(builder: Builder) -> Try:
    """What lowering would give: the weights as stored and biases, with an overhead that no estimate knows."""
    return lambda made, timed: Trial(int(sizes(builder, made)) + 4 * (16 * 3 + 10) + OVERHEAD, None)


def test_a_plan_stays_inside_its_bytes_and_beats_four_bits_everywhere(started: tuple[Builder, Decision]) -> None:
    builder, decision = started
    budget = 0.0045
    made = search(builder, decision, Budgets(mib=budget), 20.0, weighed(builder))
    assert weighed(builder)(made, False).bytes <= budget * 2**20
    four = {layer: WeightFormat(4) for layer in ("0", "2", "4", "8")}
    uniform = builder.build(with_formats(decision, four))
    assert builder.score(made) >= builder.score(uniform)
    assert "within 0.0045 MiB" in made.notes[0]


def test_a_file_larger_than_its_weights_is_noticed_and_made_smaller(started: tuple[Builder, Decision]) -> None:
    """What fits by the estimate alone does not fit with the overhead: a second round corrects it."""
    builder, decision = started
    files: list[int] = []

    def lowered(made: Compressed, timed: bool) -> Trial:
        files.append(weighed(builder)(made, timed).bytes)
        return Trial(files[-1], None)

    budget = (2832 + 4 * 58 + OVERHEAD + 20) / 2**20  # four bits everywhere, and next to nothing more
    search(builder, decision, Budgets(mib=budget), 20.0, lowered)
    assert files[0] > budget * 2**20 >= files[-1]


def test_a_larger_budget_never_gives_a_worse_plan(started: tuple[Builder, Decision]) -> None:
    builder, decision = started
    made = (search(builder, decision, Budgets(mib=b), 20.0, weighed(builder)) for b in (0.004, 0.02))
    small, large = (builder.score(m) for m in made)
    assert large >= small


def test_a_budget_that_nothing_fits_is_refused_with_what_would_do(started: tuple[Builder, Decision]) -> None:
    builder, decision = started
    with pytest.raises(TightfitError, match=r"no plan fits --budget-mib 0.001: .* Give at least 0\.00"):
        search(builder, decision, Budgets(mib=0.001), 20.0, weighed(builder))
    with pytest.raises(TightfitError, match=r"measured within --budget-mib 0.004\. .* smallest file 1 MiB"):
        search(builder, decision, Budgets(mib=0.004), 20.0, lambda made, timed: Trial(2**20, None))


def test_without_a_budget_the_smallest_plan_that_holds_the_goal_is_taken(started: tuple[Builder, Decision]) -> None:
    builder, decision = started
    eight = builder.score(builder.build(with_formats(decision, {n: WeightFormat(8) for n in ("0", "2", "4", "8")})))
    low, high = (search(builder, decision, Budgets(), goal) for goal in (5.0, eight - 1))
    assert sizes(builder, low) < sizes(builder, high)
    assert builder.score(high) >= eight - 1


def test_time_is_measured_plan_by_plan_and_the_slow_ones_are_not_taken(started: tuple[Builder, Decision]) -> None:
    builder, decision = started
    measured: list[float] = []

    def clock(made: Compressed, timed: bool) -> Trial:
        """A machine on which every layer on codes takes 1 ms and every other 3 ms."""
        assert timed
        floats = sum(layer in made.decision.plan.keep_float for layer in ("0", "2", "4", "8"))
        measured.append(4.0 + 2.0 * floats)
        return Trial(1000, measured[-1])

    made = search(builder, decision, Budgets(ms=9.0), 20.0, clock)
    assert clock(made, True).ms <= 9.0
    assert "9 ms: " in made.notes[0]
    assert len(measured) > len(("4", "8", "16", "float"))
    with pytest.raises(TightfitError, match=r"no plan was measured within --budget-ms 3\."):
        search(builder, decision, Budgets(ms=3.0), 20.0, clock)


def test_both_budgets_hold_at_once(started: tuple[Builder, Decision]) -> None:
    builder, decision = started

    def tried(made: Compressed, timed: bool) -> Trial:
        floats = sum(layer in made.decision.plan.keep_float for layer in ("0", "2", "4", "8"))
        return Trial(weighed(builder)(made, False).bytes, 4.0 + 2.0 * floats)

    found = tried(search(builder, decision, Budgets(mib=0.006, ms=9.0), 20.0, tried), True)
    assert found.bytes <= 0.006 * 2**20
    assert found.ms is not None
    assert found.ms <= 9.0


def test_auto_under_a_budget_is_mixed_precision(started: tuple[Builder, Decision]) -> None:
    builder, mixed_one = started
    auto = decide(builder.captured.graph, load("generic-x86"), "onnx", "auto")
    assert mixed.quantizes_mixed(mixed_one, Budgets())
    assert not mixed.quantizes_mixed(auto, Budgets())
    assert mixed.quantizes_mixed(auto, Budgets(mib=1.0))
    steps = mixed.mixed_decision(auto).plan.steps
    assert steps.index("quantize_static") < steps.index("gptq")


class Lowering:
    """Plans of one model and target as files; `deviation` is how far a file's size is from what the table said."""

    def __init__(self, device: str, target: str, folder: Path) -> None:
        self.model, self.data = prepared(planted(), torch.zeros(2, 64))
        self.builder = Builder(self.model, self.data)
        self.decision = decide(self.model.graph, load(device), target, "mixed")
        self.table = build_table(self.builder, self.decision)
        self.target = targets.find(target)
        self.path = folder / f"m{self.target.suffix}"
        self.deviation: list[float] = []

    def job(self, made: Compressed) -> targets.Job:
        inputs = tuple(InputSpec(i.name, (1, *i.sample_shape), i.dtype, False) for i in self.model.inputs)
        return targets.Job("m", made.graph, inputs, self.model.outputs, self.decision.rules, self.decision.compute)

    def bytes(self, made: Compressed) -> float:
        """The table's estimate for a plan."""
        columns = {"int2": "2", "int4": "4", "int8": "8", "float16": "16", "float": "float"}
        at = [self.table.options.index(columns[action]) for action in chosen(made).values()]
        return self.table.fixed_bytes + float(self.table.bytes[np.arange(len(at)), at].sum())

    def trial(self, made: Compressed, timed: bool) -> Trial:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.target.lower(self.job(made), self.path)
        size = targets.artifact_bytes(self.path)
        self.deviation.append(abs(size / self.bytes(made) - 1))
        return Trial(size, None)

    def search(self, *wide: str, spare: float = 1.06) -> Compressed:
        """The plan within what 8 bits take, with 16 for the layers `wide`."""
        column = [self.table.options.index("16" if layer in wide else "8") for layer in self.table.layers]
        room = self.table.fixed_bytes + self.table.bytes[np.arange(len(column)), column].sum()
        return search(self.builder, self.decision, Budgets(mib=room * spare / 2**20), 20.0, self.trial)


def chosen(made: Compressed) -> dict[str, str]:
    return {e.layer: e.action for e in made.ledger if e.step == "mixed"}


# What another order of the same float32 sums makes of numbers, relative to the largest; Core ML's executor follows the
# simulation's order in float16.
SUMS = 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "target", "package"),
    [
        ("generic-x86-vnni", "onnx", "onnxruntime"),
        ("raspberry-pi-4b", "tflite", "litert_torch"),
        ("iphone-a17-pro", "coreml", "coremltools"),
    ],
)
def test_a_layer_that_8_bits_break_gets_16_where_the_budget_has_room_for_them(
    device: str, target: str, package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    files = Lowering(device, target, tmp_path)
    made = files.search("2")
    assert chosen(made)["2"] == "float16"
    assert "float16" not in [a for layer, a in chosen(made).items() if layer in ("0", "4")]
    assert max(files.deviation) < 0.04  # the graph itself is what the table leaves out
    assert "1 layers in 16 bits" in made.notes[0]
    assert ("2", "float16 weights") in [(e.layer, e.action) for e in made.ledger]

    files.trial(made, False)
    session, worst = files.target.open(files.path), 0.0
    run = simulate(made.graph, files.decision.compute, files.decision.adder)
    for row in files.data.array[:8]:
        (got,) = session.run({files.model.inputs[0].name: row[None]}).values()
        (expected,) = run([torch.from_numpy(row[None])])
        worst = max(worst, float(np.abs(got - expected.numpy()).max() / expected.abs().max()))
    assert worst < SUMS
    assert files.target.placement(files.path, files.job(made)).fallbacks == ()

    tight = files.search()  # no room for 16 bits anywhere: the layer keeps its codes, and the output shows it
    assert chosen(tight)["2"] in ("int8", "int4", "int2")
    assert files.builder.score(tight) < files.builder.score(made) - 5


def test_with_binarizers_a_smaller_budget_is_met_by_signs_and_planes_where_they_cost_least() -> None:
    model, data = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    builder, decision = Builder(model, data), decide(model.graph, load("generic-x86"), "onnx", "mixed-binary")
    table = build_table(builder, decision)
    assert table.options == ("sign", "planes", "4", "8", "16", "float")
    few = table.bytes[:, :2]
    assert np.isinf(few[[0, -1]]).all(), "the ends stay wide"
    assert np.isfinite(few[1:-1]).any()
    assert (table.scores[np.isfinite(few[:, 0]), 0] >= table.scores[np.isfinite(few[:, 0]), 1]).all()

    room = table.bytes.min(1).sum() * 1.05 + table.fixed_bytes
    made = search(builder, decision, Budgets(mib=room / 2**20), 20.0, lambda made, timed: Trial(int(room), None))
    chosen = {e.layer: e.action for e in made.ledger if e.step == "mixed"}
    assert "sign" in chosen.values()
    binarized = {e.layer for e in made.ledger if e.step == "binarize" and "levels by" in e.action}
    assert binarized == {layer for layer, action in chosen.items() if action in ("sign", "planes")}
    assert "1 bit" in made.notes[0]
