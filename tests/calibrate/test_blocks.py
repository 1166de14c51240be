"""Blocks end where one tensor carries everything on; the walk shows each what both graphs compute there."""

from dataclasses import replace

import torch
from small_graphs import ISLANDS, Made, capture, context, images
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.blocks import Unit, UnitData, block_units, layer_units, walk_units
from calibrate.graph import kind, run
from calibrate.plan import WeightFormat
from calibrate.training import Runner

PLAN = replace(ISLANDS, weight=WeightFormat(4), dynamic_kinds=frozenset({"conv", "linear"}))


class Encoder(nn.Module):
    """One transformer block on tokens with a mask of their own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        q = self.query(y)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, q, self.value(y), mask))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def encoder(by: str = "quantize_dynamic") -> tuple[GraphModule, GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(6, 5, 16), torch.zeros(6, 5, 5)]
    graph = capture(Encoder(), *inputs)
    setting = context(PLAN, inputs)
    steps.apply(by, graph, setting)
    assert setting.float_graph is not None
    return setting.float_graph, graph, inputs


def names(units: list[Unit]) -> list[list[str]]:
    return [[layer.name for layer in u.layers] for u in units]


def test_attention_mlp_and_head_of_a_transformer_are_blocks_though_a_mask_crosses() -> None:
    reference, graph, _ = encoder()
    assert names(block_units(reference, graph)) == [
        ["stem"],
        ["query", "value", "out"],
        ["up", "down"],
        ["head"],
    ]


def test_a_skip_over_two_layers_holds_them_together() -> None:
    stem, one, two = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def skipping(m: Made, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        return x + m.two(torch.relu(m.one(x)))

    def chained(m: Made, x: Tensor) -> Tensor:
        return m.two(torch.relu(m.one(torch.relu(m.stem(x)))))

    found = []
    for call in (skipping, chained):
        graph = capture(Made(call, stem=stem, one=one, two=two), images())
        setting = context(PLAN, [images(8)])
        steps.apply("quantize_static", graph, setting)
        assert setting.float_graph is not None
        found.append(names(block_units(setting.float_graph, graph)))
    assert found == [[["stem"], ["one", "two"]], [["stem"], ["one"], ["two"]]]


def test_a_block_ends_behind_its_relu_not_between_layer_and_relu() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), images())
    setting = context(PLAN, [images(8)])
    steps.apply("quantize_static", graph, setting)
    assert setting.float_graph is not None
    for units in (block_units(setting.float_graph, graph), layer_units(setting.float_graph, graph)):
        assert [kind(u.exit) for u in units] == ["relu", "conv"]


def test_the_walk_gives_each_block_what_both_graphs_hold_there() -> None:
    for by in ("quantize_dynamic", "quantize_weights"):
        reference, graph, inputs = encoder(by)
        for units in (block_units(reference, graph), layer_units(reference, graph)):
            seen: list[UnitData] = []
            walk_units(reference, graph, [inputs], units, seen.append)
            assert [d.unit for d in seen] == units
            if seen[-1].unit.layers[-1].name == "head":  # where it is no layer in codes, the last block ends before
                assert torch.equal(seen[-1].targets[0], run(reference, inputs)[0])
            for data in seen:
                runner = Runner(graph, {})
                env = dict(zip(runner.placeholders, inputs, strict=True))
                full = runner.run(runner.nodes, dict(env))
                if data.unit.entry is not None:
                    assert data.inputs is not None
                    env[data.unit.entry] = data.inputs[0]
                part = runner.run(data.unit.nodes, runner.run(data.unit.side, env))
                # The walk runs the graph's own kernels, the runner float products of the same numbers.
                torch.testing.assert_close(part[data.unit.exit], full[data.unit.exit], rtol=1e-4, atol=1e-4)
                assert not torch.equal(part[data.unit.exit], data.targets[0])  # four bits are not float
