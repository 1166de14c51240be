"""Token methods that are trained: every graph of a chosen schedule holds it, and the ledger says what it brought."""

import functools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from small_models import Samples
from token_setup import images, vit

import targets
from calibrate.graph import run
from calibrate.plan import Entry
from calibrate.samples import InputSpec
from calibrate.tokens.recover import Effort
from calibrate.tokens.schedule import Schedule
from calibrate.tokens.trained import marked
from convert import token_training
from convert.compress import Judge
from convert.planning import decide
from convert.pruning import Pruner, Scored
from convert.recipes import Tokens
from convert.token_training import Lessons, trained
from device_profiles import load

CUT = Schedule(3, 17, ((0, 10), (1, 6)))


def pruner(method: str = "pyra", **options: object) -> Pruner:
    """A pruner of its own for the ViT, with 96 images: 48 to learn from and as many to judge by."""
    model, _ = vit()
    data = Samples(model.inputs[0].name, images(96))
    return Pruner(model, Judge(model, data), Tokens(method, options=options), data)


def lessons(effort: str = "normal", most_drop: float | None = None) -> Lessons:
    return Lessons(effort, lambda *_: None, most_drop)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short training that has something to win: a soft association."""
    monkeypatch.setattr(token_training, "Wish", lambda: Effort(iterations=20, lr=0.1))


@functools.cache
def learned() -> tuple[Pruner, Scored, Scored]:
    found = pruner("super_tokens", sharpness=2.0)
    before = found.score(CUT)
    return found, before, trained(found, before, lessons())


def test_a_trained_schedule_is_closer_and_every_graph_of_it_is_the_trained_one() -> None:
    found, before, after = learned()
    assert after.db > before.db
    assert found.score(CUT) == before  # schedules go on being compared untrained
    constants = found.learned[CUT].constants
    graphs = [found.graph(CUT), found.graph(CUT, "rank"), found.graph(CUT, traced=True)]
    for graph in graphs:
        nodes = marked(graph)
        assert list(nodes) == list(constants)
        assert all(torch.equal(nodes[n].meta["val"], constants[n]) for n in constants)
    one, other, shown = (run(g, found.judge.inputs[0])[0] for g in graphs)
    assert torch.equal(one, shown)
    assert torch.allclose(one, other, atol=1e-5)
    assert found.judge.closeness([run(graphs[0], t) for t in found.judge.inputs]) == pytest.approx(after.db)
    assert trained(found, before, lessons()) is after  # not trained twice


def test_the_ledger_says_in_numbers_what_it_brought() -> None:
    found, before, after = learned()
    (entry,) = found.learned[CUT].ledger
    assert entry in found.pruned(after, "topk", "said", [before]).ledger
    assert entry.action.startswith("trained 32 numbers of the token cuts")
    assert f"on the judging samples {before.db:.1f} -> {after.db:.1f} dB" in entry.reason
    assert "held-out samples after 20 steps" in entry.reason


def test_effort_fast_trains_nothing_and_says_so() -> None:
    found = pruner()
    before = found.score(CUT)
    assert trained(found, before, lessons("fast")) is before
    why = "--effort fast trains nothing; normal trains what pyra brings along"
    assert Entry("prune_tokens", "model", "left untrained", why) in found.pruned(before, "topk", "said", []).ledger
    assert not found.learned[CUT].constants


def test_a_limit_on_changed_answers_that_training_breaks_rolls_it_back() -> None:
    found = pruner("super_tokens", sharpness=2.0)
    before = found.score(CUT)
    assert trained(found, before, lessons(most_drop=-1.0)) is before
    (entry,) = found.learned[CUT].ledger
    assert entry.action == "left untrained"
    assert entry.reason.startswith("rolled back: loss ")
    assert not found.learned[CUT].constants


def test_methods_that_train_nothing_and_schedules_without_cuts_are_left_alone() -> None:
    for found, schedule in ((pruner("tome"), CUT), (pruner(), Schedule(3, 17))):
        before = found.score(schedule)
        assert trained(found, before, lessons()) is before
        assert not found.learned


@pytest.mark.parametrize("method", ["pyra", "super_tokens"])
def test_a_trained_graph_runs_in_onnx_runtime(method: str, tmp_path: Path) -> None:
    found = pruner(method)
    names = marked(found.graph(CUT))
    generator = torch.Generator().manual_seed(0)
    values = {n: v.meta["val"] for n, v in names.items()}
    moved = {n: 0.01 * v + torch.rand(v.shape, generator=generator) for n, v in values.items()}
    ledger = (Entry("prune_tokens", "model", "set by this test"),)
    found.learned[CUT] = token_training.Learned(moved, ledger, found.score(CUT))
    graph, model = found.graph(CUT), found.captured
    profile = decide(model.graph, load("generic-x86"), "onnx", "float32")
    inputs = tuple(InputSpec(i.name, (4, *i.sample_shape), i.dtype, False) for i in model.inputs)
    job = targets.Job("vit", graph, inputs, model.outputs, rules=profile.rules, compute="float32")
    path = tmp_path / "vit.onnx"
    targets.find("onnx").lower(job, path)
    x = images(4)
    (got,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {inputs[0].name: x})
    (wanted,), (plain,) = run(graph, [torch.from_numpy(x)]), run(pruner(method).graph(CUT), [torch.from_numpy(x)])
    assert np.allclose(got, wanted.numpy(), atol=1e-4)
    assert not np.allclose(got, plain.numpy(), atol=1e-4)
