"""The race between candidate ranges is decided by what each does to the model's outputs."""

import numpy as np
import torch
from small_graphs import Made, capture, images, nodes_of, only
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import race as racing
from calibrate.histogram import Histogram
from calibrate.placement import Sites
from calibrate.plan import QParams
from calibrate.race import race, winner


def option(low: float, high: float, observer: str) -> QParams:
    scale = (high - low) / 255
    return QParams(scale, round(-128 - low / scale), -128, 127, "int8", observer)


class Track:
    """A graph of which one tensor, its input unless named, takes part in a race."""

    def __init__(self, graph: GraphModule, name: str | None = None) -> None:
        self.graph = graph
        self.name = name or str(only(graph, "input").name)
        self.sites = Sites(group_of={self.name: 0}, readers={self.name: None})

    def winner(self, options: list[QParams], x: Tensor, seen: Tensor | None = None) -> QParams:
        histogram = Histogram()
        histogram.add(x if seen is None else seen)
        return race(self.graph, self.sites, {0: options}, {self.name: histogram}, [[x]])[0]


def linear(weight: list[list[float]]) -> GraphModule:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return capture(nn.Sequential(layer), torch.randn(4, len(weight[0])))


def outlier_in_column_0() -> Tensor:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[:, 0] = 1000.0
    return x


def test_clipping_what_the_outputs_do_not_hear_costs_nothing() -> None:
    wide, narrow = option(-4, 1000, "minmax"), option(-4, 4, "percentile")
    deaf, hearing = Track(linear([[0.0, 1.0, 1.0]])), Track(linear([[1.0, 1.0, 1.0]]))
    assert deaf.winner([wide, narrow], outlier_in_column_0()) is narrow
    assert hearing.winner([wide, narrow], outlier_in_column_0()) is wide


def test_a_later_layer_that_ignores_a_channel_makes_its_clipping_free_too() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.last(m.first(x))

    for hears, wins in ((0.0, 1), (1.0, 0)):
        model = Made(forward, first=nn.Linear(3, 3, bias=False), last=nn.Linear(3, 1, bias=False))
        model.first.weight.data = torch.eye(3)
        model.last.weight.data = torch.tensor([[hears, 1.0, 1.0]])
        track = Track(capture(model, torch.randn(4, 3)))
        options = [option(-4, 1000, "minmax"), option(-4, 4, "percentile")]
        assert track.winner(options, outlier_in_column_0()) is options[wins]


def test_a_skip_connection_is_heard_beside_the_layer_that_reads_the_tensor() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.linear(x) + x

    model = Made(forward, linear=nn.Linear(3, 3, bias=False))
    model.linear.weight.data.zero_()  # the layer ignores the outlier, the add does not
    track = Track(capture(model, torch.randn(4, 3)))
    wide = option(-4, 1000, "minmax")
    assert track.winner([wide, option(-4, 4, "percentile")], outlier_in_column_0()) is wide


def test_how_often_values_lie_far_out_is_counted_in_all_samples_not_in_those_of_the_race() -> None:
    track = Track(linear([[1.0]]))
    few = torch.rand(64, 1, generator=torch.Generator().manual_seed(2))
    wide, narrow = option(0, 100, "minmax"), option(0, 1, "mse")
    assert track.winner([wide, narrow], few) is narrow
    assert track.winner([wide, narrow], few, seen=torch.cat([few, torch.full((32, 1), 100.0)])) is wide


def test_a_batch_larger_than_what_may_be_held_is_run_in_parts_with_the_same_winner(monkeypatch: object) -> None:
    options = [option(-4, 1000, "minmax"), option(-4, 4, "percentile")]
    whole = Track(linear([[0.0, 1.0, 1.0]])).winner(options, outlier_in_column_0())
    monkeypatch.setattr(racing, "HELD", 12)  # type: ignore[attr-defined]
    assert Track(linear([[0.0, 1.0, 1.0]])).winner(options, outlier_in_column_0()) is whole


def test_a_tensor_that_reaches_no_output_by_derivatives_is_judged_by_its_own_error_and_says_so() -> None:
    graph = capture(Made(lambda m, x: (x * 1.0).argmax(-1)), torch.randn(4, 3))
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    won = Track(graph).winner([option(0, 10, "minmax"), option(0, 1, "mse")], x)
    assert won.observer == "mse, judged by the tensor's own error"


def test_integers_in_and_codes_behind_an_embedding_race_as_others_do() -> None:
    model = Made(lambda m, ids: m.last(m.table(ids)), table=nn.Embedding(10, 4), last=nn.Linear(4, 2))
    ids = torch.arange(10).repeat(8).view(16, 5)
    graph = capture(model, ids)
    track = Track(graph, str(only(graph, "embedding").name))
    values = model.table.weight.detach()
    wide, narrow = option(-100, 100, "minmax"), option(float(values.min()), float(values.max()), "mse")
    histogram = Histogram()
    histogram.add(values)
    assert race(graph, track.sites, {0: [wide, narrow]}, {track.name: histogram}, [[ids]])[0] is narrow


def test_of_many_samples_only_a_few_run() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3)), images())
    track = Track(graph)
    histogram = Histogram()
    for _ in range(30):
        histogram.add(images(16))
    done: list[int] = []
    options = {0: [option(-4, 4, "minmax"), option(-3, 3, "mse")]}
    race(graph, track.sites, options, {track.name: histogram}, ([images(16)] for _ in range(30)), done.append)
    assert done == [16, 32]  # of 30 batches two: 32 samples race, however many there are


def test_convolutions_in_channels_last_order_are_read_in_the_order_they_lie_in_memory() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())
    name = str(nodes_of(graph, "relu")[0].name)
    with torch.no_grad():
        y = graph(images(32))[0]
    histogram = Histogram()
    histogram.add(y)
    wide, fitting = option(0, 1000, "minmax"), option(0, float(y.max()), "mse")
    sites = Sites(group_of={name: 0}, readers={name: None})
    plain = race(graph, sites, {0: [wide, fitting]}, {name: histogram}, [[images(32)]])[0]
    last = images(32).contiguous(memory_format=torch.channels_last)
    assert plain is fitting
    assert race(graph, sites, {0: [wide, fitting]}, {name: histogram}, [[last]])[0] is fitting


def test_the_margin_is_exact() -> None:
    assert winner(np.array([1.0, racing.MARGIN])) == 0
    assert winner(np.array([1.0, racing.MARGIN * 0.999])) == 1
    assert winner(np.array([0.0, 0.0])) == 0
