"""Drift: closed forms, and what must never look small."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.drift import Drift, OutputDrift, classifies, top1


def test_the_ratio_has_its_closed_form() -> None:
    drift = OutputDrift()
    drift.add(np.full((2, 5), 10.0, np.float32), np.full((2, 5), 11.0, np.float32))
    assert drift.sqnr_db == pytest.approx(20.0)
    assert drift.max_abs == 1.0
    assert drift.cosine == pytest.approx(1.0)


@given(st.integers(1, 7))
def test_batches_of_any_size_give_one_result(size: int) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 12, 3)).astype(np.float32)
    whole, parts = OutputDrift(), OutputDrift()
    whole.add(a, b)
    for i in range(0, 12, size):
        parts.add(a[i : i + size], b[i : i + size])
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.max_abs == whole.max_abs


def test_equal_outputs_are_infinitely_good_and_nan_is_no_number() -> None:
    same, broken = OutputDrift(), OutputDrift()
    x = np.ones((1, 2), np.float32)
    same.add(x, x)
    broken.add(x, np.array([[1.0, np.nan]], np.float32))
    assert same.sqnr_db == math.inf
    assert math.isnan(broken.sqnr_db)


def test_the_worst_output_speaks_for_all() -> None:
    drift = Drift(classifies=False)
    big, small = np.full((1, 100), 100.0, np.float32), np.ones((1, 2), np.float32)
    drift.add({"big": big, "small": small}, {"big": big, "small": small * 2})
    assert drift.sqnr_db == pytest.approx(0.0)


def test_a_missing_output_and_another_shape_are_errors_not_zero_drift() -> None:
    x = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="missing"):
        Drift(False).add({"a": x}, {"b": x})
    with pytest.raises(ValueError, match="shape"):
        Drift(False).add({"a": x}, {"a": x[:, :1]})


def test_a_row_that_is_not_finite_has_no_class() -> None:
    assert top1(np.array([[0.1, 0.9], [np.nan, 2.0]], np.float32)).tolist() == [1, -1]


def test_unit_vectors_are_no_classes_but_labels_make_them_so() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert not classifies({"e": vectors}, None)
    assert classifies({"e": vectors}, np.array([0, 1, 2]))
    assert classifies({"logits": vectors * 3}, None)
    assert not classifies({"logits": vectors * 3}, np.array([0, 5]))
