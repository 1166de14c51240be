"""Rotating the residual stream keeps the float function and helps; half-known streams are refused."""

from dataclasses import replace

import pytest
import torch
from encoders import LAYOUTS, WIDTH, Encoder, difference, encoder, operators, planted, sqnr, tokens
from small_graphs import ISLANDS, Made, capture, context, images, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.graph import clone, constant, run
from calibrate.layer_trial import activations, watch
from calibrate.layer_trial import quantized as quantized_rows
from calibrate.plan import Entry, Plan

# float32 rounding through two blocks, relative to the output's reach.
TOLERANCE = 1e-5
PLAN = Plan(steps=("rotate", "quantize_dynamic"))
ALWAYS = -9.0  # least_gain: rotated, gain or not


def rotated(graph: GraphModule, plan: Plan = PLAN, gain: float = ALWAYS, x: Tensor | None = None) -> tuple:
    result = clone(graph)
    plan = replace(plan, parameters={"rotate": {"least_gain": gain}})
    batch = tokens(16, 5) if x is None else x
    ledger: list[Entry] = steps.apply("rotate", result, context(plan, [batch]))
    return result, ledger


def loud() -> GraphModule:
    """A pre-LN encoder whose residual stream has three channels far beyond the others."""
    model = Encoder("fused", True)
    model.embed.weight.data[[2, 11, 29]] *= 40
    return capture(model.eval(), tokens())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_keeps_the_float_function_of_every_pre_norm_layout(layout: str) -> None:
    graph = LAYOUTS[layout](True)
    result, (entry,) = rotated(graph)
    assert entry.action == "rotated", entry.reason
    assert difference(graph, result) <= TOLERANCE
    assert operators(result) == operators(graph)


@pytest.mark.parametrize("options", [{"pooled": True}, {"layer_scale": True}])
def test_a_mean_over_tokens_and_layer_scales_are_passed(options: dict[str, bool]) -> None:
    graph = encoder("fused", True, **options)
    result, ledger = rotated(graph)
    assert ledger[-1].action == "rotated", ledger[-1].reason
    assert [e.action for e in ledger].count("layer scale folded") == (4 if "layer_scale" in options else 0)
    assert difference(graph, result) <= TOLERANCE


class Patches(nn.Module):
    """images [N, 3, 8, 8] -> scores: convolutional patches, class token, positions, a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.norm1, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2, self.head = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH, bias=False), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm1(x))))
        return self.head(self.norm(x)[:, 0])


def test_patches_class_token_and_positions_are_rotated_too() -> None:
    graph = capture(planted(Patches()), images())
    result, (entry,) = rotated(graph, x=images(8))
    assert entry.action == "rotated", entry.reason
    assert "4 writers, 2 readers" in entry.reason  # patches, token, positions, fc2; fc1, head
    assert difference(graph, result, images(5, seed=3)) <= TOLERANCE


@pytest.mark.parametrize("plan", [PLAN, replace(ISLANDS, steps=("rotate", "quantize_static"))])
def test_loud_channels_cost_int8_less_after_rotation(plan: Plan) -> None:
    graph = loud()
    result, (entry,) = rotated(graph, plan, gain=0.02)
    assert entry.action == "rotated"
    assert activation_db(result, plan) > activation_db(graph, plan) + 3.0  # what the layers after LayerNorms read
    x = tokens(32, 7)

    def quantized(g: GraphModule) -> GraphModule:
        made = clone(g)
        steps.apply(plan.steps[-1], made, context(plan, [tokens(16, 5)]))
        return made

    # The whole model gains less: what proj and fc2 read is as it was.
    assert sqnr(graph, quantized(result), x) > sqnr(graph, quantized(graph), x) + 0.2


def activation_db(graph: GraphModule, plan: Plan) -> float:
    """Signal over noise of the LayerNorms' outputs as 8-bit codes with one scale each, in dB, averaged."""
    how = activations(plan)
    assert how is not None
    found = []
    for seen in watch(graph, nodes_of(graph, "layer_norm"), [[tokens(16, 5)]]).values():
        rows, codes = torch.cat(seen.rows), torch.cat(quantized_rows(seen, plan, how))
        found.append(10 * torch.log10(rows.square().sum() / (codes - rows).square().sum()))
    return float(torch.stack(found).mean())


def test_layer_norms_are_left_without_affine() -> None:
    result, _ = rotated(encoder())
    for norm in nodes_of(result, "layer_norm"):
        assert bool((constant(result, norm.args[2]) == 1).all())
        assert not constant(result, norm.args[3]).any()


def test_a_stream_that_gains_nothing_is_left_alone_bit_by_bit() -> None:
    graph = encoder()
    result, (entry,) = rotated(graph, gain=1.0)
    assert entry.action == "left alone"
    assert "would not gain" in entry.reason
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_post_norm_is_refused_because_its_affine_stays_in_the_stream(layout: str) -> None:
    graph = LAYOUTS[layout](False)
    result, (entry,) = rotated(graph)
    assert entry.action == "left alone"
    assert "post-LN" in entry.reason
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


def residual(extra: str) -> nn.Module:
    def forward(m: Made, x: Tensor) -> Tensor:
        x = m.embed(x)
        y = x + m.fc(m.norm(x))
        if extra == "relu":
            y = nn.functional.relu(y)
        y = m.last(y)
        return y if extra == "output" else m.head(y) + (x.sum() if extra == "sum" else 0)

    parts = {"embed": nn.Linear(8, 16), "fc": nn.Linear(16, 16), "head": nn.Linear(16, 3)}
    return Made(forward, norm=nn.LayerNorm(16), last=nn.LayerNorm(16), **parts)


@pytest.mark.parametrize(
    ("extra", "named"),
    [("relu", "relu relu"), ("output", "the model's output"), ("sum", "sum sum")],
)
def test_one_operator_that_is_not_known_is_named_and_nothing_is_changed(extra: str, named: str) -> None:
    torch.manual_seed(0)
    graph = capture(residual(extra), tokens())
    result, (entry,) = rotated(graph)
    assert entry.action == "left alone"
    assert named in entry.reason
    assert torch.equal(run(graph, [tokens()])[0], run(result, [tokens()])[0])


def test_the_same_residual_block_without_that_operator_is_rotated() -> None:
    torch.manual_seed(0)
    graph = capture(residual("nothing"), tokens())
    result, (entry,) = rotated(graph)
    assert entry.action == "rotated", entry.reason
    assert difference(graph, result) <= TOLERANCE
