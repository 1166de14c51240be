"""A linear layer whose answer is known, to find a runtime that computes such layers wrong without saying so.

tflite-runtime 2.14 loads and runs FULLY_CONNECTED layers with float activations and per-channel int8 weights, of which
this one gives zeros. A list of versions would not do: runtimes are built and patched by many.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

INPUT = np.array([[-1.0, 0.0, 1.0, -0.5, 0.5, -1.0, 0.0, 1.0]], np.float32)
# In float. Activations of 8 bits leave it within 3 % of the largest product in a row; rows differ 256-fold in size.
ANSWER = np.array([[3.0, 1.25, 0.09375, -0.015625]], np.float32)
TOLERANCE = np.array([[0.25, 0.03125, 0.0078125, 0.0009765625]], np.float32)

# y[o] = sum(w[o, i] x[i]), w[o, i] = ((3 o + 5 i) mod 7 - 3) / 4 * (8, 1, 1/4, 1/32)[o], lowered by litert-torch and
# quantized by ai-edge-quantizer's dynamic_wi8_afp32: 912 bytes, one FULLY_CONNECTED with four scales.
_FILE = """
IAAAAFRGTDMAAAAAFAAgABwAGAAUABAADAAAAAgABAAUAAAAHAAAAIwAAADoAAAAXAEAAGgBAAA0AwAAAwAAAAEAAAAQAAAAAAAKABAADAAIAAQA
CgAAAAwAAAAcAAAAOAAAAA8AAABzZXJ2aW5nX2RlZmF1bHQAAQAAAAQAAACY////AgAAAAQAAAAHAAAAcmVzdWx0MAABAAAABAAAAEr///8EAAAA
BQAAAGZpcnN0AAAAAgAAADgAAAAEAAAA2P///wMAAAAEAAAAFwAAAGtlZXBfc3RhYmxlaGxvX2NvbnN0YW50AAgADAAIAAQACAAAAAIAAAAEAAAA
EwAAAG1pbl9ydW50aW1lX3ZlcnNpb24ABAAAAHAAAABAAAAAGAAAAAQAAADS////BAAAAAQAAAB0cnVl4v///wQAAAAQAAAAMi4wLjAAAAAAAAAA
AAAAAAAABgAIAAQABgAAAAQAAAAgAAAAgVUAq38q1oEAq38q1oFVAH8q1oFVAKt/1oFVAKt/KtY8/v//CAAAAFRpZ2h0Zml0AAAAAAEAAAAUAAAA
AAAOABgAFAAQAAwACAAEAA4AAAAUAAAAHAAAAHAAAAB0AAAAeAAAAAQAAABtYWluAAAAAAEAAAAUAAAAAAAOABYAAAAQAAwACwAEAA4AAAAcAAAA
AAAACBwAAAAgAAAAAAAKAAgAAAAAAAcACgAAAAAAAAEBAAAAAgAAAAMAAAAAAAAAAQAAAP////8BAAAAAgAAAAEAAAAAAAAAAwAAAPQAAABQAAAA
BAAAAC7///8AAAABDAAAAAwAAAAUAAAAGP///wcAAAByZXN1bHQwAAIAAAABAAAABAAAAAAAFgAcABgAFwAQAAwACAAAAAAAAAAHABYAAAAAAAAB
IAAAAGQAAAABAAAAAAAACWQAAAAMAAwAAAAAAAgABAAMAAAACAAAACwAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
BAAAAAaDQT0Gg8E7BoPBOgaDQTkHAAAAbGluZWFyOwACAAAABAAAAAgAAAAAABYAFAAQAAAAAAAMAAgAAAAAAAAABwAWAAAAAAAAARAAAAAQAAAA
GAAAAAQABAAEAAAABQAAAGZpcnN0AAAAAgAAAAEAAAAIAAAAAQAAABAAAAAMABAADwAAAAgABAAMAAAACQAAAAUAAAAAAAAJ
"""


def layers_at_risk(interpreter: Any) -> int:
    """How many FULLY_CONNECTED layers take floats and int8 weights with more than one scale."""
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    found = 0
    for operator in interpreter._get_ops_details():
        if operator["op_name"] != "FULLY_CONNECTED":
            continue
        values, weight = (tensors.get(int(index)) for index in operator["inputs"][:2])
        if values is None or weight is None:
            continue
        scales = weight["quantization_parameters"]["scales"]
        found += values["dtype"] is np.float32 and weight["dtype"] is np.int8 and len(scales) > 1
    return found


def is_right(interpreter_class: Any, threads: int) -> bool:
    """Whether this runtime computes the layer of the known answer; False too where it refuses the file."""
    try:
        interpreter = interpreter_class(model_content=base64.b64decode(_FILE), num_threads=threads)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], INPUT)
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    except (ValueError, RuntimeError):
        return False
    return bool(found.shape == ANSWER.shape and (np.abs(found - ANSWER) <= TOLERANCE).all())
