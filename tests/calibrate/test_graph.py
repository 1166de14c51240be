"""Reading and editing graphs: kinds, constants, clones."""

import pytest
import torch
from small_graphs import Made, capture, images, nodes_of, only
from torch import Tensor, nn

from calibrate.graph import (
    add_constant,
    clone,
    constant,
    finish,
    is_constant,
    is_weighted,
    kind,
    layer_name,
    operator_name,
    run,
    weight_nodes,
)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: x.relu(), "relu"),
        (lambda x: nn.functional.relu6(x), "clamp"),
        (lambda x: x + 1, "add"),
        (lambda x: 1 - x, "sub"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: nn.functional.gelu(x), "gelu"),
        (lambda x: x @ x.transpose(-1, -2), "matmul"),
        (lambda x: x.mean((2, 3)), "mean"),
        (lambda x: nn.functional.avg_pool2d(x, 2), "avg_pool"),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), "attention"),
        (lambda x: torch.cat([x, x]), "cat"),
        (lambda x: x[:, 1:], "slice"),
        (lambda x: nn.functional.interpolate(x, scale_factor=2.0), "upsample"),
        (lambda x: torch.special.bessel_j0(x), "other"),
    ],
)
def test_operators_have_the_kinds_that_plans_and_profiles_speak_of(call: object, expected: str) -> None:
    graph = capture(Made(lambda m, x: call(x)), images())  # type: ignore[operator]
    assert expected in {kind(n) for n in graph.graph.nodes if n.op == "call_function"}


def test_inputs_weights_and_outputs_have_kinds_too() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    assert [kind(n) for n in graph.graph.nodes] == ["weight", "weight", "input", "linear", "output"]
    assert [operator_name(n) for n in graph.graph.nodes] == ["", "", "", "linear", ""]


def test_a_layer_is_known_by_its_module_path_else_by_its_node() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4))
    assert layer_name(only(graph, "linear")) == "0"
    assert layer_name(only(graph, "relu")) == "relu"


def test_a_weighted_layer_has_constant_weights() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return nn.functional.linear(m.plain(x), m.other.weight * x.mean())

    graph = capture(Made(forward, plain=nn.Linear(4, 3, bias=False), other=nn.Linear(3, 2)), torch.randn(2, 4))
    plain, computed = nodes_of(graph, "linear")
    assert (is_weighted(plain), is_weighted(computed)) == (True, False)
    weight, bias = weight_nodes(plain)
    assert is_constant(weight)
    assert bias is None
    assert weight_nodes(computed) == (None, None)


def test_an_added_constant_gets_a_name_of_its_own_and_its_value() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    linear = only(graph, "linear")
    first = add_constant(graph, "0.weight_codes", torch.ones(2), linear)
    second = add_constant(graph, "0.weight_codes", torch.zeros(3), linear)
    assert first.target != second.target
    assert torch.equal(constant(graph, first), torch.ones(2))
    assert torch.equal(constant(graph, second), torch.zeros(3))


def test_finishing_drops_constants_that_nobody_reads_and_keeps_the_function() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    x = torch.randn(2, 4)
    before = run(graph, [x])[0]
    add_constant(graph, "unused", torch.ones(5), only(graph, "linear"))
    assert "unused" in dict(graph.named_buffers())
    finish(graph)
    assert "unused" not in dict(graph.named_buffers())
    assert torch.equal(run(graph, [x])[0], before)


def test_finishing_keeps_a_tensor_that_another_name_still_reads() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    graph = capture(Tied(), torch.randn(2, 4))
    x = torch.randn(2, 4)
    before = run(graph, [x])[0]
    assert torch.equal(run(finish(clone(graph)), [x])[0], before)


def test_a_clone_shares_memory_and_nothing_else() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    copy = clone(graph)
    ours, theirs = only(graph, "linear"), only(copy, "linear")
    assert ours is not theirs
    assert constant(graph, ours.args[1]).data_ptr() == constant(copy, theirs.args[1]).data_ptr()
    copy.graph.erase_node(copy.graph.output_node())
    assert kind(graph.graph.output_node()) == "output"


def test_meta_written_on_a_clone_is_not_seen_on_the_original() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    only(clone(graph), "linear").meta["layer"] = "other"
    assert layer_name(only(graph, "linear")) == "0"


def test_outputs_are_a_tuple_without_gradients_also_when_there_is_one() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    result = run(graph, [torch.randn(2, 4)])
    assert isinstance(result, tuple)
    assert not result[0].requires_grad
