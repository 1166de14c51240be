"""What every step owes: a name, a sentence, an untouched original, and a promise that is held to."""

import importlib

import pytest
import torch
from small_graphs import ISLANDS, capture, context, images
from torch import nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.errors import CalibrationError
from calibrate.graph import clone, kind, run
from calibrate.plan import Entry
from calibrate.steps import Context, fold_batchnorm

# Puts out something else than the model did, and needs more samples to find it.
OTHER_OUTPUTS = {"binarize_embedding"}


def small_cnn() -> GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4))
    return capture(model, images())


def start(name: str) -> tuple[GraphModule, Context]:
    """A graph that the step called `name` can work on: quantized already where it refines; and its context."""
    graph, setting = small_cnn(), context(ISLANDS, [images(64 if name in OTHER_OUTPUTS else 8)])
    if steps.refines(name):
        steps.apply("quantize_static", graph, setting)
    return graph, setting


@pytest.mark.parametrize("name", steps.names())
def test_every_step_says_in_its_first_line_what_it_does(name: str) -> None:
    module = importlib.import_module(f"calibrate.steps.{name}")
    line = (module.__doc__ or "").strip().splitlines()[0]
    assert 20 < len(line) <= 120
    assert isinstance(steps.find(name).exact, bool)


@pytest.mark.parametrize("name", steps.names())
def test_no_step_changes_the_graph_that_was_cloned_for_it(name: str) -> None:
    graph, setting = start(name)
    before, code = run(graph, [images()])[0], graph.code
    state = {k: v.clone() for k, v in graph.state_dict().items()}
    steps.apply(name, clone(graph), setting)
    assert torch.equal(run(graph, [images()])[0], before)
    assert graph.code == code
    assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())


@pytest.mark.parametrize("name", steps.names())
def test_every_step_names_itself_and_a_layer_in_each_line_of_its_ledger(name: str) -> None:
    ledger = steps.apply(name, *start(name))
    assert ledger
    assert all(e.step == name and e.layer and e.action for e in ledger)
    assert all(e.reason for e in ledger if e.action.startswith("left"))


@pytest.mark.parametrize("name", [n for n in steps.names() if steps.find(n).exact])
def test_a_step_that_calls_itself_exact_keeps_the_float_function(name: str) -> None:
    graph = small_cnn()
    result = clone(graph)
    steps.apply(name, result, context(ISLANDS, [images(8)]))
    (before,), (after,) = run(graph, [images()]), run(result, [images()])
    difference, reach = float((before - after).abs().max()), float(before.abs().max())
    assert difference <= 1e-5 * reach  # float32 rounding


@pytest.mark.parametrize("name", [n for n in steps.names() if not steps.find(n).exact and n not in OTHER_OUTPUTS])
def test_a_step_that_does_not_call_itself_exact_leaves_the_float_function_a_little(name: str) -> None:
    graph, (result, setting) = small_cnn(), start(name)
    steps.apply(name, result, setting)
    (before,), (after,) = run(graph, [images()]), run(result, [images()])
    assert 0 < float((before - after).square().mean() / before.square().mean()) < 1e-2


@pytest.mark.parametrize("name", steps.names())
def test_every_step_leaves_a_graph_that_takes_any_batch(name: str) -> None:
    graph, setting = start(name)
    steps.apply(name, graph, setting)
    assert all(len(run(graph, [images(n)])[0]) == n for n in (1, 5))


def test_an_unknown_step_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(CalibrationError, match=r"no step 'prune'; there are .*fold_batchnorm, .*half_weights"):
        steps.find("prune")


def test_a_step_that_breaks_its_promise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(fold_batchnorm.FoldBatchnorm):
        """Folds nothing and says nothing."""

        def apply(self, graph: GraphModule, context: Context) -> list[Entry]:
            return []

    monkeypatch.setattr(fold_batchnorm, "STEP", Lazy())
    with pytest.raises(AssertionError, match=r"step fold_batchnorm broke its promise: batch_norm.* could have been"):
        steps.apply("fold_batchnorm", small_cnn(), context(ISLANDS))


def test_static_quantization_notices_codes_that_something_reads_without_dequantizing() -> None:
    graph = small_cnn()
    steps.apply("quantize_static", graph, context(ISLANDS, [images(8)]))
    promise = steps.find("quantize_static").ensures
    assert promise(graph) is None
    dequantize = next(n for n in graph.graph.nodes if "dequantize_per_tensor" in str(n.target))
    dequantize.replace_all_uses_with(dequantize.args[0])
    assert "read by something other than a dequantize" in (promise(graph) or "")


def test_dynamic_quantization_notices_static_codes() -> None:
    graph = small_cnn()
    steps.apply("quantize_static", graph, context(ISLANDS, [images(8)]))
    assert steps.find("quantize_dynamic").ensures(graph) == "static Q/DQ appeared"
    assert all(kind(n) != "other" for n in graph.graph.nodes)
