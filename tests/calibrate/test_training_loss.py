"""The loss that trains whole graphs: what each part of it sees, and what a teacher's intervention cuts off."""

import pytest
import torch
from small_graphs import ISLANDS, capture, context, images
from torch import Tensor, nn
from torch.fx import GraphModule

from calibrate import steps
from calibrate.blocks import block_units
from calibrate.training import Runner
from calibrate.training_loss import Lesson, Teaching, distance
from calibrate.training_model import Student


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def chain() -> tuple[GraphModule, GraphModule]:
    """A chain of three layers as float and as codes."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    graph = capture(module, images())
    setting = context(ISLANDS, [images(16)])
    steps.apply("quantize_static", graph, setting)
    assert setting.float_graph is not None
    return setting.float_graph, graph


def lesson(blocks: float = 0.0, labels: float = 0.0, squares: bool = True) -> tuple[Lesson, Student]:
    reference, graph = chain()
    student = Student(graph, ISLANDS)
    exits = [(u.exit, u.float_exit) for u in block_units(reference, graph)[:-1]]
    assert len(exits) == 2
    learner, teacher = Runner(graph, student.given, student.steps), Runner(reference, {})
    return Lesson(learner, teacher, exits, blocks, labels, squares), student


def reached(student: Student, loss: Tensor) -> list[bool]:
    """Whether the gradient of `loss` reaches each layer's weight, in order."""
    latents = [w.latent for w in student.weights]
    found = torch.autograd.grad(loss, latents, allow_unused=True)
    return [g is not None and bool(g.abs().sum() > 0) for g in found]


def test_distance_is_zero_for_the_same_answer_and_grows_with_the_difference() -> None:
    for wanted in (torch.randn(8, 5), torch.randn(8, 3, 4)):
        noise = torch.randn_like(wanted)
        assert float(distance(wanted, wanted)) == pytest.approx(0, abs=1e-6)  # float32 cosine
        assert float(distance(wanted + noise, wanted)) > float(distance(wanted + 0.1 * noise, wanted)) > 0


def test_a_teacher_that_never_intervenes_leaves_the_loss_bit_for_bit_as_it_is() -> None:
    taught, _ = lesson(blocks=1.0)
    plain = taught.loss([images(8)])
    assert torch.equal(taught.loss([images(8)], teaching=Teaching(0.0, generator())), plain)
    assert not torch.equal(taught.loss([images(8)], teaching=Teaching(1.0, generator())), plain)


def test_where_the_teacher_intervenes_no_error_passes_from_one_block_to_the_next() -> None:
    taught, student = lesson()
    assert reached(student, taught.loss([images(8)])) == [True, True, True]
    assert reached(student, taught.loss([images(8)], teaching=Teaching(1.0, generator()))) == [False, False, True]


def test_each_block_still_learns_from_its_own_output_where_the_teacher_intervenes() -> None:
    taught, student = lesson(blocks=1.0)
    assert reached(student, taught.loss([images(8)], teaching=Teaching(1.0, generator()))) == [True, True, True]


def test_labels_add_the_cross_entropy_times_their_weight() -> None:
    classes = torch.arange(8) % 4
    plain = float(lesson()[0].loss([images(8)], classes).detach())
    taught, _ = lesson(labels=0.5)
    scores = taught.learner.run(taught.learner.nodes, {taught.learner.placeholders[0]: images(8)})
    entropy = float(nn.functional.cross_entropy(scores[taught.learner.outputs[0]].detach(), classes))
    found = float(taught.loss([images(8)], classes).detach())
    assert found == pytest.approx(plain + 0.5 * entropy, rel=1e-5)  # float32 sum
    assert float(taught.loss([images(8)]).detach()) == plain


def test_the_mean_over_batches_is_that_over_samples_and_leaves_blocks_out() -> None:
    taught, _ = lesson(blocks=1.0)
    alone, _ = lesson(squares=False)
    first, second = images(6), images(2, seed=1)
    each = [float(alone.loss([b]).detach()) for b in (first, second)]
    found = taught.mean([[first], [second]], [None, None])
    assert found == pytest.approx((6 * each[0] + 2 * each[1]) / 8, rel=1e-6)  # float64 sum of float32 numbers
    assert found != pytest.approx(sum(each) / 2, rel=1e-6)
