"""ONNX, run by ONNX Runtime on the CPU or built into an engine by TensorRT on the device.

What ONNX Runtime 1.31 and 1.32 fuse into integer kernels (read back from its optimised models, x86-64):

- Conv and linear: the input dequantized per tensor, the weight per output channel, the bias int32 codes of step
  input scale x weight scale. Conv needs its output quantized again; a linear (QGemm) may write floats.
- A relu or clamp before that Quantize disappears when the range of the codes lies inside its own: after relu the zero
  point is the lowest code, after relu6 the highest code is worth at most 6. Otherwise the layer stays float.
- add, mul, cat, avg_pool, mean over H and W, sigmoid, softmax, leaky_relu: all inputs dequantized, output quantized.
  Not: sub, hardswish, hardsigmoid, tanh, elu, gelu, layer_norm.
- max_pool, slice, reshape, transpose, select move codes when output and input share scale and zero point; pad too,
  rewritten here. A split does only where all of its outputs are quantized.
- int8 activations fuse like uint8 ones, with the same numbers; on x86 their kernels are slow (ResNet-20: 2.8 ms,
  against 0.22 ms with uint8 and 0.46 ms in float, one thread of an AMD EPYC with VNNI).

The kernels' arithmetic, float32: conv and linear, code = round(acc * ((s_x * s_w) / s_y)) + z_y with acc the exact
integer sum, bias codes included; add, code = round(a * r_a + (b * r_b + c)) with r = s_in / s_y and
c = z_y - (r_a z_a + r_b z_b); quantize, round(x / s) + z; ties to even, then saturated. Dynamic linears equal
`tightfit.dynamic_linear` bit for bit; without VNNI x86 sums pairs of uint8 x int8 products in 16 bits, which weights
of 7 bits and fewer can't overflow.

Weights of 4 and 2 bits raise the file's opset to 21 and 25, 16-bit activations to 21, 8-bit floats to 19, whatever the
profile says: no older opset has the types. See `_onnx_bits`; for weights of two to four levels, which need no newer
opset, `_onnx_levels`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from . import Job, Placement, Session

if TYPE_CHECKING:
    import onnx_ir as ir

SINGLE_FILE_LIMIT = 1_900_000_000
"""Bytes of tensors above which weights go beside the model: a protobuf holds no more than 2 GiB."""


class OnnxTarget:
    """See `targets.Target`."""

    suffix = ".onnx"

    def missing(self) -> str | None:
        """The pip command that brings onnx, onnxscript and onnxruntime, or None."""
        from importlib.util import find_spec

        absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        return f"pip install {' '.join(absent)}" if absent else None

    def lower(self, job: Job, path: Path) -> None:
        """Write the model; weights above 1.9 GB go to `<path>.data`. Raises TargetError where ONNX has no form."""
        write(build(job), path)
        if job.rules.runtime == "tensorrt":
            from ._onnx_tensorrt import check_tensorrt

            check_tensorrt(path)

    def placement(self, path: Path, job: Job) -> Placement:
        """Let ONNX Runtime optimise the file and count what is left; for TensorRT judge the file by its rules."""
        from ._onnx_placement import placement

        return placement(path, job)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Load the file into ONNX Runtime on the CPU."""
        from ._onnx_session import OnnxSession

        return OnnxSession(path, threads)


def build(job: Job) -> "ir.Model":
    """The finished model of `job`, in memory."""
    from . import _onnx_bits as few
    from . import _onnx_int8 as int8
    from . import _onnx_passes as passes
    from ._onnx_attention import moves_that_undo_each_other_are_gone
    from ._onnx_export import export
    from ._onnx_fusions import rows_are_gathered_whole, sums_stay_beside_their_norms
    from ._onnx_half import in_float16
    from ._onnx_levels import few_levels_are_looked_up
    from ._onnx_opset import at_opset, check

    runtime, bits = job.rules.runtime, few.stored_bits(job.graph)
    model = export(job)
    passes.constants_are_folded(model)
    int8.weight_codes_are_stored_transposed(model)
    if runtime != "tensorrt":
        moves_that_undo_each_other_are_gone(model)
        sums_stay_beside_their_norms(model)
        rows_are_gathered_whole(model)
        int8.means_are_pools(model)
        int8.pads_run_on_codes(model)
        int8.biases_are_codes(model)
        int8.float_layers_stay_float(model)
    at_opset(model, job.rules.opset, few.oldest_opset(job.graph, runtime))
    if job.compute == "float16":
        in_float16(model)
    passes.constants_are_folded(model)
    if runtime != "tensorrt":
        few.tables_are_looked_up_as_codes(model, bits)
        few.lone_weight_codes_are_multiplied(model, bits)
        few_levels_are_looked_up(model, bits)
    few.codes_are_stored_in_their_bits(model, bits, runtime)
    passes.constants_are_read(model)
    passes.nodes_bear_layer_names(model)
    passes.domains_are_named(model)
    check(model)
    passes.nothing_machine_specific_is_kept(model)
    return model


def write(model: "ir.Model", path: Path) -> None:
    """Write the model to `path`, as one file where it fits."""
    import onnx
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # the shapes of constants, said twice
    onnx.save_model(
        proto, path, save_as_external_data=size > SINGLE_FILE_LIMIT, location=f"{path.name}.data", size_threshold=1024
    )


TARGET = OnnxTarget()
