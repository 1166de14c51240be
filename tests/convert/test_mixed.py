"""Mixed precision: plans stay inside their budgets, beat uniform ones of the same size, and are judged whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import cnn, prepared

from calibrate.plan import WeightFormat
from convert import mixed
from convert.compress import Builder, Compressed
from convert.errors import TightfitError
from convert.mixed import Budgets, Table, Trial, Try, search, solve, stored_bytes
from convert.planning import Decision, decide, with_formats
from device_profiles import load


def table(seed: int, rows: int = 5, columns: int = 3) -> Table:
    generator = np.random.default_rng(seed)
    scores, sizes = generator.random((rows, columns)), generator.random((rows, columns)) * 100
    names = tuple(f"layer{i}" for i in range(rows))
    return Table(names, ("4", "8", "float"), scores, sizes, generator.random(rows), 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.3, 1.2))
def test_the_programme_finds_what_trying_every_choice_finds(seed: int, share: float) -> None:
    small = table(seed, rows=4)
    limit = float(small.bytes.mean() * 4 * share)
    rows = np.arange(4)
    every = [np.array(c) for c in np.ndindex(3, 3, 3, 3) if small.bytes[rows, c].sum() <= limit]
    found = solve(small, [(small.bytes, limit)])
    if not every:
        assert found is None
        return
    assert found is not None
    assert small.bytes[rows, found].sum() <= limit * (1 + 1e-6)
    best = min(small.scores[rows, c].sum() for c in every)
    assert small.scores[rows, found].sum() == pytest.approx(best, abs=1e-6)


def test_a_choice_that_is_banned_is_not_found_again() -> None:
    small = table(3)
    first = solve(small, [(small.bytes, 1e9)])
    assert first is not None
    second = solve(small, [(small.bytes, 1e9)], [first])
    assert second is not None
    assert not (first == second).all()


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
        total += stored_bytes(weight, None if action == "float" else WeightFormat(int(action[3:])))
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
    assert len(measured) > len(("4", "8", "float"))
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


def test_stored_bytes_are_codes_and_scales() -> None:
    weight = torch.zeros(8, 64)
    assert stored_bytes(weight, None) == 8 * 64 * 4
    assert stored_bytes(weight, WeightFormat(4)) == 8 * 32 + 8 * 4
    assert stored_bytes(weight, WeightFormat(2, group=32)) == 8 * 16 + 8 * 2 * 4


def test_auto_under_a_budget_is_mixed_precision(started: tuple[Builder, Decision]) -> None:
    builder, mixed_one = started
    auto = decide(builder.captured.graph, load("generic-x86"), "onnx", "auto")
    assert mixed.quantizes_mixed(mixed_one, Budgets())
    assert not mixed.quantizes_mixed(auto, Budgets())
    assert mixed.quantizes_mixed(auto, Budgets(mib=1.0))
    steps = mixed.mixed_decision(auto).plan.steps
    assert steps.index("quantize_static") < steps.index("gptq")
