"""MIL's recurrent layers. x: (steps, batch, features)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from targets.errors import TargetError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise TargetError(f"the MIL executor has no recurrent activation '{name}'")
    return _ACTIVATIONS[name]


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order input, forget, output, cell. Returns (every step or the last, last h, last c)."""
    functions = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))
    if direction != "bidirectional":
        turned = x.flip(0) if direction == "reverse" else x
        y, h, c = _lstm(turned, initial_h, initial_c, weight_ih, weight_hh, bias, functions)
        y = y.flip(0) if direction == "reverse" else y
        return (y if output_sequence else h[None]), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise TargetError("a bidirectional lstm has no weights for its backward direction")
    (h0, h1), (c0, c1) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    y0, h0, c0 = _lstm(x, h0, c0, weight_ih, weight_hh, bias, functions)
    y1, h1, c1 = _lstm(x.flip(0), h1, c1, weight_ih_back, weight_hh_back, bias_back, functions)
    h, c = torch.cat([h0, h1], -1), torch.cat([c0, c1], -1)
    return (torch.cat([y0, y1.flip(0)], -1) if output_sequence else h[None]), h, c


def _lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    functions: tuple[Callable[[Tensor], Tensor], ...],
) -> tuple[Tensor, Tensor, Tensor]:
    gate, cell, out = functions
    steps = []
    for step in torch.nn.functional.linear(x, weight_ih, bias):
        i, f, o, z = (step + h @ weight_hh.T).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell(z)
        h = gate(o) * out(c)
        steps.append(h)
    return torch.stack(steps), h, c


def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = True,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update (MIL's documentation). Returns (every step or the last, last h)."""
    gate, out = _activation(recurrent_activation), _activation(activation)
    h, steps = initial_h, []
    inputs = torch.nn.functional.linear(x.flip(0) if direction == "reverse" else x, weight_ih, input_bias)
    (hidden_r, hidden_o, hidden_z) = weight_hh.chunk(3, 0)
    (bias_r, bias_o, bias_z) = bias.chunk(3) if bias is not None else (0.0, 0.0, 0.0)
    for step in inputs:
        input_r, input_o, input_z = step.chunk(3, -1)
        r = gate(input_r + h @ hidden_r.T + bias_r)
        z = gate(input_z + h @ hidden_z.T + bias_z)
        inner = r * (h @ hidden_o.T + bias_o) if reset_after else (r * h) @ hidden_o.T + bias_o
        h = (1 - z) * out(input_o + inner) + z * h
        steps.append(h)
    sequence = torch.stack(steps)
    sequence = sequence.flip(0) if direction == "reverse" else sequence
    return (sequence if output_sequence else h[None]), h


OPS: dict[str, Callable[..., Any]] = {"gru": gru, "lstm": lstm}
