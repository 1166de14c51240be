"""Folding batch norm changes no output, and leaves alone what it cannot fold."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import PIECES, inputs, network
from small_graphs import ISLANDS, Made, capture, context, images, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.graph import clone, run

# float32 rounding of one layer, relative to the output's range.
TOLERANCE = 1e-5


def trained(module: nn.Module, seed: int) -> nn.Module:
    """Give every batch norm statistics and parameters as training leaves them, small variances included."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            norm.running_mean.normal_(0, 2, generator=generator)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) * 4 + 1e-3)
            if norm.affine:
                norm.weight.data.normal_(0, 1.5, generator=generator)
                norm.bias.data.normal_(0, 1.5, generator=generator)
    return module.eval()


def folded(graph: GraphModule) -> tuple[GraphModule, list[str]]:
    result = clone(graph)
    ledger = steps.apply("fold_batchnorm", result, context(ISLANDS))
    return result, [e.action for e in ledger]


def assert_same_function(graph: GraphModule, other: GraphModule, *inputs: Tensor) -> None:
    (before,), (after,) = run(graph, inputs), run(other, inputs)
    assert before.shape == after.shape
    difference, reach = float((before - after).abs().max()), float(before.abs().max())
    assert difference <= TOLERANCE * reach


@settings(max_examples=12, deadline=None)
@given(
    channels=st.sampled_from([1, 3, 4]),
    out=st.sampled_from([4, 8]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    depthwise=st.booleans(),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    seed=st.integers(0, 2**16),
)
def test_folding_into_any_convolution_keeps_the_float_function(
    channels: int, out: int, kernel: int, stride: int, depthwise: bool, bias: bool, affine: bool, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    groups = channels if depthwise and out % channels == 0 else 1
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    graph = capture(
        trained(nn.Sequential(conv, nn.BatchNorm2d(out, eps=eps, affine=affine)), seed), images(2, channels)
    )
    result, actions = folded(graph)
    assert actions == ["folded"]
    assert not nodes_of(result, "batch_norm")
    assert_same_function(graph, result, images(5, channels, seed=seed))


@settings(max_examples=6, deadline=None)
@given(bias=st.booleans(), seed=st.integers(0, 2**16))
def test_folding_into_a_linear_layer_keeps_the_float_function(bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = trained(nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5)), seed)
    graph = capture(model, torch.randn(3, 6))
    result, actions = folded(graph)
    assert actions == ["folded"]
    assert_same_function(graph, result, torch.randn(9, 6))


def test_a_one_dimensional_convolution_folds_too() -> None:
    graph = capture(trained(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), 0), torch.randn(2, 3, 9))
    result, actions = folded(graph)
    assert actions == ["folded"]
    assert_same_function(graph, result, torch.randn(2, 3, 9))


def test_the_decomposed_batch_norm_of_a_functionalised_program_folds_without_changing_the_function() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), 0)
    program = torch.export.export(model, (images(),)).run_decompositions({})
    graph = program.module(check_guards=False)
    assert any("_native_batch_norm" in str(n.target) for n in graph.graph.nodes)  # it returns a tuple
    result, actions = folded(graph)
    assert actions == ["folded"]
    assert_same_function(graph, result, images())


def refusal(model: nn.Module, *inputs: Tensor) -> str:
    graph = capture(trained(model, 0), *inputs)
    result = clone(graph)
    (entry,) = steps.apply("fold_batchnorm", result, context(ISLANDS))
    assert entry.action == "left alone"
    assert torch.equal(run(graph, inputs)[0], run(result, inputs)[0])
    return entry.reason


def test_a_convolution_that_something_else_reads_keeps_its_batch_norm() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    model = Made(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert "conv is read by something else" in refusal(model, images())


def test_a_batch_norm_after_a_pool_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4))
    assert "no convolution or linear layer" in refusal(model, images())


def test_a_batch_norm_over_tokens_is_not_folded_into_the_linear_layer_before_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(7))
    assert "not the linear layer's outputs" in refusal(model, torch.randn(3, 7, 6))


def test_a_batch_norm_that_uses_the_statistics_of_the_batch_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert "statistics of the batch" in refusal(model, images())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=8), st.integers(0, 2**16))
def test_no_random_graph_changes_its_outputs(pieces: list[str], seed: int) -> None:
    graph = network([*pieces, "norm"], seed)
    result, actions = folded(graph)
    assert actions
    x = inputs(seed)
    for before, after in zip(run(graph, [x]), run(result, [x]), strict=True):
        assert float((before - after).abs().max()) <= TOLERANCE * float(before.abs().max())


def test_the_property_notices_a_norm_that_was_dropped() -> None:
    graph = network(["conv", "norm"], 0)
    wrong = clone(graph)
    (norm,) = nodes_of(wrong, "batch_norm")
    norm.replace_all_uses_with(norm.args[0])
    wrong.recompile()
    (before, *_), (after, *_) = run(graph, [inputs(0)]), run(wrong, [inputs(0)])
    assert float((before - after).abs().max()) > 1e3 * TOLERANCE * float(before.abs().max())


def test_a_norm_before_convolutions_without_padding_moves_into_all_of_them() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.wide(y).mean((2, 3)) + m.grouped(y).mean((2, 3))

    children = {"norm": nn.BatchNorm2d(4), "wide": nn.Conv2d(4, 6, 3), "grouped": nn.Conv2d(4, 6, 1, groups=2)}
    graph = capture(trained(Made(forward, **children), 0), images(2, 4))
    result, actions = folded(graph)
    assert actions == ["folded into wide, grouped"]
    assert not nodes_of(result, "batch_norm")
    assert_same_function(graph, result, images(5, 4, seed=1))


def test_a_norm_before_a_padded_convolution_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    assert "no convolution or linear layer" in refusal(model, images())


def test_a_norm_between_a_padded_convolution_and_a_norm_folds_with_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    graph = capture(trained(model, 0), images())
    result, actions = folded(graph)
    assert actions == ["folded", "folded"]
    assert_same_function(graph, result, images(5, seed=1))


def test_a_transposed_convolution_takes_its_norm_in_every_group() -> None:
    for groups in (1, 2):
        torch.manual_seed(groups)
        conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=groups)
        graph = capture(trained(nn.Sequential(conv, nn.BatchNorm2d(6)), groups), images(2, 4))
        result, actions = folded(graph)
        assert actions == ["folded"]
        assert_same_function(graph, result, images(5, 4, seed=1))


def test_what_is_known_of_the_outputs_stays_with_the_layer() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0)
    result, _ = folded(capture(model, images()))
    mean, deviation = nodes_of(result, "conv")[0].meta["bn"]
    assert torch.equal(mean, model[1].bias)
    assert torch.equal(deviation, model[1].weight.abs())
