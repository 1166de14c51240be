"""An exported program becomes a plain graph of positional tensors with its constants in place."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node

from calibrate.samples import InputSpec
from convert.errors import TightfitError

CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
ADVICE = "Capture a module that computes its outputs from its inputs and weights alone."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export explains itself at length on the console; what matters comes as an exception."""
    previous, sink = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators and nested graphs; the same object where it has none."""
    if not any(_needs_functionalising(n) for n in program.graph.nodes):
        return program
    with quiet():
        return program.run_decompositions({})


def _needs_functionalising(node: Node) -> bool:
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    return isinstance(node.target, torch._ops.HigherOrderOperator) or (schema is not None and schema.is_mutable)


def unlift(program: ExportedProgram, prefix: str = "") -> GraphModule:
    """`program.graph` with parameters and buffers as get_attr nodes and only tensors as placeholders.

    `prefix` is cut from the names of parameters and modules. Each get_attr node's meta has "fqn", the parameter's name
    in the model, and "parameter", whether it is an nn.Parameter. Tensors that share memory become one constant.
    Raises TightfitError for a program with state, custom objects or control flow.
    """
    root = torch.nn.Module()
    graph = Graph()
    copies: dict[Node, Any] = {}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    shared: dict[tuple[object, ...], Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            copies[node] = _input(program, node, specs[node.name], graph, root, shared, prefix)
        elif node.op == "get_attr" and isinstance(value := _attribute(program.graph_module, node), Tensor):
            copies[node] = _constant(graph, root, str(node.target), value, node, shared, parameter=False)
        elif node.op == "output":
            graph.output(_outputs(program, node, copies))
        else:
            copies[node] = _operator(graph, node, copies, prefix)
    result = GraphModule(root, graph).eval()
    result.graph.lint()
    return result


def _input(
    program: ExportedProgram,
    node: Node,
    spec: Any,
    graph: Graph,
    root: torch.nn.Module,
    shared: dict[tuple[object, ...], Node],
    prefix: str,
) -> Any:
    if spec.kind in CONSTANTS:
        stored = spec.target in program.state_dict and spec.persistent is not False
        value = (program.state_dict if stored else program.constants)[spec.target]
        name = str(spec.target).removeprefix(prefix)
        return _constant(graph, root, name, value, node, shared, parameter=spec.kind == InputKind.PARAMETER)
    if spec.kind != InputKind.USER_INPUT:
        raise TightfitError(f"the exported program holds {spec.kind.name.lower()} '{spec.arg.name}'. {ADVICE}")
    if isinstance(spec.arg, ConstantArgument):
        return spec.arg.value
    placeholder = graph.placeholder(node.name)
    placeholder.meta = {"val": node.meta["val"]}
    return placeholder


def _constant(
    graph: Graph,
    root: torch.nn.Module,
    name: str,
    value: Tensor,
    node: Node,
    shared: dict[tuple[object, ...], Node],
    parameter: bool,
) -> Node:
    value = value.detach()
    key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
    if value.numel() and key in shared:
        return shared[key]
    attribute = _free(root, name.replace(".", "_"))
    if parameter:
        root.register_parameter(attribute, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    else:
        root.register_buffer(attribute, value.contiguous())
    made = graph.get_attr(attribute)
    made.meta = {"val": node.meta.get("val", value), "fqn": name, "parameter": parameter}
    shared[key] = made
    return made


def _free(root: torch.nn.Module, stem: str) -> str:
    name, count = stem, 0
    while hasattr(root, name):
        count += 1
        name = f"{stem}_{count}"
    return name


def _attribute(owner: Any, node: Node) -> Any:
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def _operator(graph: Graph, node: Node, copies: dict[Node, Any], prefix: str) -> Node:
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        raise TightfitError(
            f"the exported program branches or loops ({node.target}), which no target of ours runs. Compute both sides "
            "and choose with torch.where."
        )
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
    made = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    made.meta = {k: node.meta[k] for k in ("val", "custom") if k in node.meta}
    stack = node.meta.get("nn_module_stack") or {}
    made.meta["nn_module_stack"] = {k: (_path(v[0], prefix), _kind(v[1])) for k, v in stack.items()}
    return made


def _path(path: str, prefix: str) -> str:
    """A module's name in the user's model; the root and our own wrapper are both ""."""
    if path == prefix.rstrip(".") or path.startswith("_empty_nn_module_stack"):
        return ""
    return path.removeprefix(prefix)


def _kind(module: Any) -> str:
    return module if isinstance(module, str) else f"{module.__module__}.{module.__qualname__}"


def _outputs(program: ExportedProgram, node: Node, copies: dict[Node, Any]) -> tuple[Any, ...]:
    changed = [s.target or s.arg.name for s in program.graph_signature.output_specs if s.kind != OutputKind.USER_OUTPUT]
    if changed:
        raise TightfitError(f"the model changes '{changed[0]}' while it runs. {ADVICE}")
    pairs = zip(program.graph_signature.output_specs, node.args[0], strict=True)
    return tuple(copies[value] for spec, value in pairs if isinstance(spec.arg, TensorArgument))


def input_specs(graph: GraphModule) -> tuple[InputSpec, ...]:
    """The placeholders as specs; a dynamic batch has length 1, any other dynamic axis is -1."""
    return tuple(_spec(n) for n in graph.graph.nodes if n.op == "placeholder")


def _spec(node: Node) -> InputSpec:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise TightfitError(f"the input '{node.name}' has no batch axis: every input needs samples along axis 0.")
    dynamic = isinstance(value.shape[0], torch.SymInt)
    rest = tuple(-1 if isinstance(d, torch.SymInt) else int(d) for d in value.shape[1:])
    dtype = str(value.dtype).removeprefix("torch.")
    return InputSpec(node.name, (1 if dynamic else int(value.shape[0]), *rest), dtype, dynamic)
