"""TFLite: lowered by litert-torch, run by LiteRT with XNNPACK.

Where Q/DQ has to stand so that litert-torch 0.10 makes int8 kernels of it (measured on LiteRT 2.3.0, x86):

- An operator runs in int8 when all its activations come out of a DQ, its weight out of a `dequantize_per_channel`, and
  its value goes into a Q, with nothing in between but a relu or relu6, which the kernel fuses. No Q between a layer and
  its activation.
- Every reader of a quantized value reads the DQ behind it. One float reader of the raw value makes the layer float.
- An output that stays float (logits too) makes its layer float: it needs Q and DQ; the file dequantizes it at the end.
- pad, slice, select, reshape, transpose, concat, max_pool, avg_pool, nearest upsampling: Q/DQ behind them with the
  scale of their input (concat: all inputs and the output share one). Otherwise codes are converted once more.
- Fixed outputs: sigmoid and softmax scale 1/256, zero point -128; tanh scale 1/128, zero point 0.
- Biases are rounded to multiples of input scale x weight scale: the kernels hold them as int32.
- In int8: conv (grouped, depthwise, dilated, 1-d), linear, add, sub, mul, mean, pools, sigmoid, tanh, softmax, gelu,
  hardswish, leaky_relu, matmul. Not delegated to XNNPACK, so slower: gelu, hardswish, softmax, avg_pool, max_pool with
  padding, nearest upsampling, matmul of two activations, strided slices.
- In float whatever stands around them: layer_norm, silu, hardsigmoid, prelu. Not to be quantized: bilinear upsampling,
  whose int8 kernel is many steps off.

Against the simulation, which multiplies scales in another order, about one value in 10^6 lies so near a tie that it
comes out one step off; deep networks carry such a step on (ResNet-20: 6 % of the logits). avg_pool rounds ties away
from zero (1 value in 8 for 2x2), leaky_relu and matmul multiply in fixed point: one step. What XNNPACK computes, found
without one difference in 8 million values of ResNet-20 (f32: rounded to float32; ties to even):

- conv, linear: rint(f32(sum + bias) * f32(f32(s_x * s_w) / s_y)) + z_y, clamped, from z_y on for relu.
- mean of n: rint(f32(sum of (x - z_x)) * f32(s_x / f32(s_y * n))) + z_y.
- add: ((2^(k-1) + m_a * (a - z_a) + m_b * (b - z_b)) >> k) + z_y, where m = rint(f32(s / s_y) * 2^k) for either
  operand and k is 20 minus the exponent of the larger f32(s / s_y).

Dynamic int8: linear and conv (grouped too) are XNNPACK's qd8 and equal "row_int8" to 3e-7 of the largest output;
depthwise runs on the built-in kernel, whose zero point rounds another way in 1 of 200 samples.

Weights of fewer bits (`_tflite_pack.py` has the table of what LiteRT reads) are packed in the file:

- Linear: 4 and 2 bits, static and dynamic, on XNNPACK, as fast as int8 or faster. Groups: dynamic, 4 bits, float16
  scales that XNNPACK cuts to bfloat16 (so does the simulation); groups of 2-bit codes take 4 bits each. Groups that are
  no multiple of 32 are refused: the built-in kernel takes 300 times the time of float (64 x 512 x 512, groups of 16)
  and leaves out the activation that is fused into the layer.
- Convolution, static: XNNPACK has no kernel, and the built-in one takes more than twice the time of int8. Lowered as a
  matrix product over patches of the input (`_tflite_patches.py`) it takes 1.2 to 1.4 times and gives the same codes.
  Depthwise, grouped and dilated ones keep 8 bits per code, and `placement` names them.
- Convolution, dynamic: a matrix product would quantize each patch on its own, which is not what the graph says. The
  built-in kernel reads 4 and 2 bits, exactly and slowly; `placement` names these layers too.
- Embedding tables: 8, 4 and 2 bits, groups of 4 and 2, looked up as codes; no float table is made.
- Before float arithmetic: 8 bits are unpacked when the file is loaded. 4 and 2 bits are dequantized once, and a matrix
  product with a computed weight (BATCH_MATMUL) is the one that XNNPACK takes: 1.0 to 1.3 times the time of float for
  linear layers, twice for convolutions.

16-bit activations run on LiteRT's built-in 16x8 kernels (`_tflite_wide.py`), many times slower than int8.
Palettes and 8-bit floats have no TFLite kernel and are refused.
"""

import importlib.util
from pathlib import Path

from . import Job, Placement, Session

MISSING = "pip install 'tightfit[tflite]'"


class TFLite:
    """The target; see the module docstring."""

    suffix = ".tflite"

    def missing(self) -> str | None:
        """The pip command that brings what is not installed, or None."""
        found = all(importlib.util.find_spec(m) for m in ("litert_torch", "ai_edge_litert", "flatbuffers"))
        return None if found else MISSING

    def lower(self, job: Job, path: Path) -> None:
        """Write `path`. Raises TargetError for what litert-torch cannot lower, MissingRuntime without it."""
        from ._tflite_lower import lower

        path.write_bytes(lower(job))

    def placement(self, path: Path, job: Job) -> Placement:
        """Read the file back: what each operator computes in, and the layers that came out float."""
        from ._tflite_placement import placement

        return placement(path, job)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Load the file into LiteRT, or tflite-runtime where that is what there is."""
        from ._tflite_run import TFLiteSession

        return TFLiteSession(path, threads)


TARGET = TFLite()
