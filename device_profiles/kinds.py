"""The kinds of operators that rules speak of; planning sorts a graph's nodes into the same kinds."""

from typing import Literal

OpKind = Literal[
    "conv", "conv_transpose", "linear", "matmul", "attention", "embedding",
    "add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "log", "erf", "abs",
    "relu", "clamp", "leaky_relu", "prelu", "elu", "gelu", "silu", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "mish", "softplus", "softmax", "log_softmax",
    "layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm",
    "max_pool", "avg_pool", "mean", "sum", "amax", "argmax",
    "cat", "stack", "pad", "reshape", "transpose", "slice", "select", "split", "expand",
    "gather", "scatter", "where", "compare", "topk", "sort", "one_hot", "cumsum",
    "upsample", "pixel_shuffle", "cast", "lstm", "einsum", "constant", "other",
]  # fmt: skip
