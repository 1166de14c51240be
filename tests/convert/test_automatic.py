"""What auto keeps, leaves out, and puts back to float; the same choice every time."""

from dataclasses import replace

import pytest
import torch
from small_models import cnn, prepared
from torch import nn

from convert import automatic
from convert.automatic import improve, placed
from convert.compress import Builder
from convert.planning import Decision, decide
from device_profiles import load


def started(module: nn.Module, example: torch.Tensor, target: str = "onnx") -> tuple[Builder, Decision]:
    model, data = prepared(module, example)
    return Builder(model, data), decide(model.graph, load("generic-x86"), target, "auto")


@pytest.fixture(scope="module")
def uneven() -> tuple[Builder, Decision]:
    return started(cnn(), torch.zeros(2, 3, 12, 12))


def test_a_step_that_helps_is_kept_and_the_ledger_says_what_it_brought(uneven: tuple[Builder, Decision]) -> None:
    builder, decision = uneven
    plain, made = builder.build(decision), improve(builder, decision, 20.0, "normal")
    assert builder.score(made) > builder.score(plain) + 1
    assert "equalize" in made.decision.plan.steps
    (entry,) = [e for e in made.ledger if e.step == "auto" and e.layer == "equalize"]
    assert entry.action == "kept"
    assert "dB with it and" in entry.reason
    assert "equalize" in made.notes[0]


def test_a_step_that_harms_is_left_out(uneven: tuple[Builder, Decision], monkeypatch: pytest.MonkeyPatch) -> None:
    builder, decision = uneven
    monkeypatch.setattr(automatic, "GAIN_DB", 1000.0)  # nothing helps that much
    made = improve(builder, decision, 0.0, "normal")
    assert "equalize" not in made.decision.plan.steps
    assert {e.action for e in made.ledger if e.step == "auto"} <= {"left out", "not needed"}


def test_no_effort_is_the_recipe_alone(uneven: tuple[Builder, Decision]) -> None:
    builder, decision = uneven
    made = improve(builder, decision, 0.0, "fast")
    assert made.decision.plan.steps == decision.plan.steps
    assert not [e for e in made.ledger if e.step == "auto"]


def test_the_same_input_gives_the_same_weights(uneven: tuple[Builder, Decision]) -> None:
    _, decision = uneven
    graphs = []
    for _ in range(2):
        builder, _ = started(cnn(), torch.zeros(2, 3, 12, 12))
        graphs.append(improve(builder, decision, 20.0, "normal").graph.state_dict())
    assert graphs[0].keys() == graphs[1].keys()
    assert all(torch.equal(graphs[0][name], graphs[1][name]) for name in graphs[0])


def test_layers_go_back_to_float_until_the_goal_holds_and_are_named(uneven: tuple[Builder, Decision]) -> None:
    builder, decision = uneven
    goal = builder.score(builder.build(decision)) + 3
    made = improve(builder, replace(decision, plan=replace(decision.plan, steps=decision.plan.steps)), goal, "fast")
    assert made.restored
    assert builder.score(made) >= goal
    assert all(f"below {goal:.0f} dB" in reason for reason in made.restored.values())


@pytest.mark.parametrize(
    ("present", "name", "expected"),
    [
        (("fold_batchnorm", "quantize_static"), "equalize", ("fold_batchnorm", "equalize", "quantize_static")),
        (("quantize_dynamic", "half_weights"), "gptq", ("quantize_dynamic", "gptq", "half_weights")),
        (("quantize_static", "correct_bias"), "gptq", ("quantize_static", "gptq", "correct_bias")),
    ],
)
def test_a_step_is_put_where_it_belongs(present: tuple[str, ...], name: str, expected: tuple[str, ...]) -> None:
    assert placed(present, name) == expected
