"""A `.pt2` from anybody: what is read, what is refused, and that nothing in a refused one runs."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrate.graph import run
from calibrate.samples import InputSpec
from convert.capture import capture
from convert.capture_archive import load_program
from convert.errors import TightfitError


class Small(nn.Module):
    """An in-place operator, a buffer, a constant, two outputs by name, any batch and any length."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        y = self.fc(x).relu_() * self.scale
        return {"tokens": y, "mean": (y * mask.unsqueeze(-1)).sum(1) / torch.tensor(7.0)}


def program(length: int | None = 5) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    model = Small().eval()
    batch = torch.export.Dim("batch")
    axes = {0: batch} if length else {0: batch, 1: torch.export.Dim("length")}
    inputs = (torch.randn(2, length or 5, 4), torch.ones(2, length or 5))
    return torch.export.export(model, inputs, dynamic_shapes=(axes, axes))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    path = tmp_path / "small.pt2"
    torch.export.save(program(), path)
    return path


def rewritten(path: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> Path:
    """A copy of the archive with every member passed through `change`, and more members."""
    copy = path.with_name(f"changed_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (more or {}).items():
            new.writestr(f"small/{name}", data)
    return copy


def with_json(path: Path, part: str, change: Callable[[Any], None]) -> Path:
    """A copy of the archive whose JSON member that ends with `part` went through `change`."""

    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith(part):
            return data
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return rewritten(path, edit)


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_a_program_comes_out_with_its_names_and_equal_numbers(archive: Path, tmp_path: Path) -> None:
    samples = {
        "x": np.random.default_rng(0).standard_normal((4, 5, 4)).astype(np.float32),
        "mask": np.ones((4, 5), np.float32),
    }
    captured = capture(str(archive), examples=samples, work=tmp_path / "work")
    assert captured.inputs == (InputSpec("x", (1, 5, 4), "float32", True), InputSpec("mask", (1, 5), "float32", True))
    assert captured.outputs == ("tokens", "mean")
    assert captured.parameters == 15
    assert captured.check.sqnr_db == np.inf
    assert captured.check.against == "the exported program itself"
    got = run(captured.graph, [torch.from_numpy(samples[i.name]) for i in captured.inputs])
    torch.manual_seed(0)
    wanted = Small().eval()(*(torch.from_numpy(samples[i.name]) for i in captured.inputs))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted.values(), strict=True))
    assert list((tmp_path / "work").iterdir()) == []


def test_core_aten_gives_the_same_model_as_the_export(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "core.pt2"
    torch.export.save(program().run_decompositions(), path)
    one, other = (capture(str(p), work=tmp_path) for p in (archive, path))
    assert one.fingerprint == other.fingerprint
    assert one.check.synthetic


def test_another_weight_is_another_fingerprint(archive: Path, tmp_path: Path) -> None:
    changed = program()
    with torch.no_grad():
        changed.state_dict["fc.weight"][0, 0] += 1e-6
    path = tmp_path / "other.pt2"
    torch.export.save(changed, path)
    assert capture(str(archive), work=tmp_path).fingerprint != capture(str(path), work=tmp_path).fingerprint


def test_an_axis_of_any_length_is_fixed_by_input(tmp_path: Path) -> None:
    path = tmp_path / "open.pt2"
    torch.export.save(program(length=None), path)
    with pytest.raises(TightfitError, match=r"'x' of .*open\.pt2 has axes of any length \(1xNx4\)"):
        capture(str(path), work=tmp_path)
    specs = [InputSpec("x", (1, 9, 4), "float32"), InputSpec("mask", (1, 9), "float32")]
    captured = capture(str(path), inputs=specs, work=tmp_path)
    assert [i.shape for i in captured.inputs] == [(1, 9, 4), (1, 9)]
    assert run(captured.graph, [torch.ones(2, 9, 4), torch.ones(2, 9)])[1].shape == (2, 3)


def test_the_layout_of_older_torch_is_read_too(tmp_path: Path) -> None:
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    whole = serialize(program())
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
        out.writestr("serialized_exported_program.json", whole.exported_program)
        out.writestr("serialized_state_dict.pt", whole.state_dict)
        out.writestr("serialized_constants.pt", whole.constants)
        out.writestr("serialized_example_inputs.pt", whole.example_inputs)
    assert capture(str(path), work=tmp_path).outputs == ("tokens", "mean")

    marker = tmp_path / "marker"
    buffer = io.BytesIO()
    torch.save({"fc.weight": Bomb(marker)}, buffer)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, buffer.getvalue() if name == "serialized_constants.pt" else old.read(name))
    with pytest.raises(TightfitError, match=r"bad\.pt2 is refused: its constants are more than plain tensors"):
        load_program(tmp_path / "bad.pt2", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torch.save, old layout", "renamed"])
def test_a_pickle_is_refused_and_never_run(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / ("model.pt" if kind == "renamed" else "model.pt2")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save(Bomb(marker), path, _use_new_zipfile_serialization=kind != "torch.save, old layout")
    with pytest.raises(TightfitError, match=r"is a pickle.*refused"):
        capture(str(path), work=tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb works


def test_a_pickled_weight_or_constant_in_an_archive_is_refused_and_never_run(archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    buffer = io.BytesIO()
    torch.save(Bomb(marker), buffer)

    def hide(name: str, data: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            content = json.loads(data)
            content["config"]["fc.weight"]["use_pickle"] = True
            return json.dumps(content).encode()
        return buffer.getvalue() if name.endswith("/weight_0") else data

    with pytest.raises(TightfitError, match=r"stores 'fc\.weight' as a pickle"):
        capture(str(rewritten(archive, hide)), work=tmp_path)

    def custom(config: Any) -> None:
        config["config"]["evil"] = {**next(iter(config["config"].values())), "path_name": "opaque_obj_0"}

    with pytest.raises(TightfitError, match="stores 'evil' as a pickle"):
        capture(str(with_json(archive, "constants_config.json", custom)), work=tmp_path)
    assert not marker.exists()


def test_example_inputs_in_the_archive_are_never_read(archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    buffer = io.BytesIO()
    torch.save(Bomb(marker), buffer)
    path = rewritten(archive, lambda name, data: buffer.getvalue() if "sample_inputs" in name else data)
    assert capture(str(path), work=tmp_path).outputs == ("tokens", "mean")
    assert not marker.exists()


def test_an_operator_that_is_no_operator_is_refused(archive: Path, tmp_path: Path) -> None:
    for target in ("torch.os.system", "torch.ops.aten.__class__.mro", "_operator.attrgetter", "torch.ops.load_library"):

        def swap(content: Any, target: str = target) -> None:
            content["graph_module"]["graph"]["nodes"][0]["target"] = target

        with pytest.raises(TightfitError, match=f"calls '{target}'"):
            capture(str(with_json(archive, "model.json", swap)), work=tmp_path)


def test_code_in_a_shape_in_a_guard_or_in_a_tree_is_not_run(archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def shape(value: Any) -> None:
        if isinstance(value, dict):
            if "expr_str" in value:
                value["expr_str"] = code
            for v in value.values():
                shape(v)
        elif isinstance(value, list):
            for v in value:
                shape(v)

    with pytest.raises(TightfitError, match=r"is no shape that torch\.export writes"):
        capture(str(with_json(archive, "model.json", shape)), work=tmp_path)

    def guard(content: Any) -> None:
        content["guards_code"] = [code]
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = json.dumps([1, {"type": code, "context": code, "children_spec": []}])

    assert capture(str(with_json(archive, "model.json", guard)), work=tmp_path).parameters == 15
    assert not marker.exists()


def test_a_damaged_archive_says_what_is_wrong(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    half = tmp_path / "half.pt2"
    half.write_bytes(data[: len(data) // 2])
    with pytest.raises(TightfitError, match=r"half\.pt2 is truncated"):
        capture(str(half), work=tmp_path)
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(TightfitError, match=r"text\.pt2 is no \.pt2 archive"):
        capture(str(text), work=tmp_path)
    flipped = bytearray(data)
    with zipfile.ZipFile(archive) as whole:
        at = next(i for i in whole.infolist() if i.filename.endswith("weight_0")).header_offset
    flipped[at + 200] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(flipped)
    with pytest.raises(TightfitError, match=r"flipped\.pt2"):
        capture(str(tmp_path / "flipped.pt2"), work=tmp_path)
    with pytest.raises(TightfitError, match=r"there is no file .*nowhere\.pt2"):
        capture(str(tmp_path / "nowhere.pt2"), work=tmp_path)


def test_compiled_code_instead_of_a_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "aoti.pt2"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data/aotinductor/model/x.so", b"\x7fELF")
    with pytest.raises(TightfitError, match="holds compiled code"):
        capture(str(path), work=tmp_path)


def test_half_precision_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 3).half(), (torch.ones(2, 3).half(),)), path)
    with pytest.raises(TightfitError, match=r"'weight' in .* is float16.*Export model\.float\(\)"):
        capture(str(path), work=tmp_path)


def test_a_branch_on_data_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    path = tmp_path / "cond.pt2"
    torch.export.save(torch.export.export(Branch(), (torch.ones(2, 3),)), path)
    with pytest.raises(TightfitError, match=r"branches or loops.*torch\.where"):
        capture(str(path), work=tmp_path)


def test_a_fixed_batch_is_kept_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)), path)
    captured = capture(str(path), examples={"": np.ones((6, 3), np.float32)}, work=tmp_path)
    assert captured.inputs == (InputSpec("input", (4, 3), "float32", False),)
    assert captured.notes == ("the batch is fixed at 4: the program was exported that way",)
