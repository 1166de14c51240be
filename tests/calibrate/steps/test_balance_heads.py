"""Balanced heads reach alike and compute the same attention; what is no plain attention is left alone."""

from dataclasses import replace

import pytest
import torch
from encoders import HEADS, LAYOUTS, WIDTH, Encoder, difference, encoder, planted, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import capture, context, nodes_of
from torch import nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.graph import clone, run
from calibrate.plan import Entry, Plan
from calibrate.steps.balance_heads import balanced

# float32 rounding through two blocks, relative to the output's reach.
TOLERANCE = 1e-5
PLAN = Plan(steps=("balance_heads", "quantize_dynamic"))
FLOAT = Plan(steps=("balance_heads",))


def balance(graph: GraphModule, plan: Plan = FLOAT, **parameters: float) -> tuple[GraphModule, list[Entry]]:
    result = clone(graph)
    plan = replace(plan, parameters={"balance_heads": parameters})
    return result, steps.apply("balance_heads", result, context(plan, [tokens(16, 5)]))


def uneven(attention: str = "fused") -> GraphModule:
    """An encoder whose first head has queries and values ten times as large as the others'."""
    model = planted(Encoder(attention, True))
    head = WIDTH // HEADS
    for block in model.blocks:
        weight = block.qkv.weight if attention == "fused" else block.q.weight
        weight.data[:head] *= 10
        value = block.qkv.weight.data[2 * WIDTH :] if attention == "fused" else block.v.weight.data
        value[:head] *= 10
    return capture(model, tokens())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_balancing_keeps_the_float_function_of_every_layout(layout: str, before: bool) -> None:
    graph = LAYOUTS[layout](before)
    result, ledger = balance(graph)
    assert [e.action for e in ledger].count("queries balanced with keys") == 2
    assert [e.action for e in ledger].count("values balanced with the output projection") == 2
    assert difference(graph, result) <= TOLERANCE
    assert len(result.graph.nodes) == len(graph.graph.nodes)


@pytest.mark.parametrize("attention", ["fused", "separate"])
def test_heads_of_queries_and_keys_reach_alike_afterwards(attention: str) -> None:
    def spread(graph: GraphModule) -> list[float]:
        return [float(r.max() / r.min()) for r in ranges(graph)]

    before, after = spread(uneven(attention)), spread(balance(uneven(attention))[0])
    assert before[0] > 5.0  # the planted head's queries
    assert after[0] < before[0] / 2
    assert after[0] == pytest.approx(after[1], rel=1e-4)  # float32: both sides have the same spread, sqrt(q * k)


def ranges(graph: GraphModule) -> list[torch.Tensor]:
    """The reach of every head of the first attention's queries and keys."""
    found: list[torch.Tensor] = []

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n is nodes_of(graph, "attention")[0]:
                found.extend(self.env[a].abs().amax((0, 2, 3)) for a in n.args[:2])
            return value

    with torch.no_grad():
        Run(graph, garbage_collect_values=False).run(tokens(16, 5))
    return found


def test_keys_that_are_not_a_layers_own_output_are_left_alone() -> None:
    graph = encoder("rotary")
    result, ledger = balance(graph)
    reasons = {e.layer: e.reason for e in ledger if e.action == "left alone"}
    assert len(reasons) == 2
    assert all("not the plain outputs of linear layers" in r for r in reasons.values())
    assert difference(graph, result) <= TOLERANCE  # values are still balanced


def test_values_stay_where_the_quantized_projection_would_not_gain() -> None:
    graph = encoder()
    _, ledger = balance(graph, PLAN, least_gain=1.0)
    assert [e.action for e in ledger if "projection" in e.reason] == ["left alone"] * 2


def test_a_model_without_attention_is_left_alone_bit_by_bit() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), tokens())
    result, (entry,) = balance(graph)
    assert entry.action == "left alone"
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), heads=st.integers(1, 8))
def test_balanced_ranges_are_proportional_and_their_product_is_kept(seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(heads, generator=generator).double() + 0.01 for _ in range(2))
    scale = balanced(left, right)
    ratio = (left / scale) / (right * scale)
    assert float(ratio.max() / ratio.min()) < 1 + 1e-9  # float64
    assert abs(float(scale.log().mean())) < 1e-9
