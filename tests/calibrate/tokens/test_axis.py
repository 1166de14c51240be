"""Where tokens cannot be followed, the model is refused in words that say why."""

from collections.abc import Callable

import pytest
import torch
from encoders import LAYOUTS, TOKENS, WIDTH, tokens
from small_graphs import Made, images
from token_models import Layer, captured, cut
from torch import Tensor, nn

from calibrate.errors import CalibrationError
from calibrate.graph import clone, kind
from calibrate.tokens.attention import sites, triangular
from calibrate.tokens.axes import BATCH, Factor, regrouped
from calibrate.tokens.axes import TOKENS as TOKEN
from calibrate.tokens.axis import follow
from convert.normal_form import normalise

F = nn.functional


def headed(head: Callable[[nn.Module, Tensor], Tensor], **children: nn.Module) -> nn.Module:
    """Two blocks, then whatever `head` does with their tokens."""
    torch.manual_seed(0)

    def call(self: nn.Module, x: Tensor) -> Tensor:
        return head(self, self.two(self.one(self.embed(x))))

    return Made(call, embed=nn.Linear(8, WIDTH), one=Layer(), two=Layer(), **children)


HEADS: dict[str, tuple[nn.Module, str]] = {
    "a value per token": (headed(lambda m, x: m.out(x), out=nn.Linear(WIDTH, 5)), "needs every token"),
    "a convolution": (headed(lambda m, x: m.c(x.transpose(1, 2)).mean(2), c=nn.Conv1d(WIDTH, 5, 3)), "spatial"),
    "a grid": (
        headed(lambda m, x: m.c(x.transpose(1, 2).reshape(-1, WIDTH, 2, 3)).mean((2, 3)), c=nn.Conv2d(WIDTH, 5, 1)),
        "windows",
    ),
    "a layer over all tokens": (headed(lambda m, x: m.out(x.flatten(1)), out=nn.Linear(6 * WIDTH, 5)), "own place"),
    "the last token": (headed(lambda m, x: x[:, -1]), "causal decoder"),
    "a token by its place": (headed(lambda m, x: x[:, 3]), "place 3"),
    "a range of tokens": (headed(lambda m, x: x[:, 2:4].mean(1)), "range of tokens"),
    "a running sum": (headed(lambda m, x: x.cumsum(1).mean(1)), "order"),
    "a norm over tokens": (headed(lambda m, x: F.layer_norm(x, [TOKENS, WIDTH]).mean(1)), "normalises over"),
    "further tokens": (headed(lambda m, x: torch.cat([x, x * 2], 1).mean(1)), "joins the tokens"),
    "an unknown operator": (headed(lambda m, x: x.flip(1).mean(1)), "no rule"),
}
FINE: dict[str, nn.Module] = {
    "class token": headed(lambda m, x: x[:, 0]),
    "mean": headed(lambda m, x: x.mean(1)),
    "mean of the patches": headed(lambda m, x: x[:, 1:].mean(1)),
    "class token as a slice": headed(lambda m, x: x[:, :1].flatten(1)),
    "pooled by attention": headed(lambda m, x: (m.s(x).softmax(1) * x).sum(1), s=nn.Linear(WIDTH, 1)),
    "averaged as an image row": headed(lambda m, x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)),
    "a pointwise convolution": headed(lambda m, x: m.c(x.transpose(1, 2)).mean(2), c=nn.Conv1d(WIDTH, 5, 1)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_needs_every_token_is_refused(name: str) -> None:
    module, words = HEADS[name]
    with pytest.raises(CalibrationError, match=words):
        cut(captured(module, tokens()), 4)


@pytest.mark.parametrize("name", FINE)
def test_a_head_that_pools_or_reads_the_class_token_is_not(name: str) -> None:
    graph = captured(FINE[name], tokens())
    cut(graph, 4)
    assert graph(tokens())[0].isfinite().all()


def test_pools_over_tokens_are_reported() -> None:
    graph = captured(FINE["mean"], tokens())
    assert [kind(n) for n in follow(graph, sites(graph)[0].residual).pooled] == ["mean"]
    graph = captured(FINE["class token"], tokens())
    assert follow(graph, sites(graph)[0].residual).pooled == []


def test_a_token_that_stays_may_be_read_by_its_place() -> None:
    module = headed(lambda m, x: x[:, 0] + x[:, 1])
    cut(captured(module, tokens()), 4, protected=2)
    with pytest.raises(CalibrationError, match="place 1"):
        cut(captured(module, tokens()), 4, protected=1)


def test_torchs_encoder_with_a_head_on_every_token_is_refused() -> None:
    with pytest.raises(CalibrationError, match="needs every token"):
        cut(normalise(clone(LAYOUTS["torch"](True))), 4)


def test_a_convolutional_network_is_refused() -> None:
    module = Made(lambda m, x: m.c(x).mean((2, 3)), c=nn.Conv2d(3, 5, 3))
    with pytest.raises(CalibrationError, match="no self-attention"):
        cut(captured(module, images()), 4)


class Windowed(nn.Module):
    """Swin in small: attention within windows of 2 x 2 of a grid of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Linear(8, WIDTH), Layer(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        windows = x.view(-1, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
        seen = self.layer.attention(self.layer.norm1(windows))
        x = x + seen.view(-1, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        return self.out((x + self.layer.mlp(self.layer.norm2(x))).mean(1))


def test_a_windowed_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"windowed \(as in Swin\)"):
        cut(captured(Windowed(), torch.randn(4, 16, 8)), 4)


@pytest.mark.parametrize("how", ["operator", "bool", "float"])
def test_a_causal_decoder_is_refused(how: str) -> None:
    seen = torch.ones(TOKENS, TOKENS).tril() > 0
    masks = {"operator": None, "bool": seen, "float": torch.zeros(TOKENS, TOKENS).masked_fill(~seen, float("-inf"))}

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(8, WIDTH), Layer()
            self.register_buffer("mask", masks[how])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.embed(x), self.mask, causal=how == "operator")[:, 0]

    with pytest.raises(CalibrationError, match="causal"):
        cut(captured(Decoder(), tokens()), 4)


def test_a_mask_that_is_not_triangular_is_no_decoder() -> None:
    seen = torch.ones(4, 4).tril() > 0
    assert triangular(seen)
    assert triangular(~seen)
    assert not triangular(seen | torch.eye(4).flip(0).bool())
    assert not triangular(torch.ones(4, 4) > 0)
    assert not triangular(torch.randn(4, 4))


def test_reshapes_regroup_axes_and_never_tear_tokens() -> None:
    batch, token, width = Factor(7, BATCH), Factor(6, TOKEN), Factor(32)
    axes = ((batch,), (token,), (width,))
    assert regrouped(axes, (42, 32)) == ((batch, token), (width,))
    assert regrouped(axes, (7, 6, 4, 8)) == ((batch,), (token,), (Factor(4),), (Factor(8),))
    assert regrouped(((batch, token), (width,)), (7, 6, 32)) == axes
    assert regrouped(axes, (7, 1, 6, 32)) == ((batch,), (), (token,), (width,))
    assert regrouped(axes, (7, 2, 3, 32)) is None
    assert regrouped(axes, (7, 3, 64)) is None
