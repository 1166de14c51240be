"""Capture: a model file or a function becomes the one float graph that everything after works on, and is checked."""

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibrate.samples import Batch, InputSpec
from convert.errors import TightfitError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from convert.capture_raw import CaptureCheck, Raw

DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
FORMS = "a .pt2 (torch.export), a .onnx, or module:function"


@dataclass(frozen=True)
class Captured:
    """The float model as a graph.

    `graph`: evaluation mode, functional ATen in the normal form (`convert.normal_form`), positional tensors in the
    order of `inputs` -> a tuple of tensors in the order of `outputs`. `parameters`: trained numbers, shared ones once.
    `fingerprint`: SHA-256 over the graph and every constant's bytes, hexadecimal. `notes`: what a user should know
    about this capture, one sentence each.
    """

    name: str
    source: str
    graph: "GraphModule"
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    parameters: int
    fingerprint: str
    check: "CaptureCheck"
    notes: tuple[str, ...] = ()


def capture(
    model: str,
    *,
    weights: Path | None = None,
    inputs: Sequence[InputSpec] = (),
    examples: Batch | None = None,
    python: Path | None = None,
    work: Path,
    search_path: Path | None = None,
) -> Captured:
    """Capture `model` and measure how exactly the graph computes what the model itself computes.

    `examples` are real samples by input name ({"": array} for a single input); `inputs` fixes names, shapes and dtypes
    where they can't be inferred; `python` is the interpreter for a module:function, which also finds modules in
    `search_path`. Temporary files go to `work`.
    Raises TightfitError, or MissingDependency when an interpreter lacks something.
    """
    form = _form(model)
    if weights is not None and form != "function":
        raise TightfitError(f"--weights goes with module:function; {model} brings its own weights.")
    if form != "function":
        _refuse_absent(Path(model))
    if examples is not None and any(len(a) == 0 for a in examples.values()):
        raise TightfitError("the calibration data is empty; give at least one sample.")
    raw = _raw(form, model, weights, inputs, examples, python, work, search_path)
    return finished(model, form, raw)


def _raw(
    form: str,
    model: str,
    weights: Path | None,
    inputs: Sequence[InputSpec],
    examples: Batch | None,
    python: Path | None,
    work: Path,
    search_path: Path | None,
) -> "Raw":
    if form == "function":
        from convert.capture_factory import capture_factory

        return capture_factory(
            model,
            weights=weights,
            inputs=inputs,
            examples=examples,
            python=python,
            work=work,
            search_path=search_path,
        )
    if form == "onnx":
        from convert.capture_onnx import capture_onnx

        return capture_onnx(Path(model), inputs=inputs, examples=examples)
    from convert.capture_pt2 import capture_pt2

    return capture_pt2(Path(model), inputs=inputs, examples=examples, work=work)


def finished(model: str, form: str, raw: "Raw") -> Captured:
    """Bring what a way in gave to the normal form, and measure it; TightfitError for weights that are no numbers."""
    from convert.capture_raw import check
    from convert.capture_weights import count_parameters, refuse_not_finite
    from convert.normal_form import normalise

    refuse_not_finite(raw.graph, model)
    parameters = count_parameters(raw.graph)
    graph = normalise(raw.graph)
    return Captured(
        name=model.rpartition(":")[2] if form == "function" else Path(model).stem,
        source=model,
        graph=graph,
        inputs=raw.inputs,
        outputs=raw.outputs,
        parameters=parameters,
        fingerprint=fingerprint(graph, raw.inputs, raw.outputs),
        check=check(graph, raw),
        notes=raw.notes,
    )


def _form(model: str) -> str:
    suffix = Path(model).suffix.lower()
    if suffix == ".pt2":
        return "pt2"
    if suffix == ".onnx":
        return "onnx"
    module, colon, function = model.partition(":")
    if colon and function.isidentifier() and all(p.isidentifier() for p in module.split(".")):
        return "function"
    path = Path(model)
    if path.is_file():
        raise TightfitError(_refusal(path))
    if path.is_dir():
        raise TightfitError(f"'{model}' is a folder, no model: give {FORMS}.")
    raise TightfitError(f"'{model}' is no model: give {FORMS}.{_nearest(path)}")


def _refuse_absent(path: Path) -> None:
    if path.is_dir():
        raise TightfitError(f"{path} is a folder, not a file; give {FORMS}.")
    if not path.is_file():
        raise TightfitError(f"there is no file {path}; check the path of the model.{_nearest(path)}")


def _nearest(path: Path) -> str:
    """The file beside `path` whose name is most like it, as a sentence; nothing where there is none."""
    files = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, files, 1)
    return f" Did you mean '{path.parent / near[0]}'?" if near else ""


def _refusal(path: Path) -> str:
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".bin", ".ckpt"):
        return (
            f"{path} is a pickle: loading one can run any code, so it was refused and nothing in it was run. Give the "
            "function that builds the model instead, and the weights beside it: MODULE:FUNCTION --weights FILE."
        )
    if path.suffix.lower() == ".safetensors":
        return (
            f"{path} holds weights without a model: give the function that builds it, MODULE:FUNCTION --weights {path}."
        )
    return f"'{path}' is of no kind that can be captured: give {FORMS}."


def parse_input(text: str) -> InputSpec:
    """An --input: "name:dtype:shape", as in "input_ids:int64:1x64" or "x:float32:1,3,32,32"; axis 0 is the batch."""
    parts = text.split(":")
    example = "write it as NAME:DTYPE:SHAPE, as in x:float32:1x3x224x224"
    if len(parts) != 3 or not parts[0].strip():
        raise TightfitError(f"--input '{text}' is not understood: {example}.")
    name, dtype, shape = (p.strip() for p in parts)
    if dtype not in DTYPES:
        near = difflib.get_close_matches(dtype, DTYPES, 1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(DTYPES)}."
        raise TightfitError(f"--input '{text}': there is no dtype '{dtype}'{hint}")
    sizes = re.split(r"[x,]", shape.strip("[]()").replace(" ", ""))
    if not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise TightfitError(f"--input '{text}': the shape '{shape}' is not a list of positive numbers; {example}.")
    return InputSpec(name, tuple(int(s) for s in sizes), dtype)


def fingerprint(graph: "GraphModule", inputs: Sequence[InputSpec], outputs: Sequence[str]) -> str:
    """SHA-256, hexadecimal, over operators, their arguments, and the dtype, shape and bytes of every constant.

    Names of nodes and attributes do not enter, so that two captures of one model agree.
    """
    from calibrate.graph import constant, is_constant

    digest = hashlib.sha256(repr((tuple(inputs), tuple(outputs))).encode())
    numbers: dict[object, str] = {}
    for position, node in enumerate(n for n in graph.graph.nodes if not is_constant(n)):
        numbers[node] = f"%{position}"

    def text(value: object) -> str:
        if value in numbers if isinstance(value, type(node)) else False:
            return numbers[value]
        if is_constant(value):
            return _tensor_text(constant(graph, value))
        if isinstance(value, tuple | list):
            return "[" + ",".join(text(v) for v in value) + "]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{text(value[k])}" for k in sorted(value)) + "}"
        return repr(value)

    for node in graph.graph.nodes:
        if is_constant(node):
            continue
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        digest.update(f"{node.op} {target} {text(node.args)} {text(node.kwargs)}\n".encode())
    return digest.hexdigest()


def _tensor_text(tensor: "Tensor") -> str:
    array = tensor.contiguous().numpy()
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
