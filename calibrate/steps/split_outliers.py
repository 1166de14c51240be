"""Split the few outlier columns of a linear layer's input off into a small float layer beside the main one."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibrate.affine import layer_of, value_of
from calibrate.errors import CalibrationError
from calibrate.graph import add_constant, constant, kept_float, kind, layer_name
from calibrate.plan import Entry
from calibrate.steps import Context

aten = torch.ops.aten
NAME = "split_outliers"
REASON = "it reads the outlier columns, which would spoil the scale of all others"


class SplitOutliers:
    """y = W (x * keep) + b + W[:, O] x[O]: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 3.2) with the
    columns O fixed by calibration.

    A column is an outlier where its largest magnitude reaches `threshold` times the median over the columns. The main
    layer's input holds zeros there, so that its int8 scale fits the other columns; the small layer carries
    `meta["keep_float"]`, which quantizing steps respect. Layers with more than `max_columns` outliers are left: that
    many are no exception, and a float layer of that size costs more than it saves. The float function is unchanged.
    """

    exact = True
    defaults: ClassVar[dict[str, Any]] = {"threshold": 6.0, "max_columns": 16}

    def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
        wanted = {**self.defaults, **context.parameters}
        threshold, most = float(wanted["threshold"]), int(wanted["max_columns"])
        if threshold <= 1 or most < 1:
            raise CalibrationError(f"{NAME} needs a threshold above 1 and at least one column, not {threshold}, {most}")
        layers = [n for n in graph.graph.nodes if kind(n) == "linear" and layer_of(graph, n) is not None]
        reaches = _look(layers, graph, context)
        ledger: list[Entry] = []
        masked: dict[tuple[Node, tuple[int, ...]], tuple[Node, Node]] = {}
        for node in layers:
            columns = _outliers(reaches[node], threshold)
            reason = _refusal(node, columns, most, context) if columns else f"no column reaches {threshold:g} medians"
            if reason is not None:
                ledger.append(Entry(NAME, layer_name(node), "left alone", reason))
                continue
            largest, median = float(reaches[node].max()), float(reaches[node].median())
            _split(graph, node, columns, masked)
            found = (
                f"columns {', '.join(map(str, columns))}: up to {largest / median:.3g} times the median of {median:.3g}"
            )
            ledger.append(Entry(NAME, layer_name(node), f"split off {len(columns)} of {len(reaches[node])}", found))
        return ledger or [Entry(NAME, "model", "left alone", "it has no linear layer with a constant weight")]

    def ensures(self, graph: GraphModule) -> str | None:
        for node in graph.graph.nodes:
            if node.meta.get("keep_float") == REASON and kind(node) != "linear":
                return f"{node.name} is marked as outliers, but is no linear layer"
        return None


def _look(layers: list[Node], graph: GraphModule, context: Context) -> dict[Node, Tensor]:
    """The largest magnitude of each input column of each layer over all calibration samples."""
    reaches: dict[Node, Tensor] = {}
    wanted = set(layers)

    class _Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n in wanted:
                source = n.args[0]
                assert isinstance(source, Node)
                reach = self.env[source].abs().flatten(0, -2).amax(0)
                reaches[n] = torch.maximum(reaches[n], reach) if n in reaches else reach
            return super().run_node(n)

    if not layers:
        return reaches
    watch, seen = _Watch(graph, garbage_collect_values=True), 0
    with torch.no_grad():
        for inputs in context.batches():
            watch.run(*inputs)
            seen += len(inputs[0]) if inputs[0].dim() else 1
            context.progress("outliers", seen, context.samples)
    if not seen:
        raise CalibrationError("the calibration data is empty: at least one sample is needed")
    return reaches


def _outliers(reach: Tensor, threshold: float) -> tuple[int, ...]:
    median = float(reach.median())
    return tuple(int(i) for i in torch.nonzero(reach >= threshold * median).flatten()) if median > 0 else ()


def _refusal(node: Node, columns: tuple[int, ...], most: int, context: Context) -> str | None:
    kept = kept_float(node, context.plan.keep_float)
    if kept is not None:
        return f"it stays float: {kept}"
    if len(columns) > most:
        return f"{len(columns)} outlier columns are more than the {most} that may be split off"
    return None


def _split(
    graph: GraphModule,
    node: Node,
    columns: tuple[int, ...],
    masked: dict[tuple[Node, tuple[int, ...]], tuple[Node, Node]],
) -> None:
    x = node.args[0]
    layer = layer_of(graph, node)
    assert isinstance(x, Node)
    assert layer is not None
    name, weight = layer_name(node), constant(graph, layer.weight)
    if (x, columns) not in masked:  # layers that read the same tensor (query, key, value) share mask and columns
        masked[x, columns] = _parts(graph, node, x, weight, columns)
    rest, few = masked[x, columns]
    picked = add_constant(graph, f"{name}_outlier_weight", weight[:, list(columns)].clone(), node)
    with graph.graph.inserting_after(node):
        total = graph.graph.call_function(aten.add.Tensor, (node, node))
    with graph.graph.inserting_before(total):
        small = graph.graph.call_function(aten.linear.default, (few, picked))
    small.meta = {"layer": f"{name}.outliers", "keep_float": REASON, "val": value_of(node)}
    total.meta = {"layer": f"{name}.sum", "val": value_of(node)}
    node.replace_all_uses_with(total)
    total.args = (node, small)
    node.args = (rest, *node.args[1:])


def _parts(graph: GraphModule, node: Node, x: Node, weight: Tensor, columns: tuple[int, ...]) -> tuple[Node, Node]:
    """(x with zeros in the outlier columns, the outlier columns of x), placed before `node`."""
    keep = torch.ones(weight.shape[1], dtype=weight.dtype)
    keep[list(columns)] = 0
    mask = add_constant(graph, f"{layer_name(node)}_keep", keep, node)
    index = add_constant(graph, f"{layer_name(node)}_columns", torch.tensor(columns, dtype=torch.int64), node)
    with graph.graph.inserting_before(node):
        rest = graph.graph.call_function(aten.mul.Tensor, (x, mask))
        few = graph.graph.call_function(aten.index_select.default, (x, -1, index))
    made = value_of(x)
    rest.meta = {"layer": f"{layer_name(node)}.keep", "val": made}
    few.meta = {"layer": f"{layer_name(node)}.columns"}
    if made is not None:
        few.meta["val"] = made.new_empty((*made.shape[:-1], len(columns)))
    return rest, few


STEP = SplitOutliers()
