"""Exact int8 sums in ONNX Runtime on x86 without VNNI, where kernels add pairs of products in 16 bits.

A file for an Arm board holds weights of 8 bits, which no kernel there saturates. To show its own numbers here, ONNX
Runtime is told to keep weights unsigned ("session.x64quantprecision"), which is exact and slower. As of 1.32 that
fails where layers share a zero point, so each gets one of its own in memory; the file stays as it is.
"""

import platform
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

# Two products of a uint8 and a weight code of this size fit into 16 bits: 2 * 255 * 64 < 2^15.
SAFE = 64
# A protobuf in memory holds no more.
LARGEST = 1_900_000_000


@cache
def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor is an x86-64 whose int8 sums saturate: one that does not say it has VNNI."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (cpuinfo.exists() and "vnni" in cpuinfo.read_text(errors="replace"))


def exact_model(path: Path) -> bytes | None:
    """The model with a zero point of its own for every constant of codes, where weights need exact sums; else None.

    None too for what no file of this size can do, a model of 1.9 GB and more, and for a file that is no model: the
    runtime says so in its own words.
    """
    if not saturates() or path.stat().st_size > LARGEST:
        return None
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None
    if any(t.external_data for t in model.graph.initializer) or not _needs_it(model.graph):
        return None
    _unshare(model.graph)
    return bytes(model.SerializeToString())


def _needs_it(graph: onnx.GraphProto) -> bool:
    """Whether unsigned activations meet weight codes that are not safe. Signed ones have kernels that are exact."""
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        zero = constants.get(node.input[2]) if node.op_type == "QuantizeLinear" and len(node.input) > 2 else None
        if zero is not None and zero.data_type == onnx.TensorProto.INT8:
            return False
    return any(t.data_type == onnx.TensorProto.INT8 and _reach(t) > SAFE for t in graph.initializer)


def _reach(tensor: onnx.TensorProto) -> int:
    values = numpy_helper.to_array(tensor)
    return int(np.abs(values.astype(np.int16)).max()) if values.size else 0


def _unshare(graph: onnx.GraphProto) -> None:
    constants = {t.name: t for t in graph.initializer}
    for number, node in enumerate(graph.node):
        for index, name in enumerate(node.input):
            shared = constants.get(name)
            if shared is None or shared.data_type != onnx.TensorProto.INT8 or index == 0:
                continue
            copy = onnx.TensorProto()
            copy.CopyFrom(shared)
            copy.name = node.input[index] = f"{name}_own_{number}_{index}"
            graph.initializer.append(copy)
