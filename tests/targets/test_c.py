"""The target `c`: its sources compile, and compute to the bit what the simulation computes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from c_graphs import MACHINES, Residual, c_job, int8_job, lowered, one_bit_everywhere, run, simulation
from tflite_graphs import batch, capture, make_dynamic, quantize, store_codes, store_halves
from torch import Tensor, nn

from calibrate import graph as graphs
from targets import Job
from targets._c_placement import calls
from targets._c_program import Program, Store
from targets._c_session import build
from targets.c import TARGET
from targets.errors import MissingRuntime, TargetError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: what the sources compute is unknown")
IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def made(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*IMAGE.shape, generator=generator) * 2 for _ in range(count)]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    case = int8_job(made(Residual), IMAGE)
    return case, lowered(case, tmp_path_factory.mktemp("int8"))


def test_a_static_int8_network_equals_the_simulation_bit_for_bit(int8: tuple[Job, Path]) -> None:
    case, path = int8
    session, reference = TARGET.open(path), simulation(case)
    for image in images(16):
        np.testing.assert_array_equal(session.run(batch(image))["result0"], reference((image,))[0].numpy(), strict=True)


def test_equality_would_notice_one_code_of_one_weight(int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    copy = shutil.copytree(path, tmp_path / path.name)
    text = (copy / "weights.h").read_text()
    place = text.index("{\n", text.index("int8_t codes")) + 2
    first = text[place : text.index(",", place)]
    (copy / "weights.h").write_text(text[:place] + str(-int(first) - 1) + text[place + len(first) :])
    assert not np.array_equal(run(copy, IMAGE), simulation(case)((IMAGE,))[0].numpy())


@pytest.mark.parametrize("bits", [4, 2])
def test_weights_of_few_bits_are_packed_and_exact(bits: int, int8: tuple[Job, Path], tmp_path: Path) -> None:
    case = int8_job(made(Residual), IMAGE, bits)
    path = lowered(case, tmp_path)
    np.testing.assert_array_equal(run(path, IMAGE), simulation(case)((IMAGE,))[0].numpy())
    assert constant_bytes(path) < constant_bytes(int8[1]) * 0.8
    assert TARGET.placement(path, case).kinds[f"int8-w{bits} linear"] == 1


def test_one_bit_weights_with_int8_activations_are_exact(tmp_path: Path) -> None:
    case = c_job(one_bit_everywhere(quantize(capture(made(Residual), IMAGE), IMAGE)), IMAGE)
    path = lowered(case, tmp_path)
    session, reference = TARGET.open(path), simulation(case)
    for image in images(4):
        np.testing.assert_array_equal(session.run(batch(image))["result0"], reference((image,))[0].numpy())
    assert TARGET.placement(path, case).kinds["int8-w1 conv"] == 3


def constant_bytes(path: Path) -> int:
    return int(json.loads((path / "manifest.json").read_text())["constant_bytes"])


@pytest.mark.parametrize("machine", MACHINES)
def test_every_processor_gives_the_same_bits(machine: str, int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    samples = images(3)
    wanted = np.stack([simulation(case)((s,))[0].numpy().reshape(-1) for s in samples])
    found = MACHINES[machine].outputs(path, [s.numpy() for s in samples], tmp_path)
    np.testing.assert_array_equal(found, wanted, strict=True)


def test_the_makefile_builds_a_driver_that_gives_the_sessions_outputs(int8: tuple[Job, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(int8[1], tmp_path / "m.cnet")
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CFLAGS", "ARCH")}
    subprocess.run(["make", "-C", str(copy)], check=True, capture_output=True, env=environment)
    done = subprocess.run([copy / "driver"], input=IMAGE.numpy().tobytes(), capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32).reshape(2, 5), run(int8[1], IMAGE))


def test_the_sources_are_strict_c99_and_allocate_nothing(int8: tuple[Job, Path], tmp_path: Path) -> None:
    build(int8[1], tmp_path / "m.so", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wno-overlength-strings")
    sources = "".join(p.read_text() for p in int8[1].glob("*.[ch]") if p.name != "driver.c")
    assert not [word for word in ("malloc", "calloc", "alloca(", "printf") if word in sources]


def test_reading_and_writing_stay_within_the_static_memory(int8: tuple[Job, Path], tmp_path: Path) -> None:
    """A build with AddressSanitizer stops at the first access beside an array, the arena or scratch."""
    program = tmp_path / "driver"
    try:
        build(int8[1], program, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", driver=True)
    except TargetError:
        pytest.skip("this compiler has no sanitizers: the bounds were not checked")
    done = subprocess.run([program], input=IMAGE.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_same_job_same_bytes(int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    again = lowered(case, tmp_path)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in path.iterdir()}


def test_placement_is_read_from_the_sources(int8: tuple[Job, Path], tmp_path: Path) -> None:
    case, path = int8
    placement = TARGET.placement(path, case)
    assert placement.fallbacks == ()
    assert (placement.int8_ops, placement.float_ops, placement.conversions) == (8, 0, 2)
    copy = shutil.copytree(path, tmp_path / path.name)
    text = (copy / "model.c").read_text()
    (copy / "model.c").write_text(text.replace("tf_conv_i8(", "tf_conv_f32("))
    wanted = [c.layer for c in calls(path) if c.kernel == "tf_conv_i8"]
    assert [f.node for f in TARGET.placement(copy, case).fallbacks] == wanted


def test_a_layer_whose_output_stays_float_is_still_a_kernel_of_codes(tmp_path: Path) -> None:
    case = int8_job(made(Residual), IMAGE)
    linear = next(n for n in case.graph.graph.nodes if graphs.kind(n) == "linear")
    next(n for n in case.graph.graph.nodes if n.op == "output").args = ((linear,),)
    graphs.finish(case.graph)
    np.testing.assert_array_equal(run(lowered(case, tmp_path), IMAGE), simulation(case)((IMAGE,))[0].numpy())


def test_a_bias_of_its_own_precision_is_added_after_the_scale(tmp_path: Path) -> None:
    case = int8_job(made(Residual), IMAGE)
    conv = next(n for n in case.graph.graph.nodes if graphs.kind(n) == "conv")
    graphs.constant(case.graph, conv.args[2]).mul_(1.0003)
    np.testing.assert_array_equal(run(lowered(case, tmp_path), IMAGE), simulation(case)((IMAGE,))[0].numpy())


def test_values_that_live_at_the_same_time_share_no_memory() -> None:
    program = Program("p")
    first, second = program.tensor((100,), "float"), program.tensor((60,), "int8_t")
    program.call("k", first, second, layer="a")
    third = program.tensor((90,), "float")
    program.call("k", second, third, layer="b")
    program.outputs.append(("y", third))
    program.plan_memory()
    homes = [t.home for t in (first, second, third) if isinstance(t.home, Store)]
    assert homes[0].offset == homes[2].offset == 0  # the third takes the first one's place
    assert homes[1].offset >= 400
    assert program.arena == homes[1].offset + 60


class Text(nn.Module):
    """Token ids and a mask in, a pooled embedding out: what a small encoder is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(200, 32), nn.Embedding(8, 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        n, t = ids.shape
        h = self.norm(self.tokens(ids) + self.positions(torch.arange(t)[None]))
        q, k, v = self.qkv(h).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = nn.functional.gelu(h + self.out(y.transpose(1, 2).reshape(n, t, 32)))
        weight = mask[..., None].float()
        return (h * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


TOKENS = (torch.arange(8)[None] * 7, torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]))


@pytest.mark.parametrize("form", ["float32", "float16 weights", "4-bit weights", "4-bit groups"])
def test_an_encoder_in_float_stays_within_rounding(form: str, tmp_path: Path) -> None:
    graph = capture(made(Text), *TOKENS)
    for node in [n for n in graph.graph.nodes if graphs.kind(n) in ("linear", "embedding")]:
        table = graphs.kind(node) == "embedding"
        if table and not graphs.is_table(node, graphs.constant_made(graph.graph.nodes)):
            continue
        if form == "float16 weights":
            store_halves(graph, node, 0 if table else 1)
        elif form.startswith("4-bit"):
            store_codes(graph, node, 0 if table else 1, 4, 16 if form.endswith("groups") else None)
    case = c_job(graphs.finish(graph), *TOKENS)
    path = lowered(case, tmp_path)
    wanted = simulation(case)(TOKENS)[0].numpy()
    # Sums of up to 32 products in another order, and libm's functions: 1e-5 of the largest output.
    np.testing.assert_allclose(run(path, *TOKENS), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    assert TARGET.placement(path, case).fallbacks == ()


def test_a_float_convolutional_network_stays_within_rounding(tmp_path: Path) -> None:
    case = c_job(capture(made(Residual), IMAGE), IMAGE)
    wanted = graphs.run(case.graph, (IMAGE,))[0].numpy()
    np.testing.assert_allclose(run(lowered(case, tmp_path), IMAGE), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_what_has_no_kernel_is_refused_by_name(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)

    with pytest.raises(TargetError, match=r"no kernel for cumsum .*--target onnx"):
        TARGET.lower(c_job(capture(Recurrent(), IMAGE), IMAGE), tmp_path / "a")
    with pytest.raises(TargetError, match=r"at run time.*--recipe int8"):
        TARGET.lower(c_job(make_dynamic(capture(made(Residual), IMAGE)), IMAGE), tmp_path / "b")
    with pytest.raises(TargetError, match="int16 codes"):
        TARGET.lower(c_job(quantize(capture(made(Residual), IMAGE), IMAGE, wide=True), IMAGE), tmp_path / "c")
    assert not (tmp_path / "a").exists()


def test_without_a_compiler_the_message_says_what_to_install(
    int8: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingRuntime, match="Install gcc or clang"):
        TARGET.open(int8[1])
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingRuntime, match="CC is 'no-such-compiler'"):
        TARGET.open(int8[1])


def test_a_broken_artifact_is_a_target_error(int8: tuple[Job, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(int8[1], tmp_path / "m.cnet")
    (copy / "weights.h").write_text((copy / "weights.h").read_text()[:1000])
    with pytest.raises(TargetError, match="does not compile"):
        TARGET.open(copy)
    (copy / "manifest.json").write_text(
        '{"version": 1, "name": "m", "sources": ["../m.c"], "inputs": [], "outputs": []}'
    )
    with pytest.raises(TargetError, match="outside its folder"):
        TARGET.open(copy)
    with pytest.raises(TargetError, match="no readable manifest"):
        TARGET.open(tmp_path / "nothing")
