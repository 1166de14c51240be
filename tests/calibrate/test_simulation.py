"""The simulation against exact integer arithmetic in NumPy, bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_graphs import ISLANDS, Made, capture, context, images, only
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibrate import qdq, steps
from calibrate.graph import constant, run
from calibrate.plan import Plan
from calibrate.simulation import simulate

FLOAT_OUT = replace(ISLANDS, quantize_outputs=frozenset(), quantize_inputs=frozenset({"conv", "linear"}))


def quantized(module: nn.Module, plan: Plan, *inputs: Tensor) -> GraphModule:
    graph = capture(module, *inputs)
    steps.apply("quantize_static", graph, context(plan, list(inputs)))
    return graph


class Integers:
    """A quantized conv or linear as integers: codes minus zero points, int64, and the float32 numbers around them."""

    def __init__(self, graph: GraphModule, node: Node, x: Tensor) -> None:
        source, weight = node.args[:2]
        assert isinstance(source, Node)
        assert isinstance(weight, Node)
        scale, zero = source.args[1:3]
        codes = qdq.QUANTIZE(x, *source.args[1:])
        self.x: NDArray[np.int64] = codes.numpy().astype(np.int64) - zero
        self.weight: NDArray[np.int64] = constant(graph, weight.args[0]).numpy().astype(np.int64)
        scales = constant(graph, weight.args[1]).numpy()
        self.unit: NDArray[np.float32] = np.float32(scale) * scales
        bias = node.args[2] if len(node.args) > 2 else None
        values = constant(graph, bias).numpy() if isinstance(bias, Node) else np.zeros(len(scales), np.float32)
        self.bias: NDArray[np.int64] = np.rint(values.astype(np.float64) / self.unit.astype(np.float64)).astype(
            np.int64
        )

    def linear(self) -> NDArray[np.int64]:
        return self.x @ self.weight.T + self.bias

    def conv(self, stride: int, padding: int) -> NDArray[np.int64]:
        """Direct convolution, one group, zero padding."""
        x = np.pad(self.x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        kernel = self.weight.shape[-1]
        windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
        return np.einsum("nchwij,ocij->nohw", windows, self.weight) + self.bias[:, None, None]


def requantized(total: NDArray[np.int64], unit: NDArray[np.float32], quantize: Node) -> NDArray[np.float32]:
    """Accumulators times the float32 factor, to codes, and dequantized again."""
    scale, zero, low, high = quantize.args[1:5]
    factor = unit / np.float32(scale)
    codes = np.clip(np.rint(total.astype(np.float32) * factor) + zero, low, high)
    return ((codes - zero) * np.float32(scale)).astype(np.float32)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), width=st.sampled_from([3, 64, 700]), bias=st.sampled_from([0.0, 1.0, 300.0]))
def test_a_linear_layer_is_exact_integer_arithmetic(seed: int, width: int, bias: float) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(width, 5)
    layer.bias.data *= bias  # 300: codes of a million and more, beyond a fixed tolerance of float32
    x = torch.randn(6, width)
    graph = quantized(nn.Sequential(layer), FLOAT_OUT, x)
    whole = Integers(graph, only(graph, "linear"), x)
    (got,) = simulate(graph)([x])
    assert np.array_equal(got.numpy(), whole.linear().astype(np.float32) * whole.unit)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), stride=st.sampled_from([1, 2]), padding=st.sampled_from([0, 1]))
def test_a_convolution_is_exact_integer_arithmetic(seed: int, stride: int, padding: int) -> None:
    torch.manual_seed(seed)
    x = images(3, seed=seed) + 0.7  # a zero point far from the middle: padding must be codes of zero
    graph = quantized(nn.Sequential(nn.Conv2d(3, 4, 3, stride, padding)), FLOAT_OUT, x)
    whole = Integers(graph, only(graph, "conv"), x)
    (got,) = simulate(graph)([x])
    expected = whole.conv(stride, padding).astype(np.float32) * whole.unit[:, None, None]
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6()], ids=["none", "relu", "relu6"])
def test_a_quantized_output_is_requantized_by_one_float32_multiplication(activation: nn.Module | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16) * 4
    layers = [nn.Linear(16, 8)] + ([activation] if activation is not None else [])
    graph = quantized(nn.Sequential(*layers), ISLANDS, x)
    whole = Integers(graph, only(graph, "linear"), x)
    last = [n for n in graph.graph.nodes if n.target is qdq.QUANTIZE][-1]
    expected = requantized(whole.linear(), whole.unit, last)
    if activation is not None:
        expected = expected.clip(0, None)
    (got,) = simulate(graph)([x])
    if isinstance(activation, nn.ReLU6):
        scale = last.args[1]
        expected = expected.clip(None, np.float32(round(6 / scale)) * np.float32(scale))
    assert np.array_equal(got.numpy(), expected)


def test_the_simulation_is_within_a_step_of_the_graph_as_written() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = quantized(model, ISLANDS, images(8))
    (as_written,), (simulated,) = run(graph, [images(8)]), simulate(graph)([images(8)])
    step = [n for n in graph.graph.nodes if n.target is qdq.QUANTIZE][-1].args[1]
    # A sum that lies between two codes may round to either; one code of the first layer hardly moves the second's.
    assert float((as_written - simulated).abs().max()) <= step * 1.001
    assert float((as_written != simulated).float().mean()) < 0.02


def test_accumulators_too_large_for_float32_are_exact_all_the_same() -> None:
    # 2000 products of 255 * 127 reach 6.5e7, beyond 2^24.
    layer = nn.Linear(2000, 1, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight.data[0, ::3] = 0.37
    x = torch.rand(4, 2000, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    graph = quantized(nn.Sequential(layer), FLOAT_OUT, x)
    whole = Integers(graph, only(graph, "linear"), x)
    total = whole.linear()
    assert total.max() > 2**24
    (got,) = simulate(graph)([x])
    assert np.array_equal(got.numpy(), total.astype(np.float32) * whole.unit)


def test_a_bias_that_is_no_multiple_of_the_step_is_added_after_the_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    graph = quantized(nn.Sequential(nn.Linear(6, 3)), replace(FLOAT_OUT, int32_bias=False), x)
    whole = Integers(graph, only(graph, "linear"), x)
    bias = constant(graph, only(graph, "linear").args[2]).numpy()
    expected = (whole.linear() - whole.bias).astype(np.float32) * whole.unit + bias
    assert np.array_equal(simulate(graph)([x])[0].numpy(), expected)


def test_a_mean_of_codes_is_an_exact_sum_and_one_multiplication() -> None:
    model = Made(lambda m, x: m.conv(x).relu().mean((2, 3)), conv=nn.Conv2d(3, 4, 3))
    graph = quantized(model, ISLANDS, images(8))
    mean = only(graph, "mean")
    read, write = mean.args[0], next(iter(mean.users))
    codes: dict[Node, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            codes[n] = value = super().run_node(n)
            return value

    Watch(graph).run(images(8))
    steps_in = np.rint(codes[read].double().numpy() / read.args[1]).astype(np.int64)
    factor = np.float32(read.args[1]) / (np.float32(write.args[1]) * np.float32(36))
    expected = requantized_mean(steps_in.sum((2, 3)), factor, write)
    got = simulate(graph)([images(8)])[0].numpy()
    # The first convolution may round differently in the simulation, by one code in few places.
    assert np.abs(got - expected).max() <= write.args[1] * 1.001
    assert (got != expected).mean() < 0.05


def requantized_mean(total: NDArray[np.int64], factor: np.float32, quantize: Node) -> NDArray[np.float32]:
    scale, zero, low, high = quantize.args[1:5]
    codes = np.clip(np.rint(total.astype(np.float32) * factor) + zero, low, high)
    return ((codes - zero) * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize("adder", ["float", "fixed_point"])
def test_an_add_of_codes_is_within_a_step_of_the_add_of_their_values(adder: str) -> None:
    model = Made(lambda m, x: m.one(x) + m.two(x), one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(3, 4, 3))
    graph = quantized(model, ISLANDS, images(8))
    (as_written,), (got,) = run(graph, [images(8)]), simulate(graph, adder=adder)([images(8)])  # type: ignore[arg-type]
    step = [n for n in graph.graph.nodes if n.target is qdq.QUANTIZE][-1].args[1]
    assert float((as_written - got).abs().max()) <= step * 1.001


def test_half_precision_rounds_every_value_to_float16() -> None:
    graph = capture(Made(lambda m, x: (x * 1.0001 + 1000.3) * 3.0), torch.randn(4, 3))
    x = torch.randn(4, 3)
    (got,) = simulate(graph, "float16")([x])
    expected = (((x.half().float() * 1.0001).half().float() + 1000.3).half().float() * 3.0).half().float()
    assert torch.equal(got, expected)
    assert not torch.equal(got, run(graph, [x])[0])


def test_half_precision_saturates_instead_of_overflowing() -> None:
    graph = capture(Made(lambda m, x: x * 1e6), torch.randn(4, 3))
    (got,) = simulate(graph, "float16")([torch.tensor([[1.0, -1.0, 0.0]] * 2)])
    assert got[0].tolist() == [65504.0, -65504.0, 0.0]


def test_a_float_graph_is_run_as_it_is_written() -> None:
    graph = capture(nn.Sequential(nn.Linear(6, 3), nn.GELU()), torch.randn(4, 6))
    x = torch.randn(4, 6)
    assert torch.equal(simulate(graph)([x])[0], run(graph, [x])[0])


def test_jitter_moves_values_to_be_quantized_the_same_way_every_time() -> None:
    graph = quantized(nn.Sequential(nn.Linear(6, 3)), ISLANDS, torch.randn(64, 6))
    x = torch.randn(64, 6)
    plain = simulate(graph)([x])[0]
    moved, again = simulate(graph, jitter=0.05)([x])[0], simulate(graph, jitter=0.05)([x])[0]
    assert torch.equal(moved, again)
    assert not torch.equal(moved, plain)


def test_a_simulation_can_run_batches_of_any_size_one_after_the_other() -> None:
    graph = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ISLANDS, images(4))
    call = simulate(graph)
    whole = call([images(7)])[0]
    assert torch.equal(torch.cat([call([images(7)[:3]])[0], call([images(7)[3:]])[0]]), whole)


@pytest.mark.parametrize("width", [8, 3000])
@pytest.mark.parametrize("scheme", qdq.SCHEMES)
def test_dynamic_layers_are_simulated_as_their_operator_defines(scheme: str, width: int) -> None:
    torch.manual_seed(0)
    plan = Plan(("quantize_dynamic",), dynamic_scheme=scheme)  # type: ignore[arg-type]
    graph = capture(nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(4, width))
    steps.apply("quantize_dynamic", graph, context(plan))
    x = torch.rand(9, width) + 1.0
    assert torch.equal(simulate(graph)([x])[0], run(graph, [x])[0])
