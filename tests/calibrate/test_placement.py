"""Which tensors become codes, on small modules whose answer can be told by hand."""

from dataclasses import replace

import pytest
import torch
from small_graphs import ISLANDS, SKIPS, Made, capture, images, keeping, nodes_of, only
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from calibrate.graph import kind
from calibrate.placement import Sites, place, tail
from calibrate.plan import Plan


def conv(channels: int = 4, out: int = 4, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2)


def named(graph: GraphModule, layer: str) -> Node:
    (node,) = [n for n in graph.graph.nodes if n.meta.get("layer") == layer]
    return node


def kinds_with_codes(graph: GraphModule, sites: Sites) -> list[str]:
    """The kinds of the nodes whose value carries Q/DQ, in order."""
    return [kind(n) for n in graph.graph.nodes if n.name in sites.group_of]


class Residual(nn.Module):
    """relu(conv2(relu(conv1(y))) + y), y = relu(stem(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv(3), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return (self.conv2(self.conv1(y).relu()) + y).relu()


class DownSampling(nn.Module):
    """relu(conv2(relu(conv1(y))) + shortcut(y)): both operands of the add come from a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv(3), conv(4, 8, stride=2), conv(8, 8)
        self.shortcut = conv(4, 8, stride=2, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return (self.conv2(self.conv1(y).relu()) + self.shortcut(y)).relu()


# --- fused activations ---------------------------------------------------------------------------------------


def test_codes_are_written_after_a_fused_relu_never_between() -> None:
    graph = capture(Residual(), images())
    sites = place(graph, ISLANDS)
    assert kinds_with_codes(graph, sites) == ["input", "relu", "relu", "conv", "relu"]
    assert named(graph, "stem").name not in sites.group_of
    assert named(graph, "conv2").name in sites.group_of  # its output goes to the add as it is


@pytest.mark.parametrize(
    "activation",
    [
        nn.functional.relu,
        nn.functional.relu6,
        nn.functional.hardtanh,
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=-1.0),
        lambda x: x.clamp_max(3.0),
    ],
    ids=["relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"],
)
def test_functional_activations_fuse_like_modules(activation: object) -> None:
    graph = capture(Made(lambda m, x: activation(m.conv(x)), conv=conv(3)), images())  # type: ignore[operator]
    sites = place(graph, ISLANDS)
    site = graph.graph.output_node().args[0][0]
    assert set(sites.group_of) == {only(graph, "input").name, site.name}


def test_an_activation_of_a_convolution_that_something_else_reads_is_not_fused() -> None:
    def forward(m: Made, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        return y.relu(), y

    graph = capture(Made(forward, conv=conv(3)), images())
    sites = place(graph, ISLANDS)
    assert tail(only(graph, "conv")) is only(graph, "conv")
    assert kinds_with_codes(graph, sites) == ["input", "conv"]


def test_two_activations_in_a_row_end_the_kernel_after_the_second() -> None:
    graph = capture(Made(lambda m, x: m.conv(x).relu().clamp(max=6), conv=conv(3)), images())
    assert tail(only(graph, "conv")) is only(graph, "clamp")


# --- islands -------------------------------------------------------------------------------------------------


def test_an_add_of_two_layers_belongs_to_the_island() -> None:
    graph = capture(Residual(), images())
    assert only(graph, "add").name in place(graph, ISLANDS).layers


def test_an_add_of_the_graphs_input_stays_float_with_its_reason() -> None:
    graph = capture(Made(lambda m, x: m.conv(x) + x, conv=conv(3, 3)), images())
    sites = place(graph, ISLANDS)
    add = only(graph, "add")
    assert add.name not in sites.layers
    assert sites.left == {add.name: "add reads a float tensor, so codes would cost a conversion"}


def test_an_island_never_starts_at_an_add() -> None:
    graph = capture(Made(lambda m, x, y: (x + y).mean((2, 3))), images(), images())
    sites = place(graph, ISLANDS)
    assert (sites.layers, sites.group_of) == ({}, {})


class Transformer(nn.Module):
    """Tokens with a positional embedding, attention scores with an additive mask of -3e38, a residual of LayerNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.register_buffer("mask", torch.triu(torch.full((5, 5), -3e38), 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.position
        z = self.norm(y)
        scores = self.query(z) @ self.key(z).transpose(1, 2) + self.mask
        return y + self.out(scores.softmax(-1) @ z)


def test_masks_positional_embeddings_and_the_residual_stream_stay_float() -> None:
    graph = capture(Transformer(), torch.randn(2, 5, 8))
    sites = place(graph, ISLANDS)
    adds = nodes_of(graph, "add")
    assert len(adds) == 3
    assert not {a.name for a in adds} & (set(sites.layers) | set(sites.group_of))
    reasons = [sites.left[a.name] for a in adds]
    assert reasons[0] == reasons[1] == "add with a constant operand stays float"
    assert "reads a float tensor" in reasons[2]
    assert set(sites.layers.values()) == {"embed", "query", "key", "out"}


def test_a_constant_made_on_the_way_is_a_constant_too() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.linear(x)
        return torch.cat([m.token.weight[None].expand(y.shape[0], 1, 4), y], 1)

    model = Made(forward, linear=nn.Linear(8, 4), token=nn.Embedding(1, 4))
    graph = capture(model, torch.randn(2, 5, 8))
    assert only(graph, "cat").name not in place(graph, ISLANDS).group_of


def test_a_scalar_operand_keeps_an_add_float() -> None:
    graph = capture(Made(lambda m, x: m.conv(x) + 1.5, conv=conv(3)), images())
    sites = place(graph, ISLANDS)
    assert "constant operand" in sites.left[only(graph, "add").name]


def test_a_tensor_added_to_itself_is_one_site_read_twice() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.conv(x)
        return y + y

    graph = capture(Made(forward, conv=conv(3)), images())
    sites = place(graph, ISLANDS)
    assert only(graph, "add").name in sites.layers
    assert kinds_with_codes(graph, sites) == ["input", "conv", "add"]


def test_a_kind_the_runtime_has_no_kernel_for_is_left_with_that_reason() -> None:
    graph = capture(Made(lambda m, x: m.conv(x) * m.conv(x).sigmoid(), conv=conv(3)), images())
    sites = place(graph, ISLANDS)
    assert sites.left[only(graph, "mul").name] == "the runtime's fast path has no int8 mul"


# --- weights -------------------------------------------------------------------------------------------------


def test_a_convolution_whose_weight_is_computed_is_left_with_a_reason() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        weight = m.conv.weight * m.gain(torch.ones_like(x[:1, :1, :1, :1].flatten(1))).sum()
        return nn.functional.conv2d(x, weight, m.conv.bias)

    graph = capture(Made(forward, conv=conv(3), gain=nn.Linear(1, 1)), images())
    node = only(graph, "conv")
    sites = place(graph, ISLANDS)
    assert node.name not in sites.layers
    assert "the weight of this conv is computed, not constant" in sites.left.values()


def test_layers_asked_to_stay_float_do_and_say_why() -> None:
    graph = capture(Residual(), images())
    sites = place(graph, keeping(ISLANDS, conv1="it hurts"))
    assert sites.left["conv1"] == "it hurts"
    assert "conv1" not in sites.layers.values()
    # What conv1 wrote is float now, so conv2 asks for codes of it, and conv1's input is not read as codes by it.
    first, second = named(graph, "conv1"), named(graph, "conv2")
    reads = sites.readers[second.args[0].name]  # type: ignore[union-attr]
    assert reads == (second.name,)
    stem_codes = sites.readers[tail(named(graph, "stem")).name]
    assert stem_codes is None or first.name not in stem_codes


# --- tensors that move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: nn.functional.pad(x, (1, 1, 1, 1)),
        lambda x: x[:, :, ::2, ::2],
        lambda x: x.transpose(2, 3),
    ],
    ids=["max_pool", "pad", "slice", "transpose"],
)
def test_a_move_of_codes_keeps_their_scale(move: object) -> None:
    graph = capture(Made(lambda m, x: m.two(move(m.one(x))), one=conv(3), two=conv()), images())  # type: ignore[operator]
    sites = place(graph, ISLANDS)
    written, read = named(graph, "one"), named(graph, "two").args[0]
    assert isinstance(read, Node)
    assert sites.group_of[written.name] == sites.group_of[read.name]
    assert len(set(sites.group_of.values())) == 3  # the input, these, the output


def test_all_parts_of_a_concatenation_share_one_scale() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.last(torch.cat([m.one(x).relu(), m.two(x)], 1))

    graph = capture(Made(forward, one=conv(3), two=conv(3), last=conv(8)), images())
    sites = place(graph, ISLANDS)
    parts = [only(graph, "relu"), named(graph, "two"), only(graph, "cat")]
    assert len({sites.group_of[n.name] for n in parts}) == 1


def test_a_concatenation_with_a_float_part_stays_float() -> None:
    graph = capture(Made(lambda m, x: m.last(torch.cat([m.one(x), x], 1)), one=conv(3), last=conv(7)), images())
    sites = place(graph, ISLANDS)
    cat, one = only(graph, "cat"), named(graph, "one")
    assert sites.readers[cat.name] == (named(graph, "last").name,)
    assert sites.group_of[cat.name] != sites.group_of[one.name]


def test_the_parts_of_a_split_share_the_scale_of_the_whole() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        a, b = m.one(x).split(2, 1)
        return m.two(a) + m.three(b)

    graph = capture(Made(forward, one=conv(3), two=conv(2), three=conv(2)), images())
    sites = place(graph, ISLANDS)
    split, parts = only(graph, "split"), nodes_of(graph, "getitem")
    assert split.name not in sites.group_of  # it gives a list
    assert {sites.group_of[p.name] for p in parts} == {sites.group_of[named(graph, "one").name]}


def test_the_pool_of_a_functionalised_program_gives_a_tuple_and_still_shares_its_scale() -> None:
    model = nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2), conv())
    program = torch.export.export(model.eval(), (images(),)).run_decompositions()
    graph = program.module(check_guards=False)
    assert nodes_of(graph, "getitem")
    plan = replace(ISLANDS, quantize_inputs=frozenset({"conv"}))
    sites = place(graph, plan)
    assert nodes_of(graph, "max_pool")[0].name not in sites.group_of
    assert sites.group_of[nodes_of(graph, "getitem")[0].name] == sites.group_of[only(graph, "relu").name]


def test_a_bridge_that_the_runtime_does_in_float_keeps_the_island_whole() -> None:
    plan = replace(ISLANDS, shared_scale=frozenset())
    graph = capture(Made(lambda m, x: m.two(nn.functional.pad(m.one(x), (1, 1))), one=conv(3), two=conv()), images())
    sites = place(graph, plan)
    assert sites.group_of[named(graph, "one").name] == sites.group_of[only(graph, "pad").name]


# --- readers and outputs -------------------------------------------------------------------------------------


def test_a_tensor_that_float_and_int8_nodes_read_is_float_for_the_one_and_codes_for_the_other() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.linear(x) * x.sigmoid().sum(-1, keepdim=True)

    graph = capture(Made(forward, linear=nn.Linear(8, 4)), torch.randn(2, 8))
    sites = place(graph, ISLANDS)
    assert sites.readers[only(graph, "input").name] == (only(graph, "linear").name,)


def test_every_output_of_a_graph_with_several_carries_its_own_codes() -> None:
    def forward(m: Made, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.body(x).relu()
        return m.one(y), m.two(y), y

    graph = capture(Made(forward, body=conv(3), one=conv(), two=conv()), images())
    sites = place(graph, ISLANDS)
    groups = [sites.group_of[n.name] for n in graph.graph.output_node().args[0]]
    assert len(set(groups)) == 3
    assert all(sites.readers[n.name] is None for n in graph.graph.output_node().args[0])


def test_outputs_stay_float_where_the_kernel_writes_float() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    plan = Plan(("quantize_static",))
    assert kinds_with_codes(graph, place(graph, plan)) == ["input"]


def test_a_kernel_that_prescribes_its_output_fixes_the_parameters_of_the_group() -> None:
    plan = replace(
        ISLANDS,
        quantize_inputs=ISLANDS.quantize_inputs | {"sigmoid"},
        quantize_outputs=ISLANDS.quantize_outputs | {"sigmoid"},
        fixed_output={"sigmoid": (1 / 256, -128)},
    )
    graph = capture(Made(lambda m, x: m.conv(x).sigmoid(), conv=conv(3)), images())
    sites = place(graph, plan)
    assert sites.fixed == {sites.group_of[only(graph, "sigmoid").name]: (1 / 256, -128)}


# --- skips ---------------------------------------------------------------------------------------------------


def test_only_the_skip_of_a_residual_add_is_quantized_for_a_runtime_that_fuses_the_other_side() -> None:
    graph = capture(Residual(), images())
    sites = place(graph, SKIPS)
    add, skip = only(graph, "add"), tail(named(graph, "stem"))
    assert add.name in (sites.readers[skip.name] or ())
    assert named(graph, "conv2").name not in sites.group_of
    assert add.name not in sites.left


def test_the_skip_is_found_whichever_side_of_the_add_it_stands_on() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        return y + m.conv(y)

    graph = capture(Made(forward, stem=conv(3), conv=conv()), images())
    sites = place(graph, SKIPS)
    assert only(graph, "add").name in (sites.readers[only(graph, "relu").name] or ())


def test_the_skip_of_a_down_sampling_block_is_its_smaller_convolution() -> None:
    graph = capture(DownSampling(), images())
    sites = place(graph, SKIPS)
    assert sites.readers[named(graph, "shortcut").name] == (only(graph, "add").name,)
    assert named(graph, "conv2").name not in sites.group_of


def test_an_add_that_no_convolution_feeds_has_no_skip() -> None:
    graph = capture(Made(lambda m, x: m.linear(x) + x, linear=nn.Linear(8, 8)), torch.randn(2, 8))
    sites = place(graph, SKIPS)
    assert sites.group_of.keys() == {only(graph, "input").name}
    assert sites.readers[only(graph, "input").name] == (only(graph, "linear").name,)


def test_a_skip_kept_float_stays_float() -> None:
    graph = capture(Residual(), images())
    add = only(graph, "add")
    sites = place(graph, keeping(SKIPS, **{add.name: "asked for"}))
    assert add.name not in sites.layers
    assert sites.left[add.name] == "asked for"


def test_residual_adds_can_be_left_float_altogether() -> None:
    graph = capture(Residual(), images())
    sites = place(graph, replace(ISLANDS, residual_add="none"))
    assert sites.left[only(graph, "add").name] == "residual adds stay float under this plan"


@pytest.mark.parametrize(("mode", "moved"), [("nearest", True), ("bilinear", False)])
def test_only_an_upsampling_that_copies_values_moves_codes(mode: str, moved: bool) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.interpolate(self.first(x), scale_factor=2.0, mode=mode))

    plan = replace(ISLANDS, shared_scale=ISLANDS.shared_scale | {"upsample"})
    graph = capture(Up(), torch.randn(2, 3, 4, 4))
    sites = place(graph, plan)
    node = next(n for n in graph.graph.nodes if "upsample" in n.name)
    source = node.args[0]
    assert (sites.group_of[node.name] == sites.group_of[source.name]) is moved
