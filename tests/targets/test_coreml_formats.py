"""Weights of few bits in Core ML packages: what they take on disk, what they compute, and which system reads them."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coreml import TARGET, job_of, run, weights
from torch import Tensor, nn

pytest.importorskip("coremltools")

from calibrate import qdq, steps
from calibrate.plan import Plan, WeightFormat
from calibrate.simulation import simulate
from calibrate.steps import Context
from targets import Job
from targets._coreml_weights import TABLE, cheapest, pack
from targets.errors import TargetError
from targets.mil.quantization import unpacked

IDS = torch.arange(20).view(2, 10) * 11 % 256
SHAPES = {"table": (256, 64), "conv": (64, 64, 3), "linear": (128, 64)}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.linear = nn.Embedding(256, 64), nn.Conv1d(64, 64, 3, padding=1), nn.Linear(64, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.table(ids).transpose(1, 2)))
        return self.linear(x.transpose(1, 2))


def stored(form: WeightFormat, compute: str = "float16", system: str = "iOS17", **plan: object) -> Job:
    """The three layers with their weights in this form, by the product's own steps."""
    torch.manual_seed(0)
    job = job_of(Layers(), (IDS,), ("ids",), ("y",), compute=compute, deployment_target=system)
    name = {"palette": "palettize", "int": "quantize_weights"}.get(form.kind, "quantize_float8")
    name = str(plan.pop("step", name))
    wish = Plan((name,), symmetric=True, weight=form, half_scales=compute == "float16", **plan)  # type: ignore[arg-type]
    steps.apply(name, job.graph, Context(wish, lambda: iter([[IDS]]), lambda: iter([[IDS]])))
    return job


def simulated(job: Job) -> np.ndarray:
    return simulate(job.graph, job.compute)([IDS])[0].numpy()


def lowered(job: Job, folder: Path) -> Path:
    TARGET.lower(job, folder / "layers.mlpackage")
    return folder / "layers.mlpackage"


def predicted(form: WeightFormat, bits: int, table: bool, number: int = 2) -> float:
    """Bytes from first principles: codes, then a scale or table per channel or group (one per tensor of a palette).

    Codes of fewer than 4 bits take 4 where their tables would cost more than they save.
    """
    total = 192.0 * number  # biases
    for shape in SHAPES.values():
        blocks = 1 if form.kind == "palette" else shape[0]
        if form.group and len(shape) == 2:
            blocks *= shape[1] // form.group
        size = math.prod(shape) * bits / 8 + blocks * number * (2**bits if table else 1)
        if form.kind == "int" and bits < 4:
            size = min(size, math.prod(shape) / 2 + blocks * number)
        total += size
    return total


BLOBS = 8  # two per weight and the biases; each has a header of 64 bytes and starts at a multiple of 64
CASES = [
    *[(WeightFormat(bits, kind="palette"), bits, True, f"{bits}-bit palette") for bits in (1, 2, 3, 4, 6, 8)],
    (WeightFormat(2), 2, True, "int2 weights"),
    (WeightFormat(3), 3, True, "int4 weights"),
    (WeightFormat(4), 4, False, "int4 weights"),
    (WeightFormat(8), 8, False, "int8 weights"),
    (WeightFormat(2, 32), 2, True, "int2 weights, groups of 32"),
    (WeightFormat(4, 32), 4, False, "int4 weights, groups of 32"),
    (WeightFormat(8, 32), 8, False, "int8 weights, groups of 32"),
]


@pytest.mark.parametrize(("form", "bits", "table", "name"), CASES, ids=[case[0].label for case in CASES])
def test_a_file_takes_what_its_bits_say_and_computes_what_the_simulation_computes(
    form: WeightFormat, bits: int, table: bool, name: str, tmp_path: Path
) -> None:
    job = stored(form)
    path = lowered(job, tmp_path)
    size, wanted = weights(path).stat().st_size, predicted(form, bits, table)
    assert wanted <= size <= 1.05 * wanted + 128 * BLOBS
    np.testing.assert_array_equal(run(path, {"ids": IDS})["y"], simulated(job))
    placed = TARGET.placement(path, job)
    later = "" if name == "int8 weights" or (form.kind == "palette" and bits != 3) else ", iOS18"
    assert placed.kinds[f"float16 linear ({name}{later})"] == 1
    assert placed.fallbacks == ()


@pytest.mark.parametrize("form", [WeightFormat(4, kind="palette"), WeightFormat(4, 32)], ids=["palette", "int4"])
def test_float32_programs_keep_tables_and_scales_in_float32(form: WeightFormat, tmp_path: Path) -> None:
    job = stored(form, "float32", "iOS18")
    path = lowered(job, tmp_path)
    wanted = predicted(form, 4, form.kind == "palette", number=4)
    assert wanted <= weights(path).stat().st_size <= 1.05 * wanted + 128 * BLOBS
    # the same float32 sums by another kernel: a few units in the last place of values up to 3
    np.testing.assert_allclose(run(path, {"ids": IDS})["y"], simulated(job), rtol=1e-5, atol=1e-5)


def test_palettes_have_the_form_of_the_system_and_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = lowered(stored(WeightFormat(6, kind="palette")), tmp_path / "old")
    new = lowered(stored(WeightFormat(6, kind="palette"), system="iOS18"), tmp_path / "new")
    assert shapes_of_indices(old) == {1}
    assert shapes_of_indices(new) == {2, 3}
    np.testing.assert_array_equal(run(old, {"ids": IDS})["y"], run(new, {"ids": IDS})["y"])


def shapes_of_indices(path: Path) -> set[int]:
    from targets.mil.reader import read_function

    operations = read_function(path).operations
    return {op.inputs["indices"].rank for op in operations if op.op_type == "constexpr_lut_to_dense"}


def test_one_changed_index_changes_the_outputs(tmp_path: Path) -> None:
    job = stored(WeightFormat(4, kind="palette"))
    path = lowered(job, tmp_path)
    changed = tmp_path / "changed.mlpackage"
    shutil.copytree(path, changed)
    data = bytearray(weights(changed).read_bytes())
    found = [n for n in job.graph.graph.nodes if n.target is qdq.LOOKUP][-1]
    indices = getattr(job.graph, str(found.args[0].target)).numpy()
    data[data.index(pack(indices, 4).tobytes())] ^= 0x0F
    weights(changed).write_bytes(bytes(data))
    assert not np.array_equal(run(changed, {"ids": IDS})["y"], simulated(job))


def test_a_profile_for_older_systems_is_raised_to_the_first_that_reads_the_weights(tmp_path: Path) -> None:
    job = stored(WeightFormat(8, kind="palette"), "float32", "iOS15")
    path = lowered(job, tmp_path)
    assert TARGET.placement(path, job).kinds["float32 conv (8-bit palette, iOS16)"] == 1
    np.testing.assert_allclose(run(path, {"ids": IDS})["y"], simulated(job), rtol=1e-5, atol=1e-5)


def test_layers_whose_weights_came_out_as_plain_numbers_are_named(tmp_path: Path) -> None:
    plain = job_of(Layers(), (IDS,), ("ids",), ("y",))
    path = lowered(plain, tmp_path)
    fallbacks = TARGET.placement(path, stored(WeightFormat(4, kind="palette"))).fallbacks
    assert {f.node for f in fallbacks} == {"embedding", "conv1d", "linear"}
    assert all("plain float numbers" in f.reason for f in fallbacks)


def test_static_activations_over_4_bit_weights_run_in_float_and_say_why(tmp_path: Path) -> None:
    four = stored(WeightFormat(4), step="quantize_static", quantize_inputs=frozenset({"linear"}))
    path = lowered(four, tmp_path)
    placed = TARGET.placement(path, four)
    assert placed.int8_ops == 0
    assert [(f.node, f.reason) for f in placed.fallbacks] == [
        ("linear", "runs as float16 linear: its weights are int4 weights, and the int8 kernels read int8 codes")
    ]
    eight = stored(WeightFormat(8), step="quantize_static", quantize_inputs=frozenset({"linear"}))
    (tmp_path / "eight").mkdir()
    placed = TARGET.placement(lowered(eight, tmp_path / "eight"), eight)
    assert (placed.int8_ops, placed.fallbacks) == (1, ())


def test_what_core_ml_has_no_type_for_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"holds 8-bit floats, for which Core ML has no type; use the recipe"):
        lowered(stored(WeightFormat(kind="float8_e4m3")), tmp_path)
    wide = stored(WeightFormat(8), step="quantize_static", activation="int16")
    with pytest.raises(TargetError, match=r"quantizes to int16, but activations in Core ML are int8 or uint8"):
        lowered(wide, tmp_path)
    palette = stored(WeightFormat(4, kind="palette"))
    table = next(n for n in palette.graph.graph.nodes if n.target is qdq.LOOKUP).args[1]
    setattr(palette.graph, str(table.target), torch.zeros(32))
    with pytest.raises(TargetError, match=r"a palette of 32 values; Core ML's have 2, 4, 8, 16, 64 or 256"):
        lowered(palette, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_codes_of_2_bits_are_a_table_only_where_that_is_smaller() -> None:
    long, short = torch.zeros(8, 64, dtype=torch.int8), torch.zeros(8, 9, dtype=torch.int8)
    assert cheapest(long, torch.ones(8), 2, half=True) == TABLE
    assert cheapest(short, torch.ones(8), 2, half=True) == 4
    assert cheapest(long, torch.ones(8), 4, half=True) == 4
    assert cheapest(long, torch.ones(8, 2), 6, half=True) == 8


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packed_indices_are_as_long_as_their_bits_and_come_back(bits: int, count: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = pack(indices, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    assert unpacked(torch.from_numpy(packed), bits, count).tolist() == indices.tolist()
