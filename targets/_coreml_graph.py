"""Prepare a graph for coremltools: static shapes, no operators that its frontend refuses, the job's own node names.

coremltools (9.0) translates ATen as `torch.export` gives it, but refuses nodes that models contain (`alias`,
`where.ScalarOther`, `new_ones`, weights that are not contiguous). They go here, each by a rewrite that changes no
number; `finite_masks` is the one exception and says so.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from calibrate import qdq
from calibrate.graph import add_constant, constant, layer_name

from . import Job
from ._coreml_weights import PACKED_WEIGHT, mark_weights, refuse
from .errors import TargetError

aten = torch.ops.aten

HALF_MAX = 65504.0
MASKED = -3e4  # coremltools' own stand-in for -inf; the sum of two such masks is still finite in float16

_IDENTITIES = {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default}
_IDENTITIES |= {aten.detach_.default, aten.lift_fresh_copy.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_KEPT = {qdq.DEQUANTIZE_CHANNEL, qdq.DEQUANTIZE, qdq.LOOKUP, PACKED_WEIGHT}
_DYNAMIC = {qdq.DYNAMIC_LINEAR, qdq.DYNAMIC_CONV2D}
_WHERE = {aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}


@torch.library.custom_op("tightfit::half_weight", mutates_args=())
def half_weight(weight: Tensor) -> Tensor:
    """A float16 constant, read as float32: what Core ML calls constexpr_cast. Any shape."""
    return weight.float()


@half_weight.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


HALF_WEIGHT = torch.ops.tightfit.half_weight.default


def interface_dtype(dtype: torch.dtype) -> torch.dtype:
    """What stands at a Core ML input or output for a tensor of `dtype`: float32, or int32 for all that is whole."""
    return torch.float32 if dtype.is_floating_point else torch.int32


def prepare(job: Job, supported: Callable[[Node], bool]) -> torch.export.ExportedProgram:
    """The job's graph as coremltools takes it; nodes carry the names they have in `job.graph`.

    `supported` says of a node whether coremltools can translate its operator. Raises TargetError for what cannot
    be expressed in Core ML.
    """
    _refuse(job)
    examples = tuple(torch.zeros(spec.shape, dtype=_entry_dtype(spec.dtype)) for spec in job.inputs)
    source = _copy(job.graph)
    _fit_interface(source, [getattr(torch, spec.dtype) for spec in job.inputs])
    origin = id(source.graph)
    module = _functional(_exported(source, examples)).module(check_guards=False)
    _clean(module, job.compute == "float16")
    program = _exported(module, examples).run_decompositions({})
    program = _decomposed(program, supported)
    _make_contiguous(program)
    _restore_names(program, origin)
    return program


def _refuse(job: Job) -> None:
    """Raise TargetError for quantization that Core ML has no operators for."""
    for node in job.graph.graph.nodes:
        refuse(job.graph, node)
        if node.target in _DYNAMIC:
            raise TargetError(
                f"layer '{layer_name(node)}' is quantized dynamically, which Core ML cannot do; "
                "use the recipe int8-weights (or int8) for this device"
            )
        if node.target is qdq.QUANTIZE:
            low, high, dtype = node.args[3:6]
            if dtype not in (torch.int8, torch.uint8):
                raise TargetError(
                    f"'{node.name}' quantizes to {str(dtype).removeprefix('torch.')}, but activations in Core ML are "
                    "int8 or uint8; use the recipe int8, or int8-weights with float16 activations"
                )
            if (low, high) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
                raise TargetError(
                    f"'{node.name}' quantizes to [{low}, {high}], but Core ML saturates at the ends of {dtype}; "
                    "let activations use the whole range"
                )


def _entry_dtype(name: str) -> torch.dtype:
    """The example's type: int64 stays, because coremltools reads it as int32 by itself."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype if dtype == torch.int64 else interface_dtype(dtype)


def _copy(module: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def _fit_interface(module: GraphModule, dtypes: list[torch.dtype]) -> None:
    """Cast between what Core ML's interface holds (float32, int32) and what the graph computes with."""
    graph = module.graph
    _drop_checks(graph)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, dtype in zip(placeholders, dtypes, strict=True):
        if dtype == torch.int64 or dtype == interface_dtype(dtype):
            continue
        users = list(node.users)
        with graph.inserting_after(placeholders[-1]):
            if dtype == torch.bool:
                cast = graph.call_function(aten.ne.Scalar, (node, 0))
            else:
                cast = graph.call_function(aten.to.dtype, (node, dtype))
        for user in users:
            user.replace_input_with(node, cast)
    module.recompile()


def _exported(module: GraphModule, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, examples, strict=False)


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without operators that write into their operands: folding a constant would otherwise fold away a write."""
    calls = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    if any(target._schema.is_mutable and target not in _IDENTITIES for target in calls):
        return program.run_decompositions({})
    return program


def _clean(module: GraphModule, half: bool) -> None:
    """Every rewrite, in an order in which each sees what the earlier ones left."""
    graph = module.graph
    _drop_checks(graph)
    for node in list(graph.nodes):
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _VIEWS:  # a view may have leant on the contiguous copy that is gone
            node.target = aten.reshape.default
    _spell_out_strides(graph)
    _fill_by_shape(module)
    _tensor_where(module)
    _mark_half_weights(module, half)
    mark_weights(module, half)
    _fold(module)
    if half:
        finite_masks(module)
    _separate_outputs(graph)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _drop_checks(graph: Graph) -> None:
    """Assertions and guards: shapes are static and were checked at capture."""
    for node in reversed(list(graph.nodes)):
        label = str(node.target)
        check = label.startswith(("aten._assert", "aten.sym_constrain", "_guards_fn"))
        if check and node.op in ("call_function", "call_module") and not node.users:
            graph.erase_node(node)


def _fill_by_shape(module: GraphModule) -> None:
    """zeros_like(x, dtype=float32) and its kin -> a constant: shapes are static, and coremltools ignores the dtype, so
    that zeros like a bool mask would become a bool mask, which means the opposite of an additive one."""
    fills = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
    for node in list(module.graph.nodes):
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name in fills or name in ("full_like", "new_full"):
            value = fills.get(name, node.args[-1])
            if isinstance(value, Node):
                continue
            made = node.meta["val"]
            constant = add_constant(module, name, torch.full(tuple(made.shape), value, dtype=made.dtype), node)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)


def _spell_out_strides(graph: Graph) -> None:
    """max_pool(x, 2) -> max_pool(x, 2, 2): coremltools wants the stride; left out, it is the kernel's size."""
    for node in graph.nodes:
        pools = str(node.target).startswith(("aten.max_pool", "aten.avg_pool"))
        if pools and "stride" not in node.kwargs and (len(node.args) < 3 or not node.args[2]):
            node.args = (*node.args[:2], node.args[1], *node.args[3:])


def _tensor_where(module: GraphModule) -> None:
    """where(cond, 1.0, x) -> where(cond, tensor(1.0), x); a branch that is a number takes the result's type.

    A masked_fill whose mask is larger than what it fills is such a `where` too: coremltools gives it the shape of what
    it fills.
    """
    for node in list(module.graph.nodes):
        if node.target in _FILLS and node.args[0].meta["val"].shape != node.meta["val"].shape:
            filled, mask, value = node.args
            node.target, node.args = aten.where.ScalarSelf, (mask, value, filled)
        if node.target not in _WHERE:
            continue
        dtype = node.meta["val"].dtype
        branches = (
            b if isinstance(b, Node) else add_constant(module, "branch", torch.tensor(b, dtype=dtype), node)
            for b in node.args[1:]
        )
        node.args = (node.args[0], *branches)
        node.target = aten.where.self


def _mark_half_weights(module: GraphModule, half: bool) -> None:
    """float16 constant -> float32: stored as float16. With float16 compute coremltools does so by itself."""
    if half:
        return
    for node in module.graph.nodes:
        if node.target not in (aten.to.dtype, aten._to_copy.default) or node.args[0].op != "get_attr":
            continue
        weight = constant(module, node.args[0])
        if weight.dtype == torch.float16 and node.meta["val"].dtype == torch.float32 and weight.ndim:
            node.target, node.args, node.kwargs = HALF_WEIGHT, (node.args[0],), {}


def _fold(module: GraphModule) -> None:
    """Compute now what depends on no input: masks, positions, ranges; never the unpacking of weights."""
    for node in list(module.graph.nodes):
        if not _is_foldable(node):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: constant(module, n))
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        node.replace_all_uses_with(add_constant(module, "folded", value, node))
        module.graph.erase_node(node)


def _is_foldable(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _KEPT or node.target is HALF_WEIGHT or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    one_tensor = isinstance(node.meta.get("val"), Tensor)
    return one_tensor and all(source.op == "get_attr" for source in node.all_input_nodes)


def finite_masks(module: GraphModule) -> None:
    """Replace numbers below float16's range by MASKED: the one rewrite here that changes numbers.

    Attention masks hold -inf or float32's minimum; in float16 both are -inf, and a row that is masked throughout
    becomes NaN. exp(-3e4) is as much zero as exp(-inf), so the softmax of every other row stays what it was.
    """
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            value = constant(module, node)
            if value.is_floating_point() and bool((value < -HALF_MAX).any()):
                finite = torch.where(value < -HALF_MAX, MASKED, value)
                node.replace_all_uses_with(add_constant(module, "finite_mask", finite, node))
        elif node.op == "call_function" and node.target not in _CLAMPS:
            node.args = tuple(MASKED if _below_half(a) else a for a in node.args)


_CLAMPS = {aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default}


def _below_half(value: object) -> bool:
    return isinstance(value, float) and value < -HALF_MAX


def _separate_outputs(graph: Graph) -> None:
    """Cast outputs to Core ML's types; one that is an input, a constant or another output gets its own operator."""
    output = graph.output_node()
    seen: set[Node] = set()
    results: list[Node] = []
    for node in _flat(output.args[0]):
        dtype = node.meta["val"].dtype
        with graph.inserting_before(output):
            if dtype not in (torch.int64, interface_dtype(dtype)):
                node = graph.call_function(aten._to_copy.default, (node,), {"dtype": interface_dtype(dtype)})
            elif node in seen or node.op != "call_function":
                node = graph.call_function(aten.mul.Tensor, (node, 1))  # a clone would be seen through
        seen.add(node)
        results.append(node)
    output.args = (tuple(results),)


def _flat(value: object) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)


def _decomposed(
    program: torch.export.ExportedProgram, supported: Callable[[Node], bool]
) -> torch.export.ExportedProgram:
    """Take apart only the operators that coremltools does not know and torch can decompose, until none is left."""
    table = torch.export.default_decompositions()
    for _ in range(3):
        unknown = {n.target for n in program.graph.nodes if n.op == "call_function" and not supported(n)}
        known = {op: table[op] for op in unknown if op in table}
        if not known:
            return program
        with torch.no_grad():
            program = program.run_decompositions(known)
    return program


def _make_contiguous(program: torch.export.ExportedProgram) -> None:
    """Weights in channels-last or transposed memory are refused by coremltools."""
    for store in (program.state_dict, program.constants):
        for name, value in store.items():
            if isinstance(value, Tensor) and not value.is_contiguous():
                store[name] = value.detach().contiguous()


def _restore_names(program: torch.export.ExportedProgram, origin: int) -> None:
    """Name every node after the node of the job's graph it comes from; the last of several has the plain name."""
    last: dict[str, Node] = {}
    computed = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the user's machine: they shall not reach the package
        name = _source_name(node.meta.get("from_node", ()), origin)
        if node.op == "call_function" and name:
            last[name] = node
    for node in computed:
        if last.get(node.name, node) is not node:
            node._rename(f"{node.name}_part")
    for name, node in last.items():
        if node.name != name:
            node._rename(name)
    specs = program.graph_signature.output_specs
    for spec, node in zip(specs, program.graph.output_node().args[0], strict=True):
        spec.arg.name = node.name


def _source_name(sources: object, origin: int) -> str | None:
    for source in sources if isinstance(sources, list | tuple) else ():
        if source.graph_id == origin:
            return str(source.name)
        found = _source_name(source.from_node, origin)
        if found:
            return found
    return None
