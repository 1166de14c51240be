"""A graph becomes an ONNX model in memory, through torch's own exporter; nothing is printed.

Each ONNX operator carries the name of the layer it came from: the nodes of `job.graph` are marked before the export,
and the marks survive torch's retracings.
"""

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from calibrate.graph import layer_name

from . import Job
from ._onnx_translate import translations
from ._sorts import as_topk
from .errors import TargetError

LAYER_KEY = "tightfit_layer"
EXPORT_OPSET = 18
"""What torch 2.13's exporter writes natively; `_onnx_opset` moves the model to the opset asked for."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from writing to the console; errors still raise."""
    sink = io.StringIO()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export(job: Job) -> ir.Model:
    """The ONNX model of `job.graph` at opset 18, not yet optimised, its nodes marked with their layers.

    Raises TargetError with the cause in torch's words where the graph has no ONNX form.
    """
    inputs = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in job.inputs)
    try:
        with quiet():
            program = torch.export.export(_marked(job.graph), inputs)
            exported = torch.onnx.export(
                program,
                inputs,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=EXPORT_OPSET,
                input_names=[spec.name for spec in job.inputs],
                output_names=list(job.outputs),
                custom_translation_table=translations(runtime=job.rules.runtime),
            )
    except Exception as error:  # the exporter's errors have no common base; the cause is in the innermost
        raise TargetError(f"'{job.name}' can't be written as ONNX: {_cause(error)}") from error
    assert exported is not None  # dynamo=True always returns a program
    _keep_layers(exported.model, exported.exported_program)
    return exported.model


def _marked(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy that shares the graph's tensors: guards dropped, each operator marked with its layer's name."""
    new = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    new.output(new.graph_copy(graph.graph, copies))
    for old, copy in copies.items():
        copy.meta = dict(old.meta)
        if old.op == "call_function":
            copy.meta["custom"] = {LAYER_KEY: layer_name(old)}
    for node in reversed(list(new.nodes)):
        if node.op == "call_module" and not node.users:  # `_guards_fn` of an unlifted exported program
            new.erase_node(node)
    marked = torch.fx.GraphModule(graph, new)
    as_topk(marked, ascends=True)
    return marked


def _keep_layers(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Replace what the exporter noted on each ONNX node (stack traces, paths) by the layer it came from."""
    layers = {node.name: node.meta.get("custom", {}).get(LAYER_KEY) for node in program.graph.nodes}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        layer = layers.get(scopes[-1])
        node.metadata_props.clear()
        if layer is not None:
            node.metadata_props[LAYER_KEY] = layer


def _cause(error: BaseException) -> str:
    """The innermost message, first line: there the exporter names the operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
