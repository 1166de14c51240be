"""The target `c` on emulated boards: compiled here, loaded there, the same bits, and its instructions counted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_jobs import local
from c_graphs import Binary, Residual, binary_graph, c_job, int8_job, lowered, simulation
from emulated_boards import counting

from convert.errors import TightfitError
from convert.on_device import refuse_unreachable
from targets import _c_cross
from targets._c_cross import Processor, cross_compiler
from targets.agent.c_session import CSession
from targets.agent.problems import Problem
from targets.errands import Answer, Errand, carry_out
from targets.errors import MissingRuntime
from targets.transports import opened

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: nothing was run elsewhere")
LAYERS = ("conv2d_1", "conv2d_2", "linear")
IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def carried(case, path: Path, board: str | None, count: int = 3) -> tuple[Answer, np.ndarray]:
    """What came back for three images, and what the simulation computes."""
    images = [torch.randn(*IMAGE.shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    wanted = np.concatenate([simulation(case)((x,))[0].numpy() for x in images])
    name = case.inputs[0].name
    errand = Errand(path, None, {name: np.concatenate([x.numpy() for x in images])}, 1, count=count)
    if board is None:
        return local(errand), wanted
    counting(board)
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("aarch64-linux-gnu-gcc is not installed: nothing was compiled for the board")
    with opened(f"emulated:{board}") as transport:
        return carry_out(transport, errand, lambda *_: None), wanted


def binary_job():
    torch.manual_seed(0)
    return c_job(binary_graph(Binary(70), IMAGE, LAYERS), IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize(("board", "dots"), [("raspberry-pi-4b", False), ("raspberry-pi-5", True)])
def test_int8_layers_are_exact_there_and_use_dot_products_where_the_core_has_them(
    board: str, dots: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    case = int8_job(Residual().eval(), IMAGE)
    answer, wanted = carried(case, lowered(case, tmp_path), board)
    np.testing.assert_array_equal(answer.artifact.outputs["result0"], wanted)
    assert len(answer.artifact.counts) == 3
    assert all((c["dot"] > 0) is dots and c["all"] > c["simd"] > 0 for c in answer.artifact.counts)


@pytest.mark.slow
def test_layers_of_signs_are_exact_there_and_their_count_repeats(tmp_path: Path) -> None:
    case = binary_job()
    answer, wanted = carried(case, lowered(case, tmp_path), "raspberry-pi-4b")
    np.testing.assert_array_equal(answer.artifact.outputs["result0"], wanted)
    counts = [c["all"] for c in answer.artifact.counts]
    assert max(counts) - min(counts) <= 2000  # Python's own, between the marks


def test_this_machine_runs_a_folder_of_sources_as_an_errand(tmp_path: Path) -> None:
    case = binary_job()
    answer, wanted = carried(case, lowered(case, tmp_path), None)
    np.testing.assert_array_equal(answer.artifact.outputs["result0"], wanted)
    assert answer.artifact.executor.startswith("C99 compiled by ")


def test_where_the_processor_is_not_known_the_refusal_says_to_build_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from targets.transports.local import LocalTransport

    monkeypatch.setattr(LocalTransport, "processor", None)
    with pytest.raises(TightfitError, match="run `make`"):
        refuse_unreachable(["local"], [".cnet"])
    refuse_unreachable(["local"], [".cnet", ".onnx"])  # the other artifact runs


def test_a_missing_cross_compiler_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_c_cross.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingRuntime, match="apt-get install gcc-aarch64-linux-gnu"):
        cross_compiler(Processor("aarch64", "cortex-a72"))


def test_a_library_that_does_not_load_is_a_problem_in_words(tmp_path: Path) -> None:
    (tmp_path / "artifact.so").write_bytes(b"\x7fELF, but nothing more")
    with pytest.raises(Problem, match="does not load there"):
        CSession(tmp_path / "artifact.so", {"inputs": "[]", "outputs": "[]", "compiler": "gcc 1"})
    with pytest.raises(Problem, match="without a description"):
        CSession(tmp_path / "artifact.so", {})
