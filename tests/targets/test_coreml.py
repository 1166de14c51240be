"""The Core ML target: packages written, read back from disk, and run by the reference executor."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coreml_models import cases
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("coremltools")

from calibrate import qdq
from calibrate.graph import constant
from calibrate.samples import InputSpec
from targets import Job, artifact_bytes, find
from targets._coreml_graph import MASKED, finite_masks
from targets.errors import TargetError
from targets.mil import OPERATORS, Program, coremltools, quiet

TARGET = find("coreml")
aten = torch.ops.aten

# float32: another order of the same sums, values below 30. float16: 2^-11 relative per operator, over up to 60 of them
TOLERANCE = {"float32": 1e-5, "float16": 2e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(
    model: nn.Module, examples: tuple[Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], **changes: object
) -> Job:
    graph = torch.export.export(model.eval(), examples).module()
    specs = tuple(
        InputSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), dynamic_batch=False)
        for name, t in zip(inputs, examples, strict=True)
    )
    rules = SimpleNamespace(
        deployment_target=changes.pop("deployment_target", "iOS17"), quantize_inputs=("conv", "linear", "add")
    )
    return Job("model", graph, specs, outputs, rules, **changes)  # type: ignore[arg-type]


def case_job(name: str, compute: str = "float32", deployment_target: str = "iOS17") -> tuple[Job, dict[str, Tensor]]:
    factory, examples, inputs, outputs = cases()[name]
    torch.manual_seed(0)
    job = job_of(factory(), examples, inputs, outputs, compute=compute, deployment_target=deployment_target)
    return job, dict(zip(inputs, examples, strict=True))


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return TARGET.open(path).run({name: t.numpy() for name, t in inputs.items()})


def reference(job: Job, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        results = job.graph(*inputs.values())
    results = results if isinstance(results, tuple) else (results,)
    return {name: r.numpy() for name, r in zip(job.outputs, results, strict=True)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance)


def digests(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Lower one of the models, once for all tests that only read the package."""

    @cache
    def lowered(name: str, compute: str = "float32") -> Path:
        path = tmp_path_factory.mktemp(name) / f"{name}.mlpackage"
        job, _ = case_job(name, compute) if name in cases() else quantized(name, compute)
        TARGET.lower(job, path)
        return path

    return lowered


SLOW = pytest.mark.slow
EVERY = [(name, "float32") for name in cases()] + [("encoder", "float16")]
REST = [pytest.param(name, "float16", marks=SLOW) for name in cases() if name != "encoder"]


@pytest.mark.parametrize(("name", "compute"), [*EVERY, *REST])
def test_a_package_computes_what_the_graph_computes(name: str, compute: str, package: Callable[..., Path]) -> None:
    job, inputs = case_job(name, compute)
    path = package(name, compute)
    assert_same(run(path, inputs), reference(job, inputs), TOLERANCE[compute])
    assert set(Program.load(path).operators) <= set(OPERATORS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays behind


@pytest.mark.parametrize("deployment_target", [pytest.param("iOS15", marks=pytest.mark.slow), "iOS18"])
def test_other_systems_get_other_operators_and_the_same_numbers(deployment_target: str, tmp_path: Path) -> None:
    job, inputs = case_job("encoder", deployment_target=deployment_target)
    TARGET.lower(job, tmp_path / "a.mlpackage")
    assert_same(run(tmp_path / "a.mlpackage", inputs), reference(job, inputs), TOLERANCE["float32"])
    fused = "scaled_dot_product_attention" in Program.load(tmp_path / "a.mlpackage").operators
    assert fused == (deployment_target == "iOS18")


class Layers(nn.Module):
    """One of each layer that vision models use beside those of coreml_models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv1d(4, 6, 3, dilation=2), nn.Conv3d(1, 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=2)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.layer, self.prelu = nn.LayerNorm([6, 6]), nn.PReLU(4)
        self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.response = nn.LocalResponseNorm(3)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        f = nn.functional
        sizes = (
            f.interpolate(x, size=(9, 5), mode="nearest").sum() + f.interpolate(x, size=(9, 5), mode="bilinear").sum()
        )
        pooled = f.adaptive_avg_pool2d(x, 2).sum() + f.max_pool2d(x, 3, 2, 1).sum() + f.avg_pool2d(x, 2, 1, 1).sum()
        padded = f.pad(x, (1, 2, 0, 1), mode="reflect").sum() + f.pad(x, (1, 2, 0, 1), mode="replicate").mul(2).sum()
        normed = self.prelu(self.layer(self.group(x)) + self.instance(x) + self.response(x))
        sequence, _ = self.rnn(x[:, 0])
        picked = torch.gather(x, 3, index) + torch.einsum("nchw,ncwk->nchk", x, x)
        added = torch.zeros(1, 4, 6, 6).scatter_add(3, index, x).cumsum(2)
        shuffled = f.pixel_shuffle(x, 2).flip(-1)
        return (
            self.conv1(x[:, :, 0]), self.conv3(x[:, None, :3]), self.up(x), normed, sequence, picked, added, shuffled,
            torch.stack([sizes, pooled, padded]), torch.sort(x, -1)[0], torch.tril(x) + x.clamp(-0.5, 0.5).sign(),
        )  # fmt: skip


def test_one_of_each_layer_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, index = torch.randn(1, 4, 6, 6), torch.randint(0, 6, (1, 4, 6, 6))
    job = job_of(Layers(), (x, index), ("x", "index"), tuple(f"y{i}" for i in range(11)))
    TARGET.lower(job, tmp_path / "layers.mlpackage")
    inputs = {"x": x, "index": index}
    # sums over up to 144 elements of another order: 1e-4 of values up to 100
    assert_same(run(tmp_path / "layers.mlpackage", inputs), reference(job, inputs), 1e-4)


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x) + x)
        return self.head(x.mean((2, 3)))


def quantized(kind: str, compute: str = "float32") -> tuple[Job, dict[str, Tensor]]:
    """A residual CNN whose layers are quantized as `kind` says: static, weights, float16, or float32 (not at all)."""
    torch.manual_seed(1)
    x = torch.randn(1, 3, 8, 8)
    job = job_of(Quantizable(), (x,), ("image",), ("logits",), compute=compute)
    graph = job.graph.graph
    for node in list(graph.nodes):
        if kind != "float32" and node.target in (aten.conv2d.default, aten.linear.default):
            _store_weight(job.graph, node, kind)
        if kind == "static" and node.target in (aten.conv2d.default, aten.linear.default, aten.add.Tensor):
            count = 2 if node.target is aten.add.Tensor else 1
            node.args = (*(_fake(job.graph, a) for a in node.args[:count]), *node.args[count:])
    graph.eliminate_dead_code()
    job.graph.recompile()
    if kind == "static":  # the sum is quantized where its reader is: behind the relu
        _requantize_relus(job.graph)
    return job, {"image": x}


def _requantize_relus(module: torch.fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.relu.default:
            users = [user for user in node.users if user.target is not qdq.QUANTIZE]
            if users:
                fake = _fake(module, node)
                for user in users:
                    user.replace_input_with(node, fake)
    module.recompile()


def _fake(module: torch.fx.GraphModule, node: torch.fx.Node) -> torch.fx.Node:
    if node.target is qdq.DEQUANTIZE:
        return node
    found = [u for u in node.users if u.target is qdq.QUANTIZE]
    if found:
        return next(iter(found[0].users))
    parameters = (float(np.float32(0.031)), 0, -128, 127, torch.int8)
    with module.graph.inserting_after(node):
        codes = module.graph.call_function(qdq.QUANTIZE, (node, *parameters))
    with module.graph.inserting_after(codes):
        return module.graph.call_function(qdq.DEQUANTIZE, (codes, *parameters))


def _store_weight(module: torch.fx.GraphModule, layer: torch.fx.Node, kind: str) -> None:
    weight = module.get_parameter(str(layer.args[1].target)).detach()
    graph, name = module.graph, layer.name
    with graph.inserting_before(layer):
        if kind == "float16":
            module.register_buffer(f"{name}_half", weight.half())
            stored = graph.call_function(aten.to.dtype, (graph.get_attr(f"{name}_half"), torch.float32))
        else:
            scales = weight.flatten(1).abs().amax(1) / 127
            codes = torch.round(weight / scales.view(-1, *[1] * (weight.ndim - 1))).to(torch.int8)
            for suffix, value in (("codes", codes), ("scales", scales), ("zeros", torch.zeros(len(scales)).long())):
                module.register_buffer(f"{name}_{suffix}", value)
            sources = [graph.get_attr(f"{name}_{suffix}") for suffix in ("codes", "scales", "zeros")]
            stored = graph.call_function(qdq.DEQUANTIZE_CHANNEL, (*sources, 0, -127, 127, torch.int8))
    layer.args = (layer.args[0], stored, *layer.args[2:])


def test_static_int8_matches_the_simulation_to_the_bit_and_is_placed_in_int8(package: Callable[..., Path]) -> None:
    job, inputs = quantized("static")
    path = package("static")
    expected = reference(job, inputs)
    np.testing.assert_array_equal(run(path, inputs)["logits"], expected["logits"])
    placed = TARGET.placement(path, job)
    assert placed.kinds == {"float32 reduce_mean": 1, "int8 add": 1, "int8 conv": 2, "int8 linear": 1}
    assert (placed.int8_ops, placed.float_ops) == (4, 1)
    assert placed.conversions == Program.load(path).operators["quantize"] + Program.load(path).operators["dequantize"]
    assert placed.fallbacks == ()


def test_float16_compute_keeps_the_layers_names_and_their_placement(package: Callable[..., Path]) -> None:
    job, inputs = quantized("static", "float16")
    path = package("static", "float16")
    placed = TARGET.placement(path, job)
    assert placed.int8_ops == 4
    assert placed.fallbacks == ()
    # a code that float16 rounds to its neighbour moves the logits by about one step of 0.031
    np.testing.assert_allclose(run(path, inputs)["logits"], reference(job, inputs)["logits"], atol=0.07)


def test_a_quantized_layer_that_came_out_float_is_named(package: Callable[..., Path]) -> None:
    job, _ = quantized("static")
    fallbacks = {f.node: f.reason for f in TARGET.placement(package("weights"), job).fallbacks}
    assert set(fallbacks) == {"conv2d", "conv2d_1", "add", "linear"}
    assert "not from 'dequantize'" in fallbacks["conv2d_1"]


def test_int8_weights_are_stored_as_bytes_and_are_no_fallback(package: Callable[..., Path]) -> None:
    job, inputs = quantized("weights")
    path = package("weights")
    assert_same(run(path, inputs), reference(job, inputs), TOLERANCE["float32"])
    placed = TARGET.placement(path, job)
    assert placed.kinds["float32 conv (int8 weights)"] == 2
    assert (placed.int8_ops, placed.conversions, placed.fallbacks) == (0, 0, ())
    assert job.graph.conv2d_1_codes.numpy().tobytes() in weights(path).read_bytes()


def test_float16_weights_are_stored_as_float16_and_computed_in_float32(package: Callable[..., Path]) -> None:
    job, inputs = quantized("float16")
    path = package("float16")
    assert_same(run(path, inputs), reference(job, inputs), TOLERANCE["float32"])
    assert TARGET.placement(path, job).kinds["float32 conv (float16 weights)"] == 2
    assert artifact_bytes(weights(path).parent) < 0.62 * artifact_bytes(weights(package("float32")).parent)


def weights(path: Path) -> Path:
    return path / "Data/com.apple.CoreML/weights/weight.bin"


def test_one_changed_byte_of_a_weight_changes_the_outputs(package: Callable[..., Path], tmp_path: Path) -> None:
    job, inputs = quantized("weights")
    path = tmp_path / "weights.mlpackage"
    shutil.copytree(package("weights"), path)
    data = bytearray(weights(path).read_bytes())
    data[data.index(job.graph.linear_codes.numpy().tobytes())] ^= 0x40
    weights(path).write_bytes(bytes(data))
    with pytest.raises(AssertionError):
        assert_same(run(path, inputs), reference(job, inputs), TOLERANCE["float32"])


def test_the_same_job_gives_the_same_bytes(package: Callable[..., Path], tmp_path: Path) -> None:
    TARGET.lower(quantized("static", "float16")[0], tmp_path / "again.mlpackage")
    first = digests(package("static", "float16"))
    assert len(first) == 3
    assert first == digests(tmp_path / "again.mlpackage")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_with_another_hash_seed_gives_the_same_bytes(seed: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = (
        "import sys; from pathlib import Path; from test_coreml import TARGET, case_job, quantized\n"
        "TARGET.lower(case_job('encoder')[0], Path(sys.argv[1]) / 'encoder.mlpackage')\n"
        "TARGET.lower(quantized('static')[0], Path(sys.argv[1]) / 'static.mlpackage')\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{here}:{here.parent.parent}"}
    (tmp_path / "child").mkdir()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "child")], env=environment, check=True)
    TARGET.lower(case_job("encoder")[0], tmp_path / "encoder.mlpackage")
    TARGET.lower(quantized("static")[0], tmp_path / "static.mlpackage")
    for name in ("encoder", "static"):
        assert digests(tmp_path / f"{name}.mlpackage") == digests(tmp_path / "child" / f"{name}.mlpackage")


def test_nothing_of_this_machine_reaches_the_package(package: Callable[..., Path]) -> None:
    content = b"".join(p.read_bytes() for p in package("cnn").rglob("*") if p.is_file())
    assert str(Path(__file__).parent).encode() not in content
    assert b"conversion_date" not in content


class Named(nn.Module):
    def forward(self, x: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.where(flags, x, -x), flags, x


def test_names_that_core_ml_cannot_bear_come_back_as_they_were(tmp_path: Path) -> None:
    x, flags = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    job = job_of(Named(), (x, flags), ("input.1", "2"), ("out:0", "flags", "same"))
    TARGET.lower(job, tmp_path / "named.mlpackage")
    outputs = run(tmp_path / "named.mlpackage", {"input.1": x, "2": flags})
    assert {name: value.tolist() for name, value in outputs.items()} == {
        "out:0": [[1.0, -2.0]],
        "flags": [[1, 0]],
        "same": [[1.0, 2.0]],
    }


def test_a_session_says_what_it_is(package: Callable[..., Path]) -> None:
    _, inputs = case_job("cnn")
    session = TARGET.open(package("cnn"), threads=1)
    if sys.platform == "darwin":
        pytest.skip("Core ML itself runs here")
    assert session.executor == f"MIL reference executor (torch {torch.__version__}), not Core ML"
    assert not session.measures_latency
    session.bind({"image": inputs["image"].numpy()})()
    with pytest.raises(TargetError, match="takes \\['image'\\], not \\['picture'\\]"):
        session.run({"picture": inputs["image"].numpy()})
    with pytest.raises(TargetError, match="has the shape \\(2, 3\\)"):
        session.run({"image": np.zeros((2, 3), np.float32)})


class Additive(nn.Module):
    """Attention scores under a mask that hides one row throughout."""

    def forward(self, scores: Tensor, keep: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        return (scores + torch.zeros(1, 3, 3).masked_fill(keep == 0, lowest)).softmax(-1)


def test_a_wholly_masked_row_stays_finite_in_float16(tmp_path: Path) -> None:
    scores, keep = torch.randn(1, 3, 3), torch.tensor([[[1, 1, 0], [0, 0, 0], [1, 0, 0]]])
    job = job_of(Additive(), (scores, keep), ("scores", "keep"), ("shares",), compute="float16")
    TARGET.lower(job, tmp_path / "mask.mlpackage")
    shares = run(tmp_path / "mask.mlpackage", {"scores": scores, "keep": keep})["shares"]
    expected = reference(job, {"scores": scores, "keep": keep})["shares"]
    np.testing.assert_allclose(shares[:, [0, 2]], expected[:, [0, 2]], atol=2e-3)
    assert np.isfinite(shares).all()


class FilledZeros(nn.Module):
    """Zeros like a bool mask, filled: an additive mask whose dtype is not its model's; a pool without a stride."""

    def forward(self, scores: Tensor, keep: Tensor) -> Tensor:
        hidden = keep == 0
        mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        return F.max_pool2d(F.scaled_dot_product_attention(scores, scores, scores, mask)[:, None], 2)


def test_a_mask_made_by_zeros_like_hides_what_it_should_and_not_the_rest(tmp_path: Path) -> None:
    scores, keep = torch.randn(1, 4, 4), torch.tensor([[[1, 1, 1, 0]]]).expand(1, 4, 4).contiguous()
    job = job_of(FilledZeros(), (scores, keep), ("scores", "keep"), ("mixed",))
    TARGET.lower(job, tmp_path / "mask.mlpackage")
    inputs = {"scores": scores, "keep": keep}
    assert_same(run(tmp_path / "mask.mlpackage", inputs), reference(job, inputs), 1e-5)


def test_finite_masks_replaces_what_float16_cannot_hold_and_nothing_else() -> None:
    module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    module.register_buffer("mask", torch.tensor([0.0, float("-inf"), -1e30, -5e4, 1e30]))
    mask = module.graph.get_attr("mask")
    clamp = module.graph.call_function(aten.clamp.default, (mask, -1e30))
    filled = module.graph.call_function(aten.masked_fill.Scalar, (clamp, mask, -1e30))
    module.graph.output((filled,))
    finite_masks(module)
    replaced = constant(module, clamp.args[0])
    torch.testing.assert_close(replaced, torch.tensor([0.0, MASKED, MASKED, -5e4, 1e30]))
    assert clamp.args[1] == -1e30
    assert filled.args[2] == MASKED


def test_dynamic_quantization_is_refused_with_a_way_out(tmp_path: Path) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes = torch.ones(4, 4, dtype=torch.int8)
            return torch.ops.tightfit.dynamic_linear(x, codes, torch.ones(4), None, "row_int8")

    job = job_of(Dynamic(), (torch.randn(1, 4),), ("x",), ("y",))
    with pytest.raises(TargetError, match=r"'dynamic_linear' is quantized dynamically.*int8-weights"):
        TARGET.lower(job, tmp_path / "x.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_codes_of_a_narrower_range_are_refused(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes = qdq.QUANTIZE(x, 0.5, 0, -8, 7, torch.int8)
            return qdq.DEQUANTIZE(codes, 0.5, 0, -8, 7, torch.int8)

    job = job_of(Narrow(), (torch.randn(1, 4),), ("x",), ("y",))
    with pytest.raises(TargetError, match="quantizes to \\[-8, 7\\]"):
        TARGET.lower(job, tmp_path / "x.mlpackage")


def test_what_coremltools_cannot_convert_is_named_by_layer_and_operator(tmp_path: Path) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x + 1.0)[1] * 2.0

    job = job_of(Inverse(), (torch.eye(3)[None],), ("x",), ("y",))
    with pytest.raises(TargetError, match=r"layer '.*svd.*' \(operator .*svd.*\)"):
        TARGET.lower(job, tmp_path / "x.mlpackage")


def test_an_operator_the_executor_lacks_is_refused_by_name() -> None:
    coremltools()
    from coremltools.converters.mil.mil import Builder

    with quiet():
        program = Builder.program(input_specs=[Builder.TensorSpec((2, 3))])(
            lambda x: Builder.add(x=x, y=Builder.random_uniform(shape=(2, 3)))
        )
    with pytest.raises(TargetError, match="does not know random_uniform"):
        Program(program.functions["main"])


def test_a_damaged_package_is_refused(package: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "cnn.mlpackage"
    shutil.copytree(package("cnn"), path)
    model = path / "Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(model.read_bytes()[:500])
    with pytest.raises(TargetError, match=r"cnn\.mlpackage"):
        TARGET.open(path)
    with pytest.raises(TargetError, match="no Manifest"):
        TARGET.open(tmp_path / "absent.mlpackage")
