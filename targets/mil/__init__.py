"""The MIL reference executor: what a Core ML program computes, without Core ML.

It answers "are these the right numbers", never "how fast". `Program.load(path)` reads a .mlpackage from disk;
`program.run({name: array})` runs it. One file per family of operators; `operators.OPERATORS` lists them all.
"""

from .operators import OPERATORS
from .program import Program, Value
from .reader import coremltools, quiet, read_function, read_spec

__all__ = ["OPERATORS", "Program", "Value", "coremltools", "quiet", "read_function", "read_spec"]
