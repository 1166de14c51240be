"""Labels find which channels a layer reads, through any layout of attention, and say so when they cannot know."""

import pytest
import torch
from encoders import HEADS, LAYOUTS, WIDTH, encoder, tokens
from small_graphs import Made, capture, nodes_of
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate.channels import Channels, readers, trace
from calibrate.graph import kind, layer_name


def traced(graph: GraphModule) -> tuple[Channels, dict[str, tuple[str, list[int]]]]:
    """The labels, and layer -> (layer whose channels it reads, the channels column by column)."""
    found = trace(graph, [tokens(8)])
    known = {layer_name(n): found.source(c) for n, c in found.columns.items()}
    return found, {n: (layer_name(s[0]), s[1].tolist()) for n, s in known.items() if s is not None}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_projection_reads_the_value_channels_through_attention(layout: str, before: bool) -> None:
    found, _ = traced(LAYOUTS[layout](before))
    known = [found.source(c) for c in found.columns.values()]
    values = [(s[0], s[1].tolist()) for s in known if s is not None and kind(s[0]) == "linear"]
    read = [(node, c) for node, c in values if c[0] or found.width[node] != WIDTH or layer_name(node).endswith(".v")]
    assert len([n for n, _ in read if n.name != "linear"]) == 2
    for node, columns in read:
        first = 0 if found.width[node] == WIDTH else 2 * WIDTH  # the last third of a fused projection
        assert columns == list(range(first, first + WIDTH))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_pairs_every_query_channel_with_its_key_head_by_head(layout: str) -> None:
    found, _ = traced(LAYOUTS[layout](True))
    assert len(found.products) == 2
    for product in found.products:
        assert product.left.shape == (HEADS, WIDTH // HEADS)
        left, right = found.source(product.left), found.source(product.right)
        assert left is not None
        assert right is not None
        fused = left[0] is right[0]
        assert torch.equal(right[1] - left[1], torch.full_like(left[1], WIDTH if fused else 0))
        assert left[1].unique().numel() == WIDTH


def test_a_key_that_arithmetic_changed_is_not_followed() -> None:
    found, columns = traced(encoder("rotary"))
    assert not found.products
    assert columns["blocks.0.proj"][0] == "blocks.0.qkv"  # the values still are


def test_channels_that_vary_over_tokens_are_not_known() -> None:
    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.norm(x)
        return m.head(torch.cat([y[:, :, :4], y[:, :, 4:].roll(1, 1)], 1))

    model = Made(forward, norm=nn.LayerNorm(8), head=nn.Linear(4, 3))
    found = trace(capture(model, torch.randn(2, 5, 8)), [torch.randn(2, 5, 8)])
    assert not found.columns


def test_all_readers_are_found_past_reshapes_and_the_residual_is_one_of_them() -> None:
    def of_first_norm(graph: GraphModule) -> set[str]:
        return {kind(r) for r, _ in readers(nodes_of(graph, "layer_norm")[0])}

    assert of_first_norm(encoder("fused", True)) == {"linear"}
    assert of_first_norm(encoder("fused", False)) == {"linear", "add"}
