"""The stage before all steps: which schedule a command's options lead to, and what devices of one command share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from token_setup import pruner, vit

from calibrate.graph import operator_name
from calibrate.tokens.schedule import Schedule
from convert import output, token_stage
from convert.compress import Builder
from convert.errors import TightfitError
from convert.options import Options, Run, Samples
from convert.planning import Decision, decide
from convert.progress import Silent
from convert.token_stage import (
    HALF_EXACT,
    ROUNDS,
    Costs,
    meets_budget,
    refuse_half_ranks,
    with_fewer_tokens,
    within_budget,
)
from device_profiles import load


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model, data = vit()
    return Run(
        options=Options("vit.pt2", ("generic-x86",), tmp_path / "out", recipe="prune-evit"),
        captured=model,
        samples=Samples(data, data, "made", ()),
        folder=tmp_path,
        twins=tmp_path / ".work" / "float",
        reference=output.Reference.empty(),
        progress=Silent(),
        batch=1,
        reference_samples=1,
        builder=Builder(model, data, effort="fast"),
    )


@pytest.fixture(autouse=True)
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests have one pruner, so that a schedule is scored once."""
    monkeypatch.setattr(token_stage, "_pruner", lambda *_: pruner())


def asked(run: Run, **options: object) -> Run:
    return replace(run, options=replace(run.options, **options))  # type: ignore[arg-type]


def decision(run: Run, device: str = "generic-x86", target: str = "onnx") -> Decision:
    return decide(run.captured.graph, load(device), target, run.options.recipe)


def work(schedule: Schedule) -> float:
    """Milliseconds on a machine that takes one for each token that enters a block or leaves it."""
    return float(sum(schedule.entering) + sum(schedule.leaving))


WHOLE = work(Schedule(3, 17))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are those of `work`; nothing is timed."""
    monkeypatch.setattr(token_stage, "costs_of", lambda *_: Costs(work, "counted here", measured=True))


def test_a_recipe_that_removes_no_tokens_leaves_the_run_alone(run: Run) -> None:
    other = asked(run, recipe="int8")
    assert with_fewer_tokens(other, decision(other)) is other
    assert other.model is run.captured


def test_the_share_asked_for_goes_before_the_recipes(run: Run) -> None:
    by_recipe, by_option = (with_fewer_tokens(r, decision(r)) for r in (run, asked(run, keep=0.5)))
    assert by_recipe.pruned is not None
    assert by_option.pruned is not None
    assert by_recipe.pruned.schedule.share == pytest.approx(0.7, abs=0.06)  # whole tokens of 17
    assert by_option.pruned.schedule.share == pytest.approx(0.5, abs=0.06)
    assert "the recipe's default" in by_recipe.pruned.how
    assert "A share of 0.5 of the tokens is kept, as asked: 17 →" in by_option.pruned.how


def test_steps_work_on_the_pruned_model_and_the_reference_stays_whole(run: Run) -> None:
    made = with_fewer_tokens(run, decision(run))
    assert made.pruned is not None
    assert made.model is made.pruned.captured
    assert made.captured is run.captured
    assert made.builder is not run.builder
    assert made.builder.captured is made.model
    assert made.builder.effort == "fast"
    kinds = {operator_name(n) for n in made.model.graph.graph.nodes}
    assert "sort" in kinds
    assert "sort" not in {operator_name(n) for n in run.captured.graph.graph.nodes}


def test_devices_that_take_tokens_alike_share_what_was_made(run: Run) -> None:
    first = with_fewer_tokens(run, decision(run))
    again = with_fewer_tokens(run, decision(run, "raspberry-pi-4b"))
    assert again.pruned is first.pruned
    assert again.builder is first.builder
    assert len(run.shelf) == 1
    other = decision(run)
    other = replace(other, rules=other.rules.model_copy(update={"token_form": "rank"}))
    ranked = with_fewer_tokens(run, other)
    assert ranked.pruned is not None
    assert ranked.pruned.form == "rank"
    assert ranked.pruned is not first.pruned
    assert "sort" not in {operator_name(n) for n in ranked.model.graph.graph.nodes}


def test_a_limit_on_answers_takes_the_cheapest_schedule_that_holds_it(run: Run, counting: None) -> None:
    limited = asked(run, max_drop=60.0)
    made = with_fewer_tokens(limited, decision(limited)).pruned
    assert made is not None
    assert made.scored.drop <= 60
    assert work(made.schedule) < WHOLE
    assert "while at most 60 % of the answers change" in made.how
    assert made.how.endswith("counted here.")


@pytest.mark.parametrize(
    ("options", "meets"),
    [
        ({"budget_ms": 3.0}, True),
        ({}, False),
        ({"budget_ms": 3.0, "recipe": "prune-evit+auto"}, False),
        ({"budget_ms": 3.0, "recipe": "mixed"}, False),
    ],
)
def test_a_budget_of_time_is_spent_on_tokens_only_where_the_recipe_leaves_nothing_else(
    options: dict[str, object], meets: bool, run: Run
) -> None:
    found = asked(run, **options)
    assert meets_budget(found, decision(found)) == meets


def machine(slower: float, seen: list[Schedule]) -> Callable[[Run], float]:
    """A machine on which a whole artifact takes `slower` times its estimate."""

    def make(run: Run) -> float:
        assert run.pruned is not None
        seen.append(run.pruned.schedule)
        return slower * work(run.pruned.schedule)

    return make


def test_within_a_budget_the_artifact_made_last_is_the_one_returned(run: Run, counting: None) -> None:
    budget, seen = 0.8 * WHOLE, list[Schedule]()
    timed = asked(run, budget_ms=budget)
    made = within_budget(timed, decision(timed), machine(1.0, seen)).pruned
    assert made is not None
    assert [made.schedule] == seen
    assert work(made.schedule) <= budget
    assert f"to take at most {budget:g} ms" in made.how


def test_an_estimate_that_was_too_low_is_corrected_by_what_was_measured(run: Run, counting: None) -> None:
    budget, seen = 0.8 * WHOLE, list[Schedule]()
    timed = asked(run, budget_ms=budget)
    made = within_budget(timed, decision(timed), machine(1.2, seen)).pruned
    assert made is not None
    assert len(seen) > 1
    assert 1.2 * work(seen[0]) > budget >= 1.2 * work(seen[-1])
    assert made.schedule == seen[-1]


def test_a_budget_that_is_never_met_is_refused_with_the_best_that_was_measured(run: Run, counting: None) -> None:
    budget, times = 80.0, iter([84.0, 82.0, 83.0, 85.0])
    timed = asked(run, budget_ms=budget)
    with pytest.raises(TightfitError, match=rf"the fastest of {ROUNDS} took 82 ms\. Give a larger budget"):
        within_budget(timed, decision(timed), lambda _: next(times))
    assert next(times, None) is None


def test_a_budget_of_time_without_times_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stage, "costs_of", lambda *_: Costs(work, "work was counted", measured=False))
    timed = asked(run, budget_ms=3.0)
    with pytest.raises(TightfitError, match=r"--budget-ms can't be met for onnx: work was counted\. Give --keep"):
        within_budget(timed, decision(timed), lambda _: 1.0)


def test_more_tokens_than_half_precision_counts_are_refused_where_it_computes_in_halves(run: Run) -> None:
    half = decide(run.captured.graph, load("iphone-a17-pro"), "coreml", "prune-evit")
    single = decide(run.captured.graph, load("iphone-a17-pro"), "coreml", "prune-evit+float32")
    refuse_half_ranks(HALF_EXACT, half)
    refuse_half_ranks(HALF_EXACT + 1, single)
    with pytest.raises(TightfitError, match=r"has 2049 tokens: .* Add \+float32"):
        refuse_half_ranks(HALF_EXACT + 1, half)
