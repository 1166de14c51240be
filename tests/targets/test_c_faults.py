"""Faults in C sources change the numbers they say, and a run notices each of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from c_graphs import Binary, Residual, binary_graph, c_job, int8_job, lowered, run

from targets import faults
from targets.errors import TargetError
from targets.faults.c import weights

IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = ("conv2d_1", "conv2d_2", "linear")
    return lowered(c_job(binary_graph(Binary(70), IMAGE, layers), IMAGE), tmp_path_factory.mktemp("binary"))


def test_weights_are_found_in_the_order_of_layers_with_their_scales(artifact: Path, tmp_path: Path) -> None:
    found = weights(artifact)
    assert [w.name for w in found] == ["conv2d", "conv2d_1", "conv2d_2", "linear"]
    assert [w.scale is not None for w in found] == [False, True, True, True]
    torch.manual_seed(0)
    np.testing.assert_array_equal(
        found[0].values.read(), Binary(70).stem.weight.detach().permute(0, 2, 3, 1).reshape(70, -1).numpy()
    )
    case = int8_job(Residual().eval(), torch.randn(1, 3, 12, 12))
    codes = weights(lowered(case, tmp_path))[0].values.read()
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == 127


def test_each_fault_in_weights_changes_one_array_and_nothing_else(artifact: Path, tmp_path: Path) -> None:
    for name in ("flipped-bit", "permuted-channels", "scaled-weight", "not-a-number"):
        copy = shutil.copytree(artifact, tmp_path / name)
        said = faults.find("c")[name](copy)
        before, after = weights(artifact), weights(copy)
        changed = [
            a.name
            for a, b in zip(before, after, strict=True)
            if not np.array_equal(a.values.read(), b.values.read(), equal_nan=a.values.is_float)
            or (a.scale and b.scale and not np.array_equal(a.scale.read(), b.scale.read(), equal_nan=True))
        ]
        assert len(changed) == 1, said
        assert changed[0] in said
        rest = [p.name for p in copy.iterdir() if p.read_bytes() != (artifact / p.name).read_bytes()]
        assert rest == ["weights.h"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: whether a run notices was not checked")
@pytest.mark.parametrize("name", ["permuted-channels", "scaled-weight", "not-a-number", "truncated-file"])
def test_a_run_notices(name: str, artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / artifact.name)
    faults.find("c")[name](copy)
    if name == "truncated-file":
        with pytest.raises(TargetError, match="does not compile"):
            run(copy, IMAGE)
    else:
        assert not np.array_equal(run(copy, IMAGE), run(artifact, IMAGE))


def test_what_is_no_artifact_is_a_target_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no folder of Tightfit"):
        faults.find("c")["scaled-weight"](tmp_path)
