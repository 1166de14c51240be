"""Quantized graphs with float weights again: the same function where activations keep their nodes, layers by name."""

import pytest
import torch
from refined_nets import DYNAMIC, STATIC, WEIGHTS, batches, cnn, pictures
from small_graphs import context

from calibrate import steps
from calibrate.coded import coded_layers
from calibrate.decoded import decoded
from calibrate.graph import constant, is_weighted, layer_name, run, weight_nodes
from calibrate.plan import Plan


@pytest.mark.parametrize("plan", [STATIC, DYNAMIC, WEIGHTS], ids=["static", "dynamic", "weights"])
def test_weights_are_float_constants_of_the_value_the_codes_stand_for(plan: Plan) -> None:
    graph = cnn()
    steps.apply(plan.steps[0], graph, context(plan, *batches()))
    wanted = {x.name: x.weight(graph) for x in coded_layers(graph)}
    before = run(graph, [pictures()])[0]
    made = decoded(graph)
    assert wanted
    assert not list(coded_layers(made))
    for node in made.graph.nodes:
        if layer_name(node) in wanted and is_weighted(node):
            weight, _ = weight_nodes(node)
            assert weight is not None
            assert torch.equal(constant(made, weight), wanted.pop(layer_name(node)))
    assert not wanted
    after = run(made, [pictures()])[0]
    close = 0.05 if plan is DYNAMIC else 1e-5  # dynamic layers round their input by themselves, these do not
    assert float((after - before).square().sum() / before.square().sum()) < close
    assert torch.equal(run(graph, [pictures()])[0], before)  # and the quantized graph is as it was
