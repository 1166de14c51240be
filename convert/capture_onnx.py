"""`.onnx`: imported as a torch module, exported, and held against ONNX Runtime."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from calibrate.graph import run
from calibrate.samples import Batch, InputSpec
from convert.capture_program import functional, quiet, unlift
from convert.capture_pt2 import batches, resolved, samples
from convert.capture_raw import FLOOR_DB, Raw, Reference, sqnr_db
from convert.errors import TightfitError
from convert.onnx_import import OnnxModule, read

if TYPE_CHECKING:
    import onnxruntime
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from convert.onnx_import.reading import Declared


def capture_onnx(path: Path, *, inputs: Sequence[InputSpec], examples: Batch | None) -> Raw:
    """Import and export `path`; its batch is dynamic where the file says so, or where that is seen to work.

    Raises TightfitError for what can't be read or imported, or what ONNX Runtime refuses.
    """
    graph = read(path)
    if not graph.inputs:
        raise TightfitError(f"{path} has no input: it computes a constant.")
    declared = tuple(_spec(d, path) for d in graph.inputs)
    specs = resolved(declared, inputs, examples, str(path))
    module = OnnxModule(graph, path).eval()
    batch = samples(tuple(replace(s, dynamic_batch=True) for s in specs), examples, str(path))
    session = _session(path)
    captured, specs, notes = _captured(module, specs, batch, session, path)
    references = [_answered(session, declared, b, path) for b in batches(specs, batch)]
    return Raw(
        graph=captured,
        inputs=specs,
        outputs=graph.outputs,
        references=tuple(references),
        against=f"ONNX Runtime {_version()}",
        samples=len(next(iter(batch.values()))),
        synthetic=examples is None,
        notes=tuple(notes),
    )


def _spec(declared: "Declared", path: Path) -> InputSpec:
    if not declared.shape:
        raise TightfitError(
            f"the input '{declared.name}' of {path} has no batch axis: every input needs one as axis 0."
        )
    first, *rest = declared.shape
    return InputSpec(declared.name, (first or 1, *(d or -1 for d in rest)), declared.dtype, first is None)


def _captured(
    module: OnnxModule, specs: tuple[InputSpec, ...], batch: Batch, session: "onnxruntime.InferenceSession", path: Path
) -> tuple["GraphModule", tuple[InputSpec, ...], list[str]]:
    """The graph, the specs with what came of the batch, and why it is fixed where it is."""
    declared_dynamic = all(s.dynamic_batch for s in specs)
    try:
        graph = _exported(module, specs, batch, dynamic=True)
        reason = _differs(graph, specs, batch, session)
        if reason is None:
            return graph, tuple(replace(s, shape=(1, *s.sample_shape), dynamic_batch=True) for s in specs), []
    except TightfitError:
        raise
    except Exception as error:  # torch.export's refusals have no common type; the fixed batch is the answer to all
        reason = _first_line(error)
    fixed = tuple(replace(s, dynamic_batch=False) for s in specs)
    size = fixed[0].shape[0]
    said = "although the file leaves it open" if declared_dynamic else "as the file says"
    try:
        graph = _exported(
            module, fixed, {n: np.resize(a, (size, *a.shape[1:])) for n, a in batch.items()}, dynamic=False
        )
    except TightfitError:
        raise
    except Exception as error:
        raise TightfitError(
            f"{path} can't be captured: torch.export stops with {_first_line(error)}. Capture it from PyTorch instead "
            "(MODULE:FUNCTION)."
        ) from error
    return graph, fixed, [f"the batch is fixed at {size}, {said}: {reason}"]


def _exported(module: OnnxModule, specs: Sequence[InputSpec], batch: Batch, dynamic: bool) -> "GraphModule":
    count = len(next(iter(batch.values())))
    several = batch if count > 1 or not dynamic else {n: a.repeat(2, 0) for n, a in batch.items()}
    shapes = None
    if dynamic:
        axis = torch.export.Dim("batch")
        shapes = {"tensors": tuple({0: axis} for _ in specs)}
    arguments = tuple(torch.from_numpy(several[s.name]) for s in specs)
    with quiet(), torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        program: ExportedProgram = torch.export.export(module, arguments, dynamic_shapes=shapes)
        graph = unlift(functional(program))
    for node in graph.graph.nodes:
        if "fqn" in node.meta:
            node.meta["fqn"] = module.names.get(node.meta["fqn"], node.meta["fqn"])
        if node.op == "call_function":
            node.meta["nn_module_stack"] = {}
    return graph


def _differs(
    graph: "GraphModule", specs: Sequence[InputSpec], batch: Batch, session: "onnxruntime.InferenceSession"
) -> str | None:
    """Why the graph with a free batch is not the model: it must answer one and three samples as ONNX Runtime does."""
    several = {n: np.resize(a, (3, *a.shape[1:])) for n, a in batch.items()}
    for size in (1, 3):
        part = {n: a[:size] for n, a in several.items()}
        got = run(graph, [torch.from_numpy(part[s.name]) for s in specs])
        singles = [_raw_answer(session, {n: a[i : i + 1] for n, a in part.items()}) for i in range(size)]
        wanted = [np.concatenate(columns) if columns[0].ndim else columns[0] for columns in zip(*singles, strict=True)]
        for one, other in zip(wanted, got, strict=True):
            if one.shape != tuple(other.shape) or not sqnr_db(one, other.numpy()) >= FLOOR_DB:
                return f"a batch of {size} gives something else than its samples one by one"
    return None


def _session(path: Path) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # The reference is the graph as it is written, not what the runtime's rewrites make of it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base
        raise TightfitError(f"ONNX Runtime {_version()} does not load {path}: {_first_line(error)}.") from error


def _raw_answer(session: "onnxruntime.InferenceSession", batch: Batch) -> list[np.ndarray]:
    answers: list[np.ndarray] = session.run(None, batch)
    return answers


def _answered(
    session: "onnxruntime.InferenceSession", declared: Sequence[InputSpec], batch: Batch, path: Path
) -> Reference:
    """ONNX Runtime's answer, sample by sample where the file fixes the batch at one."""
    size = declared[0].shape[0]
    count = len(next(iter(batch.values())))
    fixed = not all(d.dynamic_batch for d in declared) and count != size
    try:
        if not fixed:
            return Reference(batch, tuple(_raw_answer(session, batch)))
        parts = [_raw_answer(session, {n: a[i : i + size] for n, a in batch.items()}) for i in range(0, count, size)]
    except Exception as error:  # onnxruntime's exceptions have no public base
        shapes = ", ".join(f"{n} {a.dtype} {list(a.shape)}" for n, a in batch.items())
        raise TightfitError(f"ONNX Runtime does not run {path} on {shapes}: {_first_line(error)}.") from error
    return Reference(batch, tuple(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.') if lines else ''}"
