"""Softmax-aware binarization: signs of queries and keys, a real softmax, and of its probabilities those that come near
the largest of their row (BiViT, arXiv 2211.07091)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.fx import Node

from ..attention_bits import Place, keep_probabilities, sign_scores


class SoftmaxAware:
    """softmax(q kᵀ) v becomes s * 1[A >= share * max A] v, where A is the softmax of products of signs.

    `threshold` of queries and keys: "channel", the mean of each; "tensor", that of all; "zero". `share`: "fitted", or
    a number in (0, 1] (the paper's is 0.25). `signed_values`: values become signs as well.
    """

    defaults: ClassVar[dict[str, Any]] = {"threshold": "channel", "share": "fitted", "signed_values": False}

    def write(self, place: Place, options: Mapping[str, Any]) -> Node:
        """See `AttentionBinarizer.write`."""
        _ = place.samples  # seen while it is real
        sign_scores(place, options["threshold"])
        return keep_probabilities(place, options["share"], bool(options["signed_values"]))


METHOD = SoftmaxAware()
