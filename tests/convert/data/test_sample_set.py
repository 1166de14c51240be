"""Splitting a set, and synthetic data."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.samples import InputSpec
from convert.data import SampleSet, hold_out, open_data, synthetic_data, take
from convert.errors import TightfitError

INPUTS = (InputSpec("x", (1, 3), "float32"), InputSpec("ids", (1, 4), "int64"), InputSpec("mask", (1, 4), "bool"))


def made(count: int = 20, seed: int = 0) -> SampleSet:
    return synthetic_data(INPUTS, samples=count, seed=seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_the_parts_are_disjoint_complete_and_never_empty(count: int, fraction: float, seed: int) -> None:
    calibration, evaluation = hold_out(made(count), fraction, seed=seed)
    both = np.concatenate([calibration.indices, evaluation.indices])
    assert sorted(both.tolist()) == list(range(count))
    assert len(calibration) >= 1
    assert len(evaluation) >= 1


def test_a_fifth_is_held_out_and_the_seed_decides_which() -> None:
    first, again, other = (hold_out(made(50), seed=seed)[1] for seed in (1, 1, 2))
    assert len(first) == 10
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(TightfitError, match="--evaluation"):
        hold_out(made(1), seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(made(), 1.0, seed=0)


def test_take_chooses_at_random_in_order() -> None:
    some = take(made(), 5, seed=3)
    assert len(some) == 5
    assert (np.diff(some.indices) > 0).all()
    assert some.indices.tolist() == take(made(), 5, seed=3).indices.tolist()
    assert some.indices.tolist() != take(made(), 5, seed=4).indices.tolist()
    assert len(take(made(), 99, seed=0)) == 20
    with pytest.raises(ValueError, match="cannot take 0"):
        take(made(), 0, seed=0)


def test_labels_travel_with_a_split(tmp_path: Path) -> None:
    x = np.arange(40, dtype=np.float32)[:, None]
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40))
    data = open_data(str(tmp_path / "data.npz"), (InputSpec("x", (1, 1), "float32"),), work=tmp_path)
    for part in hold_out(data, seed=0):
        assert part.labels is not None
        assert part.labels.tolist() == next(part.batches(40))["x"][:, 0].tolist()


def test_synthetic_samples_say_so_and_keep_to_a_safe_range() -> None:
    data = made(500)
    assert data.synthetic
    assert "synthetic" in data.notes[0]
    batch = next(data.batches(500))
    assert {name: a.dtype.name for name, a in batch.items()} == {"x": "float32", "ids": "int64", "mask": "bool"}
    assert set(np.unique(batch["ids"])) == {0, 1}
    # 1,500 standard-normal numbers: mean and deviation are within five standard errors (0.026, 0.018).
    assert abs(batch["x"].mean()) < 0.13
    assert abs(batch["x"].std() - 1) < 0.09


def test_synthetic_samples_depend_on_seed_and_position_only() -> None:
    whole = next(made().batches(20))
    small = [batch["x"] for batch in made().batches(3)]
    assert np.array_equal(np.concatenate(small), whole["x"])
    chosen = next(made().select(np.array([2, 7])).batches(2))
    assert np.array_equal(chosen["ids"], whole["ids"][[2, 7]])
    assert made().fingerprint == made().fingerprint != made(seed=1).fingerprint
