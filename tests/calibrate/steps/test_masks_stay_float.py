"""Masks, constants and integers are no activations: static int8 never gives them codes, and the model still answers."""

from collections.abc import Callable

import pytest
import torch
from small_graphs import ISLANDS, Made, capture, context
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from calibrate import qdq, steps
from calibrate.graph import clone, run
from calibrate.simulation import simulate

TOKENS, WIDTH = 10, 32
FILLS = [-1e4, -1e9, torch.finfo(torch.float32).min, float("-inf")]
# A mask's numbers and their sums are beyond this; no real activation of these small models is.
FAR = 500.0


def tokens(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def padding(count: int = 32) -> Tensor:
    """bool [count, TOKENS], true where a token counts: each sample has a length of its own."""
    lengths = 3 + torch.arange(count) % (TOKENS - 2)
    return torch.arange(TOKENS) < lengths[:, None]


def quantized(graph: GraphModule, *inputs: Tensor) -> tuple[GraphModule, list[str]]:
    """The graph with static int8 and the ledger's reasons for what stayed float."""
    result = clone(graph)
    ledger = steps.apply("quantize_static", result, context(ISLANDS, list(inputs)))
    return result, [e.reason for e in ledger if e.action == "left float"]


def furthest_code(result: GraphModule) -> float:
    """The largest number that any activation's codes can stand for."""
    pairs = [n for n in result.graph.nodes if n.target is qdq.QUANTIZE]
    assert pairs
    return max(max(abs(q - n.args[2]) for q in n.args[3:5]) * n.args[1] for n in pairs)


def sources(result: GraphModule) -> list[Node]:
    return [n.args[0] for n in result.graph.nodes if n.target is qdq.QUANTIZE]


def sqnr(graph: GraphModule, result: GraphModule, *inputs: Tensor) -> float:
    want, got = run(graph, inputs)[0].double(), simulate(result)(inputs)[0].double()
    return 10 * float(torch.log10(want.square().sum() / (want - got).square().sum()))


def holds(graph: GraphModule, *inputs: Tensor) -> None:
    """No mask has codes, the model has 20 dB and more (a cosine of 0.995), and some layer is int8."""
    result, _ = quantized(graph, *inputs)
    assert furthest_code(result) < FAR
    assert all(s.op != "get_attr" and (s.meta["val"].is_floating_point()) for s in sources(result))
    assert sqnr(graph, result, *inputs) > 20


class Attention(nn.Module):
    """One head whose scores `mask` changes before the softmax."""

    def __init__(self, mask: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mask = mask

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        return self.out(self.mask(scores, *masks).softmax(-1) @ self.value(x))


class Masked(Attention):
    """The same with a mask from the user beside the tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask)


@pytest.mark.parametrize("fill", FILLS)
def test_a_causal_fill_stays_float(fill: float) -> None:
    causal = torch.ones(TOKENS, TOKENS).triu(1).bool()
    holds(capture(Attention(lambda s: s.masked_fill(causal, fill)), tokens()), tokens())
    holds(capture(Attention(lambda s: torch.where(causal, fill, s)), tokens()), tokens())


@pytest.mark.parametrize("fill", FILLS[:3])
def test_an_additive_mask_stays_float_whether_constant_added_twice_or_given_by_the_user(fill: float) -> None:
    causal = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), fill)
    holds(capture(Attention(lambda s: s + causal), tokens()), tokens())
    given = torch.zeros(32, 1, TOKENS).masked_fill(~padding()[:, None], fill)
    holds(capture(Masked(lambda s, m: s + m), tokens(), given), tokens(), given)
    if fill > -1e30:  # twice the least float32 number is an infinity
        holds(capture(Masked(lambda s, m: s + m + m), tokens(), given), tokens(), given)


@pytest.mark.parametrize("fill", [-1e4, -1e9])
@pytest.mark.parametrize("times", [1, 2])
def test_a_mask_that_a_layer_reads_keeps_that_layer_float_with_the_reason(fill: float, times: int) -> None:
    def forward(m: Made, x: Tensor, mask: Tensor) -> Tensor:
        return m.body(x).sum(1) + m.gate(mask * times).sigmoid()

    model = Made(forward, body=nn.Linear(WIDTH, 4), gate=nn.Linear(TOKENS, 4))
    mask = torch.zeros(32, TOKENS).masked_fill(~padding(), fill)
    graph = capture(model, tokens(), mask)
    result, reasons = quantized(graph, tokens(), mask)
    assert any("a mask?" in r for r in reasons)
    assert furthest_code(result) < FAR


@pytest.mark.parametrize("fill", [-1e4, -1e9])
def test_data_with_masked_places_is_left_float_as_well(fill: float) -> None:
    graph = capture(nn.Sequential(nn.Linear(WIDTH, 4)), torch.randn(4, WIDTH))
    x = torch.randn(64, WIDTH)
    x[:, 20:] = fill
    assert "a mask?" in quantized_reasons(graph, x)


def quantized_reasons(graph: GraphModule, x: Tensor) -> str:
    return " ".join(e.reason for e in steps.apply("quantize_static", clone(graph), context(ISLANDS, [x])))


@pytest.mark.parametrize("kind", ["one outlier", "two far values", "a spread far side", "large positives"])
def test_far_data_is_no_mask(kind: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(WIDTH, 4)), torch.randn(4, WIDTH))
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
    if kind == "one outlier":
        x[0, 0] = -1e4
    elif kind == "two far values":
        x[:2, 0] = -1e4
    elif kind == "a spread far side":
        x[:, 0] = -1e4 * torch.rand(256)
    else:
        x[:, 0] = 1e4
    assert "a mask?" not in quantized_reasons(graph, x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(TOKENS))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        hidden = torch.zeros_like(x[..., 0]).masked_fill(~counts, float("-inf"))
        return self.encoder(x, mask=self.causal, src_key_padding_mask=hidden, is_causal=True)


def test_a_transformer_encoder_with_padding_and_causal_masks_stays_true() -> None:
    holds(capture(Encoder(), tokens(), padding()), tokens(), padding())


class Bert(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=TOKENS,
            attn_implementation=attention,
        )
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, counts: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=counts).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_with_an_attention_mask_stays_true(attention: str) -> None:
    pytest.importorskip("transformers")
    ids = torch.randint(0, 50, (32, TOKENS), generator=torch.Generator().manual_seed(0))
    holds(capture(Bert(attention), ids, padding().long()), ids, padding().long())
