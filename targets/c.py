"""C99: a folder of sources for boards without a runtime, compiled and run here by this machine's compiler.

What it holds: `model.c` (the layers in order, one call each), `weights.h` (static arrays), the kernels it calls,
`model.h`, a Makefile, a driver that runs samples from standard input, and `manifest.json`. Nothing is allocated: values
between layers share one static arena, each for as long as somebody reads it.

Exact, to the bit and on every processor, against the simulation with the "fixed_point" adder: conv (grouped, depthwise,
strided, dilated, 1-d too), linear, add, mean, max pooling and whatever moves codes, with relu and clamp fused, and the
codes of an average pool (float, in torch's order). Sums are int32 and refused where they could leave it; factors are
float32; halves go to the even code. Float layers stay within 1e-5 of the largest output (another order of additions,
another mathematics library); GELU, softmax and their kin call libm.

Weights take 8, 4, 2 or 1 bits per code, as their codes need. A weight of -1 and +1 alone is a bit per code, 64 to a
word. Where its input is made of signs as well - where(x >= t, s, -s), quantized with scale s and zero point 0 - the
layer is a popcount of differing bits; with int8 codes the bits are unpacked a chunk at a time and multiplied as int8.

Not there, and refused by name: dynamic int8, 16-bit activations, palettes, 8-bit floats, float16 arithmetic, causal
attention. Sizes in bytes of the folder are those of text: the README in it and the manifest say what flash and memory
the compiled model takes.
"""

from dataclasses import replace
from pathlib import Path

from . import Job, Placement, Session


class C:
    """The target; see the module docstring."""

    suffix = ".cnet"

    def missing(self) -> str | None:
        """None: writing C needs nothing. A compiler is looked for when an artifact is opened."""
        return None

    def lower(self, job: Job, path: Path) -> None:
        """Write the folder `path`. Raises TargetError for what no kernel computes."""
        from ._c_codes import integer
        from ._c_floats import HANDLERS
        from ._c_lower import Lowering
        from ._c_write import write
        from .errors import TargetError

        if job.compute != "float32":
            raise TargetError(
                f"the target 'c' computes in float32 what is not quantized, not in {job.compute}. Use --recipe int8, "
                "or --recipe int8-weights for small files."
            )
        write(Lowering(_without_norms(job), HANDLERS, integer).run(), path)

    def placement(self, path: Path, job: Job) -> Placement:
        """Read the sources back: which kernel computes each layer, and the quantized layers that came out float."""
        from ._c_placement import placement

        return placement(path, job)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Compile the folder and load it. The kernels run in one thread, whatever `threads` says."""
        from ._c_session import CSession

        return CSession(path)


def _without_norms(job: Job) -> Job:
    """The job with batch normalisation folded into the layers: the float twin has not been through a recipe's steps."""
    from calibrate import graph as graphs
    from calibrate.plan import Plan
    from calibrate.steps import Context, find

    if not any(graphs.kind(n) == "batch_norm" for n in job.graph.graph.nodes):
        return job
    graph = graphs.clone(job.graph)
    find("fold_batchnorm").apply(graph, Context(Plan(("fold_batchnorm",)), lambda: iter(()), lambda: iter(())))
    return replace(job, graph=graphs.finish(graph))


TARGET = C()
