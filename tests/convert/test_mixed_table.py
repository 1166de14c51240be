"""What mixed precision chooses from: which formats there are, what they take and cost, and the integer programme."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import cnn, planted, prepared

from calibrate.plan import HALF, WeightFormat
from convert.compress import Builder
from convert.mixed_table import Table, build_table, form_of, options, solve, stored_bytes
from convert.planning import decide
from device_profiles import load


def table(seed: int, rows: int = 5, columns: int = 3) -> Table:
    generator = np.random.default_rng(seed)
    scores, sizes = generator.random((rows, columns)), generator.random((rows, columns)) * 100
    names = tuple(f"layer{i}" for i in range(rows))
    return Table(names, ("4", "8", "float"), scores, sizes, generator.random(rows), 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.3, 1.2))
def test_the_programme_finds_what_trying_every_choice_finds(seed: int, share: float) -> None:
    small = table(seed, rows=4)
    limit = float(small.bytes.mean() * 4 * share)
    rows = np.arange(4)
    every = [np.array(c) for c in np.ndindex(3, 3, 3, 3) if small.bytes[rows, c].sum() <= limit]
    found = solve(small, [(small.bytes, limit)])
    if not every:
        assert found is None
        return
    assert found is not None
    assert small.bytes[rows, found].sum() <= limit * (1 + 1e-6)
    best = min(small.scores[rows, c].sum() for c in every)
    assert small.scores[rows, found].sum() == pytest.approx(best, abs=1e-6)


def test_a_choice_that_is_banned_is_not_found_again() -> None:
    small = table(3)
    first = solve(small, [(small.bytes, 1e9)])
    assert first is not None
    second = solve(small, [(small.bytes, 1e9)], [first])
    assert second is not None
    assert not (first == second).all()


def test_stored_bytes_are_codes_and_scales() -> None:
    weight = torch.zeros(8, 64)
    assert stored_bytes(weight, None) == 8 * 64 * 4
    assert stored_bytes(weight, WeightFormat(4)) == 8 * 32 + 8 * 4
    assert stored_bytes(weight, WeightFormat(2, group=32)) == 8 * 16 + 8 * 2 * 4
    assert stored_bytes(weight, WeightFormat(8), scale=12) == 8 * 64 + 8 * 12


def test_16_bits_take_two_bytes_each_unless_float16_cannot_hold_them() -> None:
    weight = torch.zeros(8, 64)
    assert stored_bytes(weight, HALF) == 8 * 64 * 2
    weight[0, 0] = 1e5
    assert stored_bytes(weight, HALF) == 8 * 64 * 4  # the step leaves such a layer float


@pytest.mark.parametrize(
    ("device", "target", "names"),
    [
        ("generic-x86", "onnx", ("4", "8", "16", "float")),
        ("raspberry-pi-4b", "tflite", ("4", "8", "16", "float")),
        ("iphone-a17-pro", "coreml", ("4", "8", "16")),  # computes in float16: a float layer has 16 bits
        ("jetson-nano", "onnx", ("4", "8", "16")),  # TensorRT has no 2 bits
        ("coral-edgetpu", "tflite", ("4", "8", "float")),
    ],
)
def test_formats_are_those_the_runtime_has(device: str, target: str, names: tuple[str, ...]) -> None:
    model, _ = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    assert options(decide(model.graph, load(device), target, "mixed")) == names


def test_an_option_stands_for_a_format_of_weights() -> None:
    model, _ = prepared(cnn(), torch.zeros(2, 3, 12, 12))
    decision = decide(model.graph, load("generic-x86"), "onnx", "mixed")
    grouped = replace(decision, plan=replace(decision.plan, weight=WeightFormat(4, 32)))
    assert form_of(grouped, "16") == HALF
    assert form_of(grouped, "8") == WeightFormat(8)
    assert form_of(grouped, "4") == WeightFormat(4, 32)


def test_the_layer_that_8_bits_break_is_the_one_that_16_bits_help_most() -> None:
    model, data = prepared(planted(), torch.zeros(2, 64))
    found = build_table(Builder(model, data), decide(model.graph, load("generic-x86"), "onnx", "mixed"))
    gain = dict(zip(found.layers, found.scores[:, found.options.index("16")], strict=True))
    assert min(gain, key=gain.__getitem__) == "2"
    assert gain["2"] < 10 * min(v for layer, v in gain.items() if layer != "2") < 0
    np.testing.assert_allclose(gain["2"], found.scores[1, found.options.index("float")], rtol=1e-2)
