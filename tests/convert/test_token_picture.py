"""What the report is told about tokens: counts, cuts, and what became of the tokens of a few samples."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from token_setup import pruner, vit

from calibrate.graph import run
from calibrate.tokens.schedule import Schedule
from convert.compress import tensors
from convert.pruning import Pruned
from convert.report.schema import TokenFacts
from convert.token_picture import SAMPLES, _became, _grid, _pixels, token_facts

CUT = Schedule(3, 17, ((0, 12), (1, 8)))


def made(method: str, schedule: Schedule = CUT) -> Pruned:
    found = pruner(method)
    return found.pruned(found.score(schedule), "rank", "", [])


def facts(method: str, schedule: Schedule = CUT) -> TokenFacts:
    return token_facts(made(method, schedule), vit()[1])


def test_the_facts_are_those_of_the_schedule() -> None:
    found = facts("evit")
    assert (found.method, found.form, found.protected, found.tokens) == ("evit", "rank", 1, 17)
    assert found.per_block == (12, 8, 8)
    assert found.share == pytest.approx(28 / 51)
    assert [(c.block, c.before, c.after) for c in found.cuts] == [(1, 17, 12), (2, 12, 8)]
    assert [c.layer for c in found.cuts] == list(made("evit").layers)
    assert found.changed == pruner("evit").score(CUT).drop
    assert len(found.samples) == SAMPLES
    assert TokenFacts.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("method", "gone"), [("even", (5, 9)), ("evit", (0, 0)), ("tome", (0, 0))])
def test_each_sample_shows_where_its_tokens_went(method: str, gone: tuple[int, int]) -> None:
    for sample in facts(method).samples:
        for became, left, wanted in zip(sample.became, (12, 8), gone, strict=True):
            assert len(became) == 17
            assert became.count(-1) == wanted
            assert set(became) - {-1} == set(range(left))
            assert became[0] == 0  # the class token stays in front


def test_a_fixed_pattern_gives_every_sample_the_same_picture_and_evit_does_not() -> None:
    assert len({s.became for s in facts("even").samples}) == 1
    assert len({s.became for s in facts("evit").samples}) > 1


def test_the_tokens_shown_are_those_the_graph_keeps() -> None:
    """The picture is made from the graph in one form, the file may have another: tokens are the same."""
    found = facts("importance").samples
    model, data = vit()
    graph = pruner("importance").graph(CUT, "rank", traced=True)
    origins = run(graph, tensors(next(data.batches(SAMPLES)), model.inputs))[1:]
    for index, sample in enumerate(found):
        for became, origin in zip(sample.became, origins, strict=True):
            stays = [i for i, place in enumerate(became) if place >= 0]
            assert stays == origin[index].sum(0).nonzero().flatten().tolist()


def test_a_schedule_without_cuts_has_no_samples() -> None:
    found = facts("evit", Schedule(3, 17))
    assert (found.cuts, found.samples, found.share, found.per_block) == ((), (), 1.0, (17, 17, 17))


def test_the_picture_is_the_sample_in_its_patches() -> None:
    sample = facts("evit").samples[1]
    assert sample.grid == (4, 4)
    assert sample.image is not None
    with Image.open(io.BytesIO(base64.b64decode(sample.image))) as image:
        assert (image.mode, image.width, image.height) == ("L", 112, 112)
        shown = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float).ravel()
    wanted = vit()[1].array[1, 0].ravel()
    other = vit()[1].array[2, 0].ravel()
    assert np.corrcoef(shown, wanted)[0, 1] > 0.95  # larger by bicubic interpolation, then smaller again
    assert np.corrcoef(shown, other)[0, 1] < 0.5


def test_what_a_token_became_is_the_place_that_holds_most_of_it() -> None:
    origin = np.array([[[1.0, 0, 0, 0], [0, 0.25, 0.75, 0], [0, 0.5, 0, 0]]])
    assert _became(origin).tolist() == [[0, 2, 1, -1]]


@pytest.mark.parametrize(
    ("shape", "tokens", "protected", "grid"),
    [
        ((32, 32), 65, 1, (8, 8)),
        ((32, 32), 64, 0, (8, 8)),
        ((224, 224), 198, 2, (14, 14)),
        ((32, 64), 33, 1, (4, 8)),
        ((64, 32), 33, 1, (8, 4)),
        ((32, 32), 65, 0, (8, 8)),  # a class token that nothing reads by its place
        ((30, 30), 50, 1, None),  # seven by seven patches do not divide thirty pixels
        ((32, 32), 40, 1, None),
    ],
)
def test_patches_lie_in_rows_where_the_numbers_fit(
    shape: tuple[int, int], tokens: int, protected: int, grid: tuple[int, int] | None
) -> None:
    assert _grid(np.zeros((*shape, 3)), tokens, protected) == grid


def test_what_is_no_image_has_no_pixels() -> None:
    assert _pixels({"ids": np.zeros((2, 8), np.int64)}, 0) is None
    assert _pixels({"x": np.zeros((2, 7, 8, 8), np.float32)}, 0) is None
    level = _pixels({"x": np.full((2, 3, 8, 8), 5, np.float32)}, 1)
    assert level is not None
    assert level.shape == (8, 8, 3)
    assert not level.any()
