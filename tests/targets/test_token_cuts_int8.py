"""In a quantized encoder the tokens are still chosen in float, and the file does what its simulation does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from cut_encoders import RULES, answers, apart, cut, float_graph, job, lowered, samples
from small_graphs import context
from torch import Tensor
from torch.fx import GraphModule, Node

from calibrate import qdq, steps
from calibrate.graph import CHOOSES_TOKENS, chooses_tokens, clone, kind, run
from calibrate.plan import Entry, Plan
from calibrate.simulation import Simulation, simulate
from calibrate.tokens.insert import Cut, reduce
from convert.planning import decide
from device_profiles import load

PROFILES = {"onnx": "generic-x86-vnni", "tflite": "raspberry-pi-4b"}
METHODS = ("evit", "importance", "zero_tprune", "tome")
# Every kind that some runtime has an integer kernel for, the Edge TPU's softmax among them.
GREEDY = frozenset(("conv", "linear", "add", "sub", "mul", "mean", "matmul", "softmax", "sigmoid"))


def plan_of(target: str, recipe: str = "int8") -> Plan:
    return decide(float_graph(""), load(PROFILES[target]), target, recipe).plan


def greedy() -> Plan:
    return Plan(
        ("quantize_static",),
        quantize_inputs=GREEDY,
        quantize_outputs=GREEDY,
        shared_scale=frozenset(("reshape", "transpose", "slice", "select", "split", "gather", "cat")),
    )


def quantized(graph: GraphModule, plan: Plan, step: str = "quantize_static") -> list[Entry]:
    x, keep = samples()
    return steps.apply(step, graph, context(plan, [x[100:164], keep[100:164]]))


def marked(graph: GraphModule) -> list[Node]:
    return [n for n in graph.graph.nodes if chooses_tokens(n)]


def written(nodes: list[Node]) -> list[tuple[object, ...]]:
    return [(n.name, str(n.target), str(n.args), str(n.kwargs)) for n in nodes]


PLANS: dict[str, Callable[[], Plan]] = {
    "onnx": lambda: plan_of("onnx"),
    "tflite": lambda: plan_of("tflite"),
    "greedy": greedy,
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", METHODS)
def test_no_codes_come_to_what_chooses_tokens(name: str, plan: str) -> None:
    """Its operators read what they read before, and only the tokens that stay are turned into codes, for a layer."""
    graph = cut(name, "rank")
    before = written(marked(graph))
    ledger = quantized(graph, PLANS[plan]())
    assert len(before) > 20
    assert written(marked(graph)) == before
    for node in graph.graph.nodes:
        if node.target is qdq.QUANTIZE and chooses_tokens(node.args[0]):
            (restored,) = node.users
            assert all(kind(u) == "linear" for u in restored.users)
    assert any(n.target is qdq.QUANTIZE for n in graph.graph.nodes)
    left = [e for e in ledger if e.layer == "blocks.0.scaled_dot_product_attention.softmax_int.tokens"]
    left = left or [e for e in ledger if e.layer == "blocks.0.scaled_dot_product_attention.tokens"]
    assert [(e.action, "which tokens stay" in e.reason) for e in left] == [("left float", True)]


@pytest.mark.parametrize("name", ["zero_tprune", "tome"])
def test_without_the_mark_codes_would_come(name: str) -> None:
    graph = cut(name, "rank")
    nodes = marked(graph)
    before = written(nodes)
    for node in nodes:
        del node.meta[CHOOSES_TOKENS]
    quantized(graph, greedy())
    assert written(nodes) != before


@pytest.mark.parametrize("step", ["quantize_dynamic", "quantize_weights"])
@pytest.mark.parametrize("name", METHODS)
def test_dynamic_and_weight_only_int8_leave_it_alone_too(name: str, step: str) -> None:
    graph = cut(name, "topk")
    before = written(marked(graph))
    ledger = quantized(graph, plan_of("onnx", "int8-dynamic"), step)
    assert written(marked(graph)) == before
    assert any(not e.action.startswith("left") for e in ledger)
    assert not any(".tokens" in e.layer for e in ledger)


def test_the_mark_is_kept_by_clones_and_not_given_to_attention() -> None:
    graph = cut("evit", "rank")
    assert len(marked(clone(graph))) == len(marked(graph)) > 20
    attention = [n for n in graph.graph.nodes if kind(n) == "attention"]
    assert len(attention) == 2, "it stays one operator"
    assert not set(attention) & set(marked(graph))
    rows = [n.meta["val"].shape[-2] for n in marked(graph) if kind(n) == "softmax"]
    assert rows == [1, 1], "the class token's alone"
    assert marked(float_graph("mask")) == []


class Recorder(Simulation):
    """A simulation that remembers what the nodes of these names make."""

    def __init__(self, graph: GraphModule, *names: str) -> None:
        super().__init__(graph)
        self.names, self.seen = names, dict[str, Tensor]()

    def run_node(self, n: Node) -> object:
        made = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = made
        return made


@pytest.mark.parametrize("plan", PLANS)
def test_int8_keeps_what_float_scores_of_its_own_attention_rank_first(plan: str) -> None:
    """The simulation's attention, ranked once more in the test: the very same tokens, bit for bit."""
    graph = clone(float_graph("mask"))
    (done,) = reduce(graph, [Cut(0, 4, "evit", {"fuse": False})], form="rank")
    table, residual = next(n for n in graph.graph.nodes if kind(n) == "softmax"), done.kept.args[1]
    names = (table.name, residual.name, done.kept.name)
    quantized(graph, PLANS[plan]())
    recorder = Recorder(graph, *names)
    with torch.no_grad():
        recorder.run(*samples())
    probabilities, tokens, kept = (recorder.seen[n] for n in names)
    score = probabilities[:, :, 0].mean(1)
    score[:, 0] = 2.0
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    for best, same in ((order[:, :4], True), (order[:, 1:5], False)):
        wanted = tokens.gather(1, best[:, :, None].expand(-1, -1, tokens.shape[2]))
        assert torch.equal(kept, wanted) is same


@cache
def simulated(target: str, name: str) -> tuple[GraphModule, Tensor]:
    graph = cut(name, "rank")
    quantized(graph, plan_of(target))
    adder = "fixed_point" if RULES[target].runtime == "litert" else "float"
    return graph, simulate(graph, adder=adder)(samples())[0]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [("onnx", "evit"), ("tflite", "tome")])
def test_the_int8_file_answers_as_its_simulation(target: str, name: str, tmp_path: Path) -> None:
    """Measured without a difference on both. Codes made from float sums may fall on the other side of a tie, so a
    sample in fifty may be off by what one step of an activation does to the answer, a hundredth of its reach."""
    graph, expected = simulated(target, name)
    session, path = lowered(job(graph, (name,), target), target, tmp_path)
    off = apart(answers(session, samples())[name], expected)
    assert float(off.max()) < 1e-2
    assert int((off > 1e-6).sum()) <= 4
    (plain,) = run(cut(name, "rank"), samples())
    assert int((apart(plain, expected) > 1e-6).sum()) > 190  # the float graph is another model
    if target == "tflite":
        assert float_in_the_file(path)


def float_in_the_file(path: Path) -> bool:
    """Whether all that the cuts put there computes in float, but what turns the kept tokens into codes."""
    from targets._tflite_file import TFLiteFile

    file = TFLiteFile(path.read_bytes())
    ours = [op for op in file.graph.operators if ".tokens." in file.name(file.outputs(op)[0])]
    codes = [file.operator(op) for op in ours if file.dtype(file.outputs(op)[0]) == "INT8"]
    return len(ours) > 20 and set(codes) <= {"QUANTIZE"}
