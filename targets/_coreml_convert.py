"""coremltools' part of the lowering: convert, teach it stored weights, explain what it refuses."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from calibrate.graph import layer_name

from . import Job
from ._coreml_graph import interface_dtype, prepare
from ._coreml_weights import SYSTEMS, register, system_of
from .errors import TargetError
from .mil.reader import coremltools, quiet


def convert(job: Job, inputs: list[str], outputs: list[str]) -> Any:
    """The job as coremltools' MLModel (not loaded), its features called `inputs` and `outputs`.

    Raises TargetError naming operator and layer where coremltools refuses one.
    """
    ct = coremltools()
    program = _prepared(job)
    results = [node.meta["val"].dtype for node in program.graph.output_node().args[0]]
    entries = [getattr(torch, spec.dtype) for spec in job.inputs]
    try:
        with quiet():
            return ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[
                    ct.TensorType(name=name, shape=spec.shape, dtype=_numpy(dtype))
                    for name, spec, dtype in zip(inputs, job.inputs, entries, strict=True)
                ],
                outputs=[
                    ct.TensorType(name=name, dtype=_numpy(dtype)) for name, dtype in zip(outputs, results, strict=True)
                ],
                compute_precision=ct.precision.FLOAT16 if job.compute == "float16" else ct.precision.FLOAT32,
                minimum_deployment_target=deployment_target(ct, job),
                pass_pipeline=_passes(ct),
                skip_model_load=True,
            )
    except Exception as error:
        raise TargetError(_explanation(error, job)) from error


def _passes(ct: Any) -> Any:
    """coremltools' own passes but those that change numbers: a pass that rescales the operands of a quantized add
    makes its codes differ in float16, where 127 * (scale_a / scale_b) rounds."""
    pipeline = ct.PassPipeline()
    pipeline.remove_passes({"common::distributive_quantized_binary_op_scale_normalization"})
    return pipeline


def _prepared(job: Job) -> torch.export.ExportedProgram:
    try:
        with quiet():
            _register_weights()
            return prepare(job, supported())
    except TargetError:
        raise
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TargetError(f"the graph cannot be exported at the shapes of its inputs: {cause}") from error


def deployment_target(ct: Any, job: Job) -> Any:
    """The profile's, raised where the graph holds what earlier systems cannot read: it says what is needed."""
    return getattr(ct.target, needed_system(job))


def needed_system(job: Job) -> str:
    """The oldest system that this job's file may ask for: the profile's deployment target, or what its formats need."""
    wanted: set[str] = {job.rules.deployment_target or "iOS17"}
    wanted |= {system_of(job.graph, node) for node in job.graph.graph.nodes}
    return max(wanted, key=SYSTEMS.index)


def supported() -> Callable[[Node], bool]:
    """Whether coremltools' frontend has a translation for a node's operator."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    def known(node: Node) -> bool:
        target: Any = node.target
        label = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
        return _TORCH_OPS_REGISTRY.get_func(label) is not None

    return known


def _register_weights() -> None:
    """Teach coremltools the stored weights of our own: codes, palettes, and float16 constants as constexpr_cast."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def half_weight(context: Any, node: Any) -> None:
        stored = np.asarray(context[node.inputs[0]].val, dtype=np.float16)
        context.add(Builder.constexpr_cast(source_val=stored, output_dtype="fp32", name=node.name))

    register_torch_op(half_weight, torch_alias=["tightfit::half_weight"], override=True)
    register(Builder)


def _numpy(dtype: torch.dtype) -> type:
    return np.float32 if interface_dtype(dtype) is torch.float32 else np.int32


def _explanation(error: Exception, job: Job) -> str:
    """What coremltools could not convert: the layer and the operator, found in the frames of its traceback."""
    node = _failed_node(error.__traceback__)
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = (
        "rewrite the layer with other operators, lower to another target, "
        "or report the operator so that it gets a rewrite"
    )
    if node is None:
        return f"coremltools cannot convert this graph: {cause}; {advice}"
    name, operator = node
    layers = {n.name: layer_name(n) for n in job.graph.graph.nodes}
    return f"coremltools cannot convert layer '{layers.get(name, name)}' (operator {operator}): {cause}; {advice}"


def _failed_node(traceback: TracebackType | None) -> tuple[str, str] | None:
    found = None
    while traceback is not None:
        code, local = traceback.tb_frame.f_code.co_name, traceback.tb_frame.f_locals
        if code in ("convert_single_node", "from_exir_node") and "node" in local:
            node = local["node"]
            found = node.name, str(getattr(node, "kind", getattr(node, "target", "?")))
        traceback = traceback.tb_next
    return found
