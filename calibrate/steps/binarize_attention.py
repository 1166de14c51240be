"""Attention of one bit: its products read signs of queries and keys, and bits of probabilities."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from calibrate import attention_parts, kept, qdq, signs
from calibrate import binarize_attention as methods
from calibrate.attention_bits import Place, Unfit, values
from calibrate.errors import CalibrationError
from calibrate.graph import finish
from calibrate.plan import Entry
from calibrate.registry import refuse_unknown
from calibrate.steps import Context, first

NAME = "binarize_attention"
WARNING = "few networks bear it without training: put finetune behind it"
NONE = "it has no attention to follow (a softmax between two products): leave the step out of the recipe"


class BinarizeAttention:
    """Bits in every attention, fitted one after the other: each sees what those before it give as bits.

    `method` is one of `calibrate/binarize_attention/`, `options` what it is told; attentions named in `wide` stay as
    they are. Attention that is one operator is written out. Scale and mask stand where they stood.
    """

    exact = False
    refines = True
    defaults: ClassVar[dict[str, Any]] = {"method": "softmax_aware", "options": {}, "samples": 128, "wide": ()}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = context.parameters
        method = methods.find(wish["method"])
        refused: dict[str, str] = {}
        attention_parts.write_out(graph, refused)
        found = list(attention_parts.find(graph))
        _check(wish, [a.name for a in found])
        if not found and not refused:
            return [Entry(NAME, "model", "left alone", NONE)]
        options = {**method.defaults, **wish["options"]}
        ledger = [Entry(NAME, name, "left as it is", reason) for name, reason in refused.items()]
        batches = first(context, int(wish["samples"]))
        for done, attention in enumerate(found):
            if attention.name in wish["wide"]:
                ledger.append(Entry(NAME, attention.name, "left as it is", "the recipe names it in `wide`"))
                continue
            place = Place(graph, attention, batches, context.plan, context.seed)
            ledger.append(_binarize(place, str(wish["method"]), options))
            context.progress(NAME, done + 1, len(found))
        return ledger

    def ensures(self, graph: GraphModule) -> str | None:
        return signs.wrong(graph) or kept.wrong(graph) or qdq.stray_codes(graph)


def _check(wish: Mapping[str, Any], names: list[str]) -> None:
    known = methods.find(wish["method"]).defaults
    refuse_unknown(f"{NAME}: the method {wish['method']}", known, wish["options"])
    if int(wish["samples"]) < 1:
        raise CalibrationError(f"{NAME} needs samples to fit bits to: set samples to 1 or more")
    absent = [name for name in wish["wide"] if name not in names]
    if absent:
        there = ", ".join(names) or "none"
        raise CalibrationError(f"{NAME}: no attention '{absent[0]}' to leave wide; there are {there}")


def _binarize(place: Place, method: str, options: Mapping[str, Any]) -> Entry:
    """One attention, and what it loses by it."""
    attention = place.attention
    real = [seen.output for seen in place.samples]
    try:
        output = methods.find(method).write(place, options)
    except Unfit as reason:
        return Entry(NAME, attention.name, "left as it is", str(reason))
    if output is not attention.output:
        attention.output.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    lost = _lost(real, [row[0] for row in values(place.graph, place.batches, [output])])
    finish(place.graph)
    told = f"{lost:.1%} of the power of its output lost; {WARNING}"
    return Entry(NAME, attention.name, f"attention on bits by {method}", told)


def _lost(real: list[Tensor], made: list[Tensor]) -> float:
    error = power = 0.0
    for wanted, got in zip(real, made, strict=True):
        error += float((wanted - got.reshape(wanted.shape)).square().sum(dtype=torch.float64))
        power += float(wanted.square().sum(dtype=torch.float64))
    return error / (power or 1.0)


STEP = BinarizeAttention()
