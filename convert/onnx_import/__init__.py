"""An ONNX model as a torch module that computes the same, node by node, so that torch.export can capture it.

One file per family of operators; `registry.py` finds them. What ONNX computes on shapes at run time is computed in
Python while torch.export traces (`host.py`), so that a symbolic batch stays symbolic and everything else is a number.
"""

from .reading import read
from .run import OnnxModule

__all__ = ["OnnxModule", "read"]
