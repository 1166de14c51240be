"""One high-level ATen vocabulary, whatever torch.export or an importer wrote, so that later rooms recognise layers.

    aten.conv{1,2,3}d, aten.conv_transpose{1,2,3}d, aten.linear, aten.batch_norm, aten.layer_norm, aten.group_norm,
    aten.scaled_dot_product_attention, aten.softmax.int, gelu, relu, silu, hardswish, max_pool2d, adaptive_avg_pool2d,
    mean.dim, reshape (for view, flatten, unflatten), pad, to.dtype, ...

Every rewrite keeps the values: bit by bit where only the name of the operator changes, to float32 rounding where a
pattern written by hand becomes the operator it spells.
"""

from torch.fx import GraphModule

from calibrate.graph import finish

from .broadcasting import broadcasts_are_plain
from .folding import constants_are_folded, scalars_are_literal
from .identities import masks_hide_something, nothing_is_a_no_op, nothing_is_asserted, reshapes_are_single
from .layers import linears_are_recognised
from .naming import layers_are_named
from .operators import operators_are_high_level
from .patterns import patterns_are_recognised


def normalise(graph: GraphModule) -> GraphModule:
    """Bring `graph` (functional ATen) to the normal form, in place, name its layers, and return it."""
    nothing_is_asserted(graph)
    nothing_is_a_no_op(graph)
    operators_are_high_level(graph)
    linears_are_recognised(graph)
    constants_are_folded(graph)
    broadcasts_are_plain(graph)
    constants_are_folded(graph)
    masks_hide_something(graph)
    scalars_are_literal(graph)
    patterns_are_recognised(graph)
    linears_are_recognised(graph)
    reshapes_are_single(graph)
    nothing_is_a_no_op(graph)
    finish(graph)
    layers_are_named(graph)
    return graph
