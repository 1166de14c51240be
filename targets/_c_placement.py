"""What an artifact computes in which format, read from the calls and structures of its model.c."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.fx import Node

from calibrate import graph as graphs
from calibrate import qdq
from calibrate.simulation import integer_kernels

from . import Fallback, Job, Placement
from .errors import TargetError

# kernel -> (format, operator); what is not here moves values.
KERNELS = {
    "tf_conv_i8": ("int8", "conv"),
    "tf_depthwise_i8": ("int8", "depthwise"),
    "tf_conv_w1a1": ("w1a1", "conv"),
    "tf_add_i8": ("int8", "add"),
    "tf_mean_i8": ("int8", "mean"),
    "tf_max_pool_i8": ("int8", "max_pool"),
    "tf_sign_i8": ("conversion", "sign"),
    "tf_quantize": ("conversion", "quantize"),
    "tf_dequantize": ("conversion", "dequantize"),
    "tf_cast_i64_f32": ("conversion", "cast"),
    "tf_conv_f32": ("float32", "conv"),
    "tf_depthwise_f32": ("float32", "depthwise"),
    "tf_matmul_f32": ("float32", "matmul"),
    "tf_unary_f32": ("float32", "unary"),
    "tf_binary_f32": ("float32", "binary"),
    "tf_reduce_f32": ("float32", "reduce"),
    "tf_softmax_f32": ("float32", "softmax"),
    "tf_layer_norm_f32": ("float32", "layer_norm"),
    "tf_max_pool_f32": ("float32", "max_pool"),
    "tf_avg_pool_f32": ("float32", "avg_pool"),
    "tf_embedding_f32": ("float32", "embedding"),
}
BITS = {"TF_W4": "-w4", "TF_W2": "-w2", "TF_W1": "-w1", "TF_SIGN": "-w1", "TF_F16": "-w16"}
CALL = re.compile(r"^    (tf_\w+)\((.*)\); /\* (.*) \*/$", re.MULTILINE)
STRUCT = re.compile(r"^static const tf_\w+ (\w+) = (.*);$", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """One call of model.c: its kernel, layer, format ("int8", "int8-w4", "w1a1", "float32-w4", "move") and operator."""

    kernel: str
    layer: str
    format: str
    operator: str


def calls(path: Path) -> list[Found]:
    """All calls of an artifact's model.c, in order. Raises TargetError when there is none to read."""
    try:
        text = (path / "model.c").read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"cannot read {path.name}/model.c: {error.strerror}") from error
    structs = dict(STRUCT.findall(text))
    return [_found(kernel, arguments, layer, structs) for kernel, arguments, layer in CALL.findall(text)]


def _found(kernel: str, arguments: str, layer: str, structs: dict[str, str]) -> Found:
    form, operator = KERNELS.get(kernel, ("move", kernel.removeprefix("tf_")))
    body = structs.get(arguments.split(",")[0].removeprefix("&"), "")
    if operator in ("conv", "depthwise", "embedding"):
        if ".height = 1, .width" in body and ".kernel_w = 1" in body and ".batch = 1" in body:
            operator = "linear"
        stored = re.search(r"\.format = (TF_\w+)", body)
        form += BITS.get(stored[1], "") if stored and form != "w1a1" else ""
        if stored and stored[1] == "TF_W8" and form == "float32":
            form = "float32-w8"
    return Found(kernel, layer, form, operator)


def placement(path: Path, job: Job) -> Placement:
    """Read the artifact and compare it with what `job` quantizes."""
    found = calls(path)
    kinds = Counter(f"{c.format} {c.operator}" for c in found if c.format != "move")
    integer = [c for c in found if c.format.startswith(("int8", "w1a1"))]
    floating = [c for c in found if c.format.startswith("float32")]
    conversions = sum(c.format == "conversion" for c in found)
    fallbacks = tuple(_fallbacks(found, job))
    return Placement(len(integer), len(floating), conversions, fallbacks, dict(sorted(kinds.items())))


def _fallbacks(found: list[Found], job: Job) -> Iterator[Fallback]:
    """Each layer that the job has on codes and the artifact computes in float, once."""
    on_codes = {c.layer for c in found if c.format.startswith(("int8", "w1a1"))}
    seen: set[str] = set()
    known = integer_kernels(job.graph)
    for node in job.graph.graph.nodes:
        name = graphs.layer_name(node)
        if node.op != "call_function" or name in on_codes or name in seen or not _wants_codes(node, job):
            continue
        seen.add(name)
        if node in known.kernels or node in known.outputs:
            yield Fallback(name, "its codes are in the graph, and no kernel of the source computes it on codes")
        else:
            yield Fallback(name, f"the target 'c' has no {graphs.kind(node)} on codes of this form: it runs in float")


def _wants_codes(node: Node, job: Job) -> bool:
    """Whether every tensor that `node` reads is dequantized, and it is of a kind that the rules have on codes."""
    if graphs.kind(node) not in (*job.rules.quantize_inputs, "max_pool") or node.target in qdq.EXPANDING:
        return False
    tensors = [a for a in node.args[:2] if isinstance(a, Node)]
    return bool(tensors) and all(a.target in (qdq.DEQUANTIZE, qdq.DEQUANTIZE_CHANNEL) for a in tensors)
