"""all-MiniLM-L6-v2, token ids in and an embedding out: the default recipes must not collapse it."""

import pytest
from real_conversions import EVALUATION_SENTENCES, Made

pytestmark = pytest.mark.slow

EVERY = ["minilm-pi", "minilm-iphone"]
# Static int8 of other tools gives 0.36 to 0.93 on this model.
LOWEST_COSINE = 0.99


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_the_default_recipe_keeps_the_embedding(made: Made) -> None:
    for result in made.report.results:
        cosine = result.drift.artifact.cosine
        assert cosine is not None
        assert cosine >= LOWEST_COSINE, result.subject
        assert result.match.within_one_step, result.subject


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_the_report_says_why_this_recipe(made: Made) -> None:
    for result in made.report.results:
        assert result.recipe in ("auto: int8-dynamic", "auto: int8-weights")
        assert len(result.recipe_reason) > 20


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_an_embedding_has_drift_but_no_top1(made: Made) -> None:
    assert made.report.evaluation.samples == EVALUATION_SENTENCES
    for result in made.report.results:
        assert result.accuracy is None
        assert result.drift.artifact.top1_agreement is None


@pytest.mark.parametrize("made", EVERY, indirect=True)
def test_the_weights_shrink_to_about_a_quarter(made: Made) -> None:
    for result in made.report.results:
        # ONNX keeps up to three sensitive layers float: a third at most.
        assert result.bytes < 0.34 * result.float_bytes, result.subject
