"""Every rewrite keeps the values and gives the operator that later rooms look for."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibrate.graph import layer_name, operator_name, run
from convert.capture_program import functional, unlift
from convert.normal_form import normalise

aten = torch.ops.aten


class Net(nn.Module):
    """Something of every kind of layer, in the forms people write."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.group = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 8, 2, stride=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = self.drop(self.act(self.bn(self.conv(x))))
        z = F.max_pool2d(F.silu(self.down(self.group(y))), 2)
        t = self.norm(self.fc(z.flatten(2).transpose(1, 2).contiguous()))
        a = self.attn(t, t, t, need_weights=False)[0]
        return (
            a.softmax(-1)[:, 0],
            F.pad(self.up(z), (1, 0, 0, 1)).detach().to(torch.float32),
            F.adaptive_avg_pool2d(y, 1),
        )


@pytest.fixture(scope="module")
def net() -> Net:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.bn.running_var, 0.5, 2.0)
    nn.init.normal_(model.bn.running_mean)
    return model


def exported(model: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    return program.run_decompositions()


def names(graph: GraphModule) -> Counter[str]:
    return Counter(operator_name(n) for n in graph.graph.nodes if n.op == "call_function")


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], relative: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= relative * float(other.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [lambda p: p, decomposed], ids=["as exported", "core ATen"])
def test_a_network_keeps_its_values_and_its_layers(net: Net, form: Callable) -> None:
    graph = normalise(unlift(functional(form(exported(net, torch.randn(2, 3, 8, 8))))))
    found = names(graph)
    for name in ("conv_transpose2d", "batch_norm", "group_norm", "layer_norm", "silu", "max_pool2d", "pad", "relu"):
        assert found[name] == 1, name
    assert (found["conv2d"], found["linear"]) == (2, 3)
    for gone in (
        "convolution",
        "addmm",
        "mm",
        "view",
        "clone",
        "dropout",
        "flatten",
        "detach",
        "relu_",
        "native_layer_norm",
    ):
        assert gone not in found
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        assert_equal(run(graph, [x]), net(x), 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_layers_have_the_names_of_their_modules_and_each_its_own(net: Net) -> None:
    with torch.no_grad():  # else torch wraps the model's own no_grad in a graph of its own, which forgets the modules
        program = exported(net, torch.randn(2, 3, 8, 8))
    graph = normalise(unlift(functional(program)))
    layers = [layer_name(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert len(set(layers)) == len(layers)
    weighted = {"conv", "bn", "group", "down", "fc", "norm", "attn.in_proj", "attn.out_proj", "up"}
    assert weighted <= set(layers)
    assert {"act", "attn.scaled_dot_product_attention", "silu"} <= set(layers)


@pytest.mark.filterwarnings("ignore")
def test_two_uses_of_one_layer_have_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu())

    graph = normalise(unlift(exported(Twice(), torch.randn(2, 4))))
    assert [layer_name(n) for n in graph.graph.nodes if operator_name(n) == "linear"] == ["fc", "fc_1"]
    assert len(list(graph.parameters())) == 2


class Spelled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.gamma, self.beta = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def spelled_layer_norm(m: Spelled, x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt((d**2).mean([-1], keepdim=True) + 1e-5) * m.gamma + m.beta


PATTERNS = {
    "layer_norm": spelled_layer_norm,
    "gelu": lambda m, x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu 2": lambda m, x: x * (torch.erf(x * 0.7071067811865476) + 1.0) * 0.5,
    "gelu 3": lambda m, x: x * (0.5 * (1.0 + torch.erf(x / 1.4142135381698608))),
    "silu": lambda m, x: x * torch.sigmoid(x),
    "hardswish": lambda m, x: x * F.relu6(x + 3) / 6,
    "hardswish 2": lambda m, x: x * (torch.clamp(x + 3.0, 0.0, 6.0) / 6.0),
    "hardswish 3": lambda m, x: F.hardsigmoid(x) * x,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_written_by_hand_becomes_its_operator(name: str) -> None:
    torch.manual_seed(0)
    model = Spelled(PATTERNS[name]).eval()
    graph = normalise(unlift(exported(model, torch.randn(2, 5, 6))))
    assert names(graph) == {name.split()[0]: 1}
    x = 3 * torch.randn(7, 5, 6)
    assert_equal(run(graph, [x]), (model(x),), 1e-6)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


NEAR_MISSES = {
    "layer norm over another axis": lambda m, x: centred(x) / torch.sqrt((centred(x) ** 2).mean(1, True) + 1e-5),
    "another number than sqrt 2": lambda m, x: 0.5 * x * (1 + torch.erf(x / 1.5)),
    "another tensor than the gate's": lambda m, x: (x + 1) * torch.sigmoid(x),
    "the gate is read twice": lambda m, x: x * torch.sigmoid(x) + torch.sigmoid(x),
    "limits of another function": lambda m, x: x * torch.clamp(x + 3, 0, 5) / 6,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_a_pattern_keeps_its_values(name: str) -> None:
    torch.manual_seed(0)
    model = Spelled(NEAR_MISSES[name]).eval()
    graph = normalise(unlift(exported(model, torch.randn(2, 5, 6))))
    x = torch.randn(3, 5, 6)
    assert_equal(run(graph, [x]), (model(x),), 1e-6)


def hand_made(target: object, *args: object, inputs: int = 1, **constants: Tensor) -> GraphModule:
    """A graph of one operator; strings among the arguments are constants, integers in a tuple ("x", i) inputs."""
    root, graph = nn.Module(), torch.fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(inputs)]
    nodes: dict[str, Node] = {}
    for name, tensor in constants.items():
        root.register_buffer(name, tensor)
        nodes[name] = graph.get_attr(name)
        nodes[name].meta["val"] = tensor
    filled = [nodes[a] if isinstance(a, str) and a in nodes else placeholders[0] if a == "x" else a for a in args]
    made = graph.call_function(target, tuple(filled))
    graph.output((made,))
    return GraphModule(root, graph)


def with_values(graph: GraphModule, x: Tensor) -> GraphModule:
    class Record(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Record(graph).run(x)
    return graph


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(2, 4), inner=st.integers(1, 5), out=st.integers(1, 5), bias=st.booleans())
def test_any_product_with_a_constant_matrix_is_a_linear_layer(rank: int, inner: int, out: int, bias: bool) -> None:
    x, w, b = torch.randn(*range(2, rank + 1), inner), torch.randn(inner, out), torch.randn(out)
    if bias and rank == 2:
        graph = hand_made(aten.addmm.default, "b", "x", "w", w=w, b=b)
    else:
        graph = hand_made(aten.mm.default if rank == 2 else aten.matmul.default, "x", "w", w=w)
    wanted = run(graph, [x])
    after = normalise(with_values(graph, x))
    assert names(after) == {"linear": 1}
    assert_equal(run(after, [x]), wanted, 1e-6)


def test_safe_softmax_stays_where_a_mask_may_fill_a_row() -> None:
    x = torch.randn(2, 3)
    assert names(normalise(with_values(hand_made(aten._safe_softmax.default, "x", -1), x))) == {"softmax": 1}

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return aten._safe_softmax.default(torch.where(x > 0, x, -torch.inf), -1)

    graph = normalise(unlift(exported(Masked(), x)))
    assert names(graph)["_safe_softmax"] == 1
    assert not run(graph, [-torch.ones(1, 3)])[0].isnan().any()


def test_an_even_kernel_with_same_padding_is_padded_at_the_end() -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Even()
    graph = normalise(unlift(exported(model, torch.randn(2, 2, 7, 8))))
    assert names(graph) == {"pad": 1, "conv2d": 1}
    x = torch.randn(3, 2, 7, 8)
    assert torch.equal(run(graph, [x])[0], model(x))


def test_what_depends_on_constants_alone_is_computed_once_but_not_repeated_in_memory() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(5)) + self.token.expand(1000, 100, 4).mean((0, 1))

    model = Positions()
    graph = normalise(unlift(exported(model, torch.randn(2, 5, 4))))
    assert names(graph) == {"add": 2, "expand": 1, "mean": 1}
    x = torch.randn(3, 5, 4)
    assert_equal(run(graph, [x]), (model(x),), 1e-6)


class Masked(nn.Module):
    """A mask and token types as text models write them."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(9, 4), nn.Embedding(2, 4)
        self.register_buffer("zeros", torch.zeros(1, 5).long())
        self.register_buffer("ones", torch.ones(1, 1, 5, 5) > 0)
        self.shift = shift

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        rows, columns = torch.arange(ids.shape[0]), (torch.arange(5) + self.shift) % 5
        seen = self.ones & mask.bool()[rows[:, None, None, None], columns[None, None, None]]
        x = self.words(ids) + self.types(self.zeros.expand(ids.shape[0], 5))
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shift", [0, 1])
def test_a_mask_indexed_by_aranges_is_a_reshape_and_one_indexed_otherwise_is_not(shift: int) -> None:
    model = Masked(shift).eval()
    ids, mask = torch.arange(10).reshape(2, 5) % 9, torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]])
    graph = normalise(unlift(exported(model, ids, mask)))
    found = names(graph)
    assert found["index"] == shift
    assert found["embedding"] == 1  # the other one is a constant
    assert found["logical_and"] + found["__and__"] == 1  # it spreads the mask to all queries
    for batch in (1, 2):
        wanted = model(ids[:batch], mask[:batch])
        assert_equal(run(graph, [ids[:batch], mask[:batch]]), (wanted,), 1e-6)


@pytest.mark.parametrize(("size", "expected"), [(1, "max_pool2d"), ((2, 4), "max_pool2d"), (3, "adaptive_max_pool2d")])
def test_an_adaptive_max_pool_with_windows_alike_is_a_max_pool(size: int | tuple[int, int], expected: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    program = exported(nn.AdaptiveMaxPool2d(size), x)
    graph = normalise(unlift(functional(program)))
    assert names(graph)[expected] == 1
    assert_equal(run(graph, [x]), (nn.AdaptiveMaxPool2d(size)(x),), 0.0)


class Hidden(nn.Module):
    """Attention with a mask made for every batch anew; `seen` says what it lets through."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.seen.expand(x.shape[0], -1, -1, -1)
        y = x.unsqueeze(1)
        return F.scaled_dot_product_attention(y, y, y, mask).squeeze(1)


@pytest.mark.parametrize(
    ("seen", "masked"),
    [
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), False),
        (torch.zeros(1, 1, 4, 4), False),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), True),
        (torch.eye(4).view(1, 1, 4, 4), True),
    ],
    ids=["all seen", "nothing added", "causal", "biased"],
)
def test_a_constant_mask_that_hides_nothing_is_dropped_and_no_other(seen: Tensor, masked: bool) -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    module = Hidden(seen)
    graph = normalise(unlift(exported(module, x)))
    (attention,) = [n for n in graph.graph.nodes if operator_name(n) == "scaled_dot_product_attention"]
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    assert (mask is not None) == masked
    torch.testing.assert_close(run(graph, [x])[0], module(x), rtol=0, atol=1e-6)  # another kernel may round otherwise
