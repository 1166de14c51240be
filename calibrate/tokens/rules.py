"""How each kind of operator carries tokens from its operands to its result, or why it cannot."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..graph import operator_name
from .axes import TOKENS, Axes, Factor, combined, holds_tokens, layout_of_tokens, plain, regrouped, tokens_alone
from .axis import Trail, joined, refuse

Rule = Callable[[Node, Trail], Any]
SPATIAL = "it works on the grid of neighbouring tokens (spatial), which a pruned image no longer has"
WINDOWED = (
    "it splits the tokens into a grid or windows (spatial, as in Swin), and windows need all their tokens; "
    "only encoders whose attention sees all tokens can be pruned"
)
_ELEMENTWISE = (
    "add sub mul div neg pow sqrt rsqrt exp log erf abs relu clamp leaky_relu elu gelu silu sigmoid tanh hardswish "
    "hardsigmoid mish softplus where compare cast zeros_like full_like ones_like"
)


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _tensor(node: Node, trail: Trail, position: int = 0) -> Axes:
    """The axes of the operand that must be the one with tokens."""
    source = node.args[position]
    others = [a for a in node.all_input_nodes if a in trail.axes and a is not source]
    if source not in trail.axes or others:
        refuse(node, "tokens reach it as a weight or a table, not as its input")
    axes: Axes = trail.axes[source]
    return axes


def _elementwise(node: Node, trail: Trail) -> Axes:
    operands = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    return joined(node, trail, operands, len(trail.shape(node)))


def _same(node: Node, trail: Trail) -> Axes:
    return _tensor(node, trail)


def _softmax(node: Node, trail: Trail) -> Axes:
    return _tensor(node, trail)


def _linear(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    if holds_tokens(axes[-1]):
        refuse(node, "the layer reads every token at its own place, one weight for each")
    return (*axes[:-1], plain(trail.shape(node)[-1]))


def _normalised_last(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    if any(holds_tokens(a) for a in axes[-len(node.args[1]) :]):
        refuse(node, "it normalises over the tokens, with a weight for each")
    return axes


def _batch_norm(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    if len(axes) > 1 and holds_tokens(axes[1]):
        refuse(node, "it has statistics of its own for each token's place")
    return axes


def _conv(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    weight = trail.shape(node.args[1])
    padding = _argument(node, 4, "padding", [0])
    stride = _argument(node, 3, "stride", [1])
    same = operator_name(node) == "conv1d" and weight[2] == 1 and list(padding) == [0] and list(stride) == [1]
    if not same or holds_tokens(axes[-2]):
        refuse(node, SPATIAL)
    return (*axes[:-2], plain(trail.shape(node)[-2]), axes[-1])


def _matmul(node: Node, trail: Trail) -> Axes:
    left, right = node.args[:2]
    shapes = [trail.shape(a) for a in (left, right)]
    if min(len(s) for s in shapes) < 2:
        refuse(node, "it multiplies a vector, which has no axis for the tokens")
    a, b = (trail.axes.get(x) or tuple(plain(s) for s in shape) for x, shape in zip((left, right), shapes, strict=True))
    _contract(node, trail, a, b)
    rank = len(trail.shape(node))
    batch: list[Any] = [()] * (rank - 2)
    for axes in (a, b):
        for i in range(3, len(axes) + 1):
            both = combined(batch[-(i - 2)], axes[-i])
            if both is None:
                refuse(node, "it multiplies tokens with a value that holds them along another axis")
            batch[-(i - 2)] = both
    for operand in (left, right):
        if operand not in trail.axes:
            trail.meet(node, operand, (*batch, *_contracted(a, b, operand is left)))
    return (*batch, a[-2], b[-1])


def _contracted(a: Axes, b: Axes, left: bool) -> Axes:
    """What the last two axes of an operand from before the cut lie along: the other's contracted axis."""
    return ((), b[-2]) if left else (a[-1], ())


def _contract(node: Node, trail: Trail, a: Axes, b: Axes) -> None:
    """Refuse a sum over tokens whose other operand holds something else, unless it is from before the cut."""
    inside = [x for x in node.args[:2] if x in trail.behind]
    if len(inside) == 2 and combined(a[-1], b[-2]) is None:
        refuse(node, "it sums tokens against a value that no longer holds them")
    if any(holds_tokens(x) and not tokens_alone(x) for x in (a[-1], b[-2])):
        refuse(node, "it sums over tokens that are folded into one axis with others")


def _attention(node: Node, trail: Trail) -> Axes:
    query, key, value = node.args[:3]
    if _argument(node, 5, "is_causal", False):
        refuse(node, "attention is causal: a causal decoder reads its last token, and each token only those before it")
    axes = [trail.axes.get(x) or tuple(plain(s) for s in trail.shape(x)) for x in (query, key, value)]
    q, k, v = axes
    if any(holds_tokens(a) for x in axes for a in (*x[:-2], x[-1])):
        refuse(node, "the tokens are not the axis that attention runs over")
    batch = [combined(x, y) or () for x, y in zip(q[:-2], k[:-2], strict=True)]
    mask = _argument(node, 3, "attn_mask")
    if mask in trail.behind:
        refuse(node, "its mask is computed from the tokens")
    trail.meet(node, mask, (*batch, q[-2], k[-2]))
    for operand, other in ((key, v), (value, k)):
        if operand not in trail.axes:
            trail.meet(node, operand, (*batch, other[-2], ()))
    return (*q[:-1], v[-1])


def _permute(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    return tuple(axes[d] for d in node.args[1])


def _transpose(node: Node, trail: Trail) -> Axes:
    axes = list(_tensor(node, trail))
    one, other = node.args[1:3]
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


def _reshape(node: Node, trail: Trail) -> Axes:
    made = regrouped(_tensor(node, trail), trail.shape(node))
    if made is None:
        refuse(node, WINDOWED)
    if operator_name(node) == "reshape":
        trail.resized.append(node)
    return made


def _expand(node: Node, trail: Trail) -> Axes:
    axes, shape = _tensor(node, trail), trail.shape(node)
    if operator_name(node) != "expand":
        refuse(node, "it repeats tokens")
    whole = ((),) * (len(shape) - len(axes)) + axes
    trail.resized.append(node)
    return tuple(a if a else plain(s) for a, s in zip(whole, shape, strict=True))


def _slice(node: Node, trail: Trail) -> Axes:
    axes = list(_tensor(node, trail))
    dim, start, end = (_argument(node, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "end")))
    dim, start, step = dim or 0, start or 0, _argument(node, 4, "step", 1)
    if not holds_tokens(axes[dim]):
        axes[dim] = plain(trail.shape(node)[dim])
        return tuple(axes)
    before, tokens, after = layout_of_tokens(axes[dim])
    if operator_name(node) != "slice" or before * after != 1 or step != 1 or not isinstance(start, int) or start < 0:
        refuse(node, "it takes tokens by their place")
    if tokens.skipped + start <= trail.protected and (end is None or end >= tokens.size):
        axes[dim] = (Factor(tokens.size - start, TOKENS, tokens.skipped + start),)
    elif isinstance(end, int) and 0 <= tokens.skipped + end <= trail.protected:
        axes[dim] = plain(end - start)
    else:
        refuse(node, "it takes a range of tokens by their place, and those may be gone")
    return tuple(axes)


def _select(node: Node, trail: Trail) -> Axes:
    axes = list(_tensor(node, trail))
    dim, index = node.args[1:3]
    axis = axes.pop(dim)
    if holds_tokens(axis):
        known = tokens_alone(axis) and isinstance(index, int)
        if not known or index < 0 or index + axis[0].skipped >= trail.protected:
            refuse(node, f"it reads the token at place {index}, which may be gone (as a causal decoder reads its last)")
    return tuple(axes)


def _split(node: Node, trail: Trail) -> list[Axes]:
    axes = _tensor(node, trail)
    name = operator_name(node)
    dim = _argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(axes)
    if holds_tokens(axes[dim]):
        refuse(node, "it splits the tokens by their place")
    keep = () if name == "unbind" else (None,)
    parts = [trail.sizes.of(p) for p in node.meta["val"]]
    return [(*axes[:dim], *(plain(p[dim]) for _ in keep), *axes[dim + 1 :]) for p in parts]


def _getitem(node: Node, trail: Trail) -> Axes:
    made: Axes = trail.axes[node.args[0]][node.args[1]]
    return made


def _cat(node: Node, trail: Trail) -> Axes:
    parts, dim = list(node.args[0]), _argument(node, 1, "dim", 0)
    rank = len(trail.shape(node))
    dim = dim % rank - rank
    if any(holds_tokens(trail.axes[p][dim]) for p in parts if p in trail.axes):
        refuse(node, "it joins the tokens with further ones, so that places change")
    made = list(joined(node, trail, parts, rank))
    made[dim] = plain(trail.shape(node)[dim])
    return tuple(made)


def _pool(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    dims = _argument(node, 1, "dim", None)
    dims = [dims] if isinstance(dims, int) else dims or range(len(axes))
    gone = {d % len(axes) for d in dims}
    over = [axes[d] for d in gone if holds_tokens(axes[d])]
    if any(not tokens_alone(a) for a in over):
        refuse(node, "it pools tokens that are folded into one axis with others")
    if over:
        trail.pooled.append(node)
    keep = _argument(node, 2, "keepdim", False)
    return tuple(() if i in gone else a for i, a in enumerate(axes) if keep or i not in gone)


def _adaptive(node: Node, trail: Trail) -> Axes:
    axes = _tensor(node, trail)
    if operator_name(node) != "adaptive_avg_pool1d" or not tokens_alone(axes[-1]) or trail.shape(node)[-1] != 1:
        refuse(node, SPATIAL)
    trail.pooled.append(node)
    return (*axes[:-1], ())


def _pad(node: Node, trail: Trail) -> Axes:
    axes = list(_tensor(node, trail))
    amounts = list(node.args[1])
    for i in range(len(amounts) // 2):
        if any(amounts[2 * i : 2 * i + 2]):
            if holds_tokens(axes[-1 - i]):
                refuse(node, "it pads the tokens to a fixed number (windowed)")
            axes[-1 - i] = plain(trail.shape(node)[-1 - i])
    return tuple(axes)


def _never(why: str) -> Rule:
    def rule(node: Node, trail: Trail) -> Axes:
        refuse(node, why)

    return rule


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised_last),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _pool),
    **dict.fromkeys(("bmm", "mm"), _matmul),
    "softmax": _softmax,
    "log_softmax": _softmax,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "conv": _conv,
    "matmul": _matmul,
    "attention": _attention,
    "permute": _permute,
    "transpose": _transpose,
    "reshape": _reshape,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "getitem": _getitem,
    "cat": _cat,
    "adaptive_avg_pool1d": _adaptive,
    "pad": _pad,
    **dict.fromkeys(("max_pool", "avg_pool", "adaptive_avg_pool2d", "upsample", "pixel_shuffle"), _never(SPATIAL)),
    "conv_transpose": _never(SPATIAL),
    "cumsum": _never("it adds tokens up in their order, as causal and state-space models do"),
    "lstm": _never("it reads the tokens in their order"),
    **dict.fromkeys(("baddbmm", "addmm"), _never("there is no rule for a product with an addend")),
    **dict.fromkeys(("linalg_vector_norm", "max", "min"), _never("there is no rule for how it treats tokens")),
    "gather": _never("it looks tokens up by their place"),
    "scatter": _never("it writes to tokens by their place"),
    "roll": _never(WINDOWED),
}
