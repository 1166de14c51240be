"""The embedding that a model puts out becomes ±1 codes: rotation, comparison and, with two planes, what that leaves."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate.binary_embedding import EmbeddingCode, default_bits, fit
from calibrate.errors import CalibrationError
from calibrate.graph import run
from calibrate.packed_codes import neighbours, pack, recall, search
from calibrate.plan import Entry
from calibrate.steps import Context
from calibrate.tokens.builder import Builder

NAME = "binarize_embedding"
LAYER = "binary_embedding"
FLOAT = "its results are compared with zero: rounded to codes they would tie"
# With fewer samples a rotation and its recall say nothing.
FEWEST = 32
HELD_SHARE = 0.2
NEIGHBOURS = 10
# Neighbours are sought among so many samples at most, which bounds the scores kept; the fit still sees all.
MOST_HELD, MOST_BASE = 500, 5000
aten = torch.ops.aten


class BinarizeEmbedding:
    """BEBR (arXiv 2302.08714) without training: the centre and an ITQ rotation are fitted on calibration embeddings.

    The output [batch, d] becomes float32 ±1 [batch, planes * bits], plane 0 first, as `calibrate/packed_codes.py`
    packs and searches it. `bits`: of one plane, a multiple of 8; 0 for d rounded up to one. `planes`: 1 or 2.
    `output`: the position of the output among the model's, -1 for the only one that fits. A fifth of the samples is
    held aside from the fit, and the ledger says what share of their float neighbours the codes find.
    """

    exact = False
    defaults: ClassVar[dict[str, Any]] = {"bits": 0, "planes": 1, "output": -1}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wish = {**self.defaults, **context.parameters}
        position = embedding_output(graph, wish["output"])
        found = _embeddings(graph, position, context)
        held = max(1, int(len(found) * HELD_SHARE))
        fitted, aside = found[:-held], found[-held:]
        code = fit(fitted, wish["bits"] or default_bits(found.shape[1]), wish["planes"], context.seed)
        append(graph, position, code)
        bits = len(code.weight)
        planes = f" in {code.planes} planes" if code.planes > 1 else ""
        action = f"{found.shape[1]} numbers become {bits * code.planes} bits{planes}"
        return [Entry(NAME, f"output {position}", action, _told(code, fitted, aside))]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(LAYER):
                value = getattr(graph, str(node.target))
                if not value.isfinite().all():
                    return f"the constant {node.target} is not finite"
        return None


def embedding_output(graph: GraphModule, wanted: int = -1) -> int:
    """The position of the output [batch, d] to binarize. Raises CalibrationError where there is none, or several."""
    results = outputs(graph)
    shapes = [_shape(node) for node in results]
    fitting = [i for i, (node, shape) in enumerate(zip(results, shapes, strict=True)) if _fits(node, shape)]
    listed = ", ".join(f"{i}: {shape}" for i, shape in enumerate(shapes))
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not -1 <= wanted < len(results):
        raise CalibrationError(f"{NAME} has output = {wanted!r}; the outputs are {listed}, and -1 takes the only fit")
    if (wanted >= 0 and wanted not in fitting) or not fitting:
        raise CalibrationError(
            f"{NAME} needs an embedding, a float output [batch, d] with d fixed and at least 2; the outputs are "
            f"{listed}. Pool over tokens or positions inside the model and give it out as one vector per sample."
        )
    if wanted < 0 and len(fitting) > 1:
        raise CalibrationError(
            f"{NAME} finds {len(fitting)} outputs that could be the embedding ({listed}). Say which in a recipe file: "
            f"output = {fitting[0]} under [parameters.{NAME}]."
        )
    return wanted if wanted >= 0 else fitting[0]


def outputs(graph: GraphModule) -> list[Node]:
    """The nodes that the graph returns, in order."""
    result = graph.graph.output_node().args[0]
    return list(result) if isinstance(result, tuple | list) else [result]


def append(graph: GraphModule, position: int, code: EmbeddingCode) -> None:
    """Put the head behind the output: it stays float, and reports move its input as they do before any comparison."""
    source, end = outputs(graph)[position], graph.graph.output_node()
    build = Builder(graph, end, LAYER)

    def constant(name: str, value: Tensor) -> Node:
        return build.constant(f"{LAYER}_{name}", value.float())

    one, minus = constant("one", torch.ones(1, 1)), constant("minus", -torch.ones(1, 1))

    def sign(x: Node) -> Node:
        return build.call(aten.where.self, build.call(aten.ge.Scalar, x, 0.0), one, minus)

    y = build.call(aten.linear.default, source, constant("rotation", code.weight), constant("centre", code.bias))
    y.meta["keep_float"] = FLOAT
    codes = sign(y)
    if code.planes == 2:
        scaled = build.call(aten.mul.Tensor, codes, constant("level", code.level[None]))
        codes = build.call(aten.cat.default, [codes, sign(build.call(aten.sub.Tensor, y, scaled))], 1)
    results = outputs(graph)
    results[position] = codes
    end.args = (tuple(results),)


def _shape(node: Node) -> list[int | str]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    return [n if isinstance(n, int) else "batch" for n in value.shape]


def _fits(node: Node, shape: list[int | str]) -> bool:
    return len(shape) == 2 and isinstance(shape[1], int) and shape[1] >= 2 and node.meta["val"].is_floating_point()


def _embeddings(graph: GraphModule, position: int, context: Context) -> Tensor:
    """What the graph makes of all samples: float64 [samples, d]."""
    parts, done = [], 0
    for batch in context.batches():
        parts.append(run(graph, batch)[position].double())
        done += len(parts[-1])
        context.progress(NAME, done, context.samples)
    if done < FEWEST:
        raise CalibrationError(
            f"{NAME} fits a rotation to the calibration embeddings and tests it on some of them: {done} samples are "
            f"too few. Give {FEWEST} at least; some thousands make better codes."
        )
    return torch.cat(parts)


def _told(code: EmbeddingCode, fitted: Tensor, aside: Tensor) -> str:
    """Recall@10 of the samples held aside, each among all others, as the packed search finds them."""
    aside = aside[-MOST_HELD:]
    base = torch.cat((aside, fitted[:MOST_BASE]))
    k = NEIGHBOURS + 1  # a sample may find itself
    packed = pack(code.codes(base).numpy())
    wanted = neighbours(aside.numpy(), base.numpy(), k)
    found, _ = search(packed[: len(aside)], packed, k, code.planes)
    share = recall(*(_others(ids) for ids in (found, wanted)))
    return (
        f"recall@{NEIGHBOURS} {share:.3f} against cosine in float, of {len(aside)} samples that the fit did not see "
        f"among {len(base)}; fitted on {len(fitted)}"
    )


def _others(ids: Any) -> Any:
    """The nearest without the sample itself, which is row i of the base: [n, k + 1] -> [n, k]."""
    import numpy as np

    return np.stack([row[row != i][:NEIGHBOURS] for i, row in enumerate(ids)])


STEP = BinarizeEmbedding()
