"""`module:function` in a child interpreter, and what every capture has in common.

Most refusals are tested on the child's own functions in this process, which is the same code without the seconds that
an interpreter takes to start; the process itself has tests of its own.
"""

import ast
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calibrate.graph import run
from calibrate.samples import InputSpec
from convert import capture_child
from convert.capture import Captured, capture, finished, parse_input
from convert.capture_factory import read_result
from convert.capture_raw import CaptureCheck, Raw, Reference, check, max_abs, sqnr_db
from convert.errors import MissingDependency, TightfitError

ROOT = Path(__file__).parents[2]
ZOO = Path(os.environ.get("TIGHTFIT_ZOO", ROOT.parent / "shared" / "zoo"))

MODELS = """
import torch
from torch import nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, image, shift=None):
        x = F.relu_(self.bn(self.conv(image)))
        x = F.dropout(x, 0.5, self.training)
        x = self.fc(x.mean((2, 3)))
        return {"logits": x if shift is None else x + shift, "extra": (x.argmax(-1), None)}


def net():
    torch.manual_seed(0)
    return Net().train()


def with_inputs():
    return net().eval(), (torch.zeros(2, 1, 6, 6),)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Loop(nn.Module):
    def forward(self, x):
        return x * float(x.detach().numpy().sum())


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(1, 12).exp()


class Sized(nn.Module):
    def forward(self, x):
        return x * (2 if x.shape[0] == 1 else 3)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def half():
    return net().half()


def not_a_number():
    model = net().eval()
    model.conv.weight.data[0, 0, 0, 0] = float("nan")
    model.fc.bias.data[1] = float("inf")
    return model


def raises():
    raise ValueError("no such checkpoint")


def text():
    return "no module"


def needs_package():
    import a_package_that_nobody_has
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with models.py in it, the working directory."""
    torch.set_num_threads(1)
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("models", "broken"):
        sys.modules.pop(name, None)


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 1, 6, 6)).astype(np.float32)


def job(folder: Path, function: str, **more: Any) -> dict[str, Any]:
    out = folder / f"out_{len(list(folder.iterdir()))}"
    out.mkdir()
    return {
        "model": f"models:{function}",
        "weights": None,
        "examples": None,
        "inputs": [],
        "threads": 1,
        "out": str(out),
        **more,
    }


def in_child(folder: Path, function: str, arrays: dict[str, np.ndarray] | None = None, **more: Any) -> dict[str, Any]:
    """What the child's capture says, with what it read."""
    if arrays is not None:
        np.savez(folder / "examples.npz", **{f"x/{n}": a for n, a in arrays.items()})
        more["examples"] = str(folder / "examples.npz")
    asked = job(folder, function, **more)
    with capture_child.quiet(), torch.no_grad():
        return {**capture_child.capture(asked), "out": Path(asked["out"])}


def captured_here(folder: Path, function: str, arrays: dict[str, np.ndarray], **more: Any) -> Captured:
    """The whole capture without a second interpreter."""
    said = in_child(folder, function, arrays, **more)
    return finished(said["out"].name, "function", read_result(said["out"], said, function))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(capture_child.Refused) as caught:
        call()
    return str(caught.value)


# --- the whole way, in a real child


def test_a_function_is_captured_in_a_child_and_equals_its_module(folder: Path) -> None:
    work = folder / "work"
    captured = capture("models:net", examples={"image": images()}, work=work)
    assert captured.name == "net"
    assert captured.source == "models:net"
    assert captured.inputs == (InputSpec("image", (1, 1, 6, 6), "float32", True),)
    assert captured.outputs == ("logits", "extra")
    assert captured.parameters == 4 * 9 + 4 + 8 + 15
    assert captured.check == CaptureCheck(np.inf, 0.0, 4, "the module itself", False)
    assert captured.notes == ("the module was in training mode; it was captured in evaluation mode",)
    assert "models" not in sys.modules
    assert not captured.graph.training
    assert list(work.iterdir()) == []
    assert not (folder / "__pycache__").exists()

    import models  # ours, only to compare

    with torch.no_grad():
        wanted = models.net().eval()(torch.from_numpy(images()))["logits"]
    assert torch.equal(run(captured.graph, [torch.from_numpy(images())])[0], wanted)


def test_another_interpreter_without_torch_is_a_missing_dependency(folder: Path) -> None:
    bare = folder / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(MissingDependency, match=r"cannot import torch.*-m pip install torch"):
        capture("models:net", examples={"": images()}, python=bare, work=folder / "work")
    with pytest.raises(MissingDependency, match=r"does not start.*--python"):
        capture("models:net", python=folder / "nowhere", work=folder / "work")
    assert list((folder / "work").iterdir()) == []


def test_a_child_that_is_killed_is_reported_with_its_last_words(folder: Path) -> None:
    (folder / "dies.py").write_text("import os, sys\nprint('last words', flush=True)\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(TightfitError, match=r"killed by signal 9[\s\S]*last words"):
        capture("dies:model", work=folder / "work")
    assert list((folder / "work").iterdir()) == []


def test_an_interrupt_reaches_the_child_and_leaves_nothing(folder: Path) -> None:
    (folder / "waits.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from convert.capture import capture\n"
        "try:\n    capture('waits:model', work=pathlib.Path('work'))\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 300
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
    assert parent.wait(timeout=120) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    assert list((folder / "work").iterdir()) == []


# --- weights and inputs


def test_weights_come_from_safetensors_or_a_state_dict(folder: Path) -> None:
    import models

    state = models.net().state_dict()
    state["fc.bias"] = torch.tensor([7.0, 8.0, 9.0])
    save_file(state, folder / "w.safetensors")
    torch.save({"state_dict": state}, folder / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        model = models.net()
        capture_child.load_weights(model, str(folder / name))
        assert torch.equal(model.fc.bias, state["fc.bias"])


def test_weights_of_another_model_name_what_is_missing_and_what_is_too_many(folder: Path) -> None:
    import models

    state = models.net().state_dict()
    renamed = {k.replace("fc.", "head."): v for k, v in state.items()}
    save_file(renamed, folder / "w.safetensors")
    text = refusal(lambda: capture_child.load_weights(models.net(), str(folder / "w.safetensors")))
    assert "missing 'fc.bias', 'fc.weight'; unexpected 'head.bias', 'head.weight'" in text
    save_file({f"module.{k}": v for k, v in state.items()}, folder / "w.safetensors")
    assert "DataParallel" in refusal(lambda: capture_child.load_weights(models.net(), str(folder / "w.safetensors")))
    save_file({**state, "fc.bias": torch.zeros(5)}, folder / "w.safetensors")
    text = refusal(lambda: capture_child.load_weights(models.net(), str(folder / "w.safetensors")))
    assert "'fc.bias' is [5], the model wants [3]" in text


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_weights_that_are_more_than_weights_are_refused_and_never_run(folder: Path) -> None:
    marker = folder / "marker"
    torch.save({"fc.weight": Bomb(marker)}, folder / "w.pt")
    assert "Nothing in it was run" in refusal(lambda: capture_child.read_weights(str(folder / "w.pt")))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb works
    (folder / "w.safetensors").write_bytes(b"half a file")
    assert "not a readable safetensors" in refusal(lambda: capture_child.read_weights(str(folder / "w.safetensors")))


def test_inputs_come_from_data_from_input_or_from_the_function(folder: Path) -> None:
    said = in_child(folder, "with_inputs")
    assert (said["inputs"], said["samples"], said["synthetic"]) == (["image"], 2, False)
    spec = {"name": "image", "shape": [1, 1, 8, 8], "dtype": "float32", "dynamic_batch": True}
    said = in_child(folder, "net", inputs=[spec])
    assert (said["inputs"], said["synthetic"]) == (["image"], True)
    said = in_child(folder, "net", {"image": images(), "shift": np.ones((4, 3), np.float64)})
    assert said["inputs"] == ["image", "shift"]
    text = refusal(lambda: in_child(folder, "net"))
    assert "the shape of 'image' is unknown" in text
    assert "--input image:float32:1x3x224x224" in text


def test_data_that_feeds_no_parameter_says_what_forward_takes(folder: Path) -> None:
    typo = {"image": images(), "shfit": np.ones((4, 3), np.float32)}
    text = refusal(lambda: in_child(folder, "net", typo))
    assert "forward takes 'image', 'shift': 'shfit' is no parameter of it" in text
    text = refusal(lambda: in_child(folder, "net", {"shift": np.ones((4, 3), np.float32)}))
    assert "'image' is missing" in text
    spec = {"name": "image", "shape": [1, 1, 9, 9], "dtype": "float32"}
    text = refusal(lambda: in_child(folder, "net", {"": images()}, inputs=[spec]))
    assert "--input says that 'image' is [1, 1, 9, 9], the data has [4, 1, 6, 6]" in text


def test_a_single_input_may_have_a_name_of_its_own(folder: Path) -> None:
    assert captured_here(folder, "net", {"pixels": images()}).inputs[0].name == "pixels"


def test_a_wrong_shape_gives_the_models_own_words_its_line_and_the_shapes(folder: Path) -> None:
    text = refusal(lambda: in_child(folder, "net", {"": np.zeros((2, 3, 6, 6), np.float32)}))
    assert "does not run on the data (image float32 [2, 3, 6, 6])" in text
    assert "models.py" in text
    assert "self.bn(self.conv(image))" in text


# --- the module


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("modles:net", "there is no module 'modles'"),
        ("models:nett", "has no 'nett'; did you mean 'net'?"),
        ("models:zzzz", "its functions are"),
        ("models:raises", "models:raises raised ValueError: no such checkpoint"),
        ("models:raises", 'raise ValueError("no such checkpoint")'),
        ("models:text", "models:text returned str; it must return a torch.nn.Module"),
        ("models:needs_package", "No module named 'a_package_that_nobody_has'"),
        ("broken:net", "has no package 'a_package_that_nobody_has'"),
    ],
)
def test_a_function_that_gives_no_module_says_why(reference: str, said: str, folder: Path) -> None:
    assert said in refusal(lambda: capture_child.build(reference))


def test_a_branch_on_data_names_the_line_and_torch_where(folder: Path) -> None:
    text = refusal(lambda: in_child(folder, "Branch", {"": np.ones((2, 3), np.float32)}))
    assert "models.py, line" in text
    assert "if x.sum() > 0:" in text
    assert "torch.where" in text
    assert "torch.cond" in text


def test_what_export_cannot_follow_names_the_line_and_what_to_try(folder: Path) -> None:
    text = refusal(lambda: in_child(folder, "Loop", {"": np.ones((2, 3), np.float32)}))
    assert "return x * float(x.detach().numpy().sum())" in text
    assert ".numpy()" in text
    assert "torch.where" not in text


def test_a_batch_that_the_model_fixes_is_fixed_and_the_reason_noted(folder: Path) -> None:
    said = in_child(folder, "Fixed", {"": np.ones((3, 12), np.float32)})
    assert said["notes"][-1].startswith("the batch is fixed at 1: the model does not run on batches of 1 and 3")
    assert "reshape(1, 12)" in said["notes"][-1]
    said = in_child(folder, "Sized", {"": np.ones((3, 12), np.float32)})
    assert said["notes"][-1].startswith("the batch is fixed at 1: the captured graph computes something else")


def test_half_precision_is_captured_as_float32_and_noted(folder: Path) -> None:
    assert (
        "the weights were not float32; they were captured as float32"
        in in_child(folder, "half", {"": images()})["notes"]
    )


def test_a_module_with_random_numbers_is_refused(folder: Path) -> None:
    with pytest.raises(TightfitError, match=r"does not compute what the module itself computes.*deterministic"):
        captured_here(folder, "Random", {"": np.ones((2, 3), np.float32)})


def test_nan_and_inf_in_weights_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(TightfitError, match=r"'conv\.weight' \(1 NaN of 36\), 'fc\.bias' \(1 Inf of 3\)"):
        captured_here(folder, "not_a_number", {"": images()})


# --- what all have in common


def test_the_check_measures_and_refuses_another_function() -> None:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x * 2,)

    graph = torch.fx.symbolic_trace(Double())
    x = images()
    spec = InputSpec("x", (1, 1, 6, 6), "float32")

    def raw(answer: np.ndarray) -> Raw:
        return Raw(graph, (spec,), ("y",), (Reference({"x": x}, (answer,)),), "the model", 4, False)

    assert check(graph, raw(x * 2)).sqnr_db == np.inf
    near = check(graph, raw(x * 2 + np.float32(1e-6)))
    assert 100 < near.sqnr_db < 140
    assert near.max_abs == pytest.approx(1e-6, rel=0.5)
    with pytest.raises(TightfitError, match=r"does not compute what the model computes"):
        check(graph, raw(x * 2.01))
    with pytest.raises(TightfitError, match=r"the shape \[4, 1, 6, 6\], the model \[2, 1, 6, 6\]"):
        check(graph, raw(x[:2]))


def test_sqnr_is_what_it_says() -> None:
    one = np.array([3.0, 4.0])
    assert sqnr_db(one, one) == np.inf
    assert sqnr_db(one, one + np.array([0.0, 0.05])) == pytest.approx(40.0)
    assert sqnr_db(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == np.inf
    assert sqnr_db(np.array([1.0, 1.0]), np.array([np.nan, 1.0])) == -np.inf
    assert max_abs(one, one + 0.25) == 0.25
    assert max_abs(np.array([1.0]), np.array([np.nan])) == np.inf


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("input_ids:int64:1x64", InputSpec("input_ids", (1, 64), "int64")),
        ("x:float32:1,3,32,32", InputSpec("x", (1, 3, 32, 32), "float32")),
        ("x:bool:[2, 3]", InputSpec("x", (2, 3), "bool")),
    ],
)
def test_an_input_is_parsed(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "write it as NAME:DTYPE:SHAPE"),
        ("x:float33:1x3", "did you mean 'float32'"),
        ("x:complex128:1", "there are float32"),
        ("x:float32:1x0", "not a list of positive numbers"),
        ("x:float32:1xN", "not a list of positive numbers"),
    ],
)
def test_an_input_that_is_none_is_refused_with_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(TightfitError, match=said):
        parse_input(text)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("model.pt", r"is a pickle.*MODULE:FUNCTION --weights"),
        ("weights.safetensors", r"holds weights without a model"),
        ("notes.txt", r"of no kind that can be captured"),
        ("modle.pt3", r"is no model: give a \.pt2.*Did you mean 'model\.pt'"),
        ("nowhere.onnx", r"there is no file nowhere\.onnx"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_give(model: str, said: str, folder: Path) -> None:
    for name in ("model.pt", "weights.safetensors", "notes.txt"):
        (folder / name).touch()
    with pytest.raises(TightfitError, match=said):
        capture(model, work=folder / "work")


def test_weights_without_a_function_and_empty_data_are_refused(folder: Path) -> None:
    with pytest.raises(TightfitError, match="--weights goes with module:function"):
        capture("model.onnx", weights=Path("w.pt"), work=folder)
    with pytest.raises(TightfitError, match="calibration data is empty"):
        capture("models:net", examples={"": images(0)}, work=folder)
    with pytest.raises(TightfitError, match=r"no weights file .*w\.pt"):
        capture("models:net", weights=Path("w.pt"), work=folder)


def test_the_child_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(capture_child.__file__).read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    standard = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert standard <= {"torch", "numpy", "safetensors"}


@pytest.mark.skipif(not (ZOO / "zoo.py").exists(), reason="the zoo is not here: set TIGHTFIT_ZOO")
@pytest.mark.parametrize(("function", "parameters"), [("cifar_resnet", 269_722), ("cifar_vit", 596_074)])
def test_the_zoo_is_captured_bit_by_bit(
    function: str, parameters: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ZOO)
    pictures = np.load(ZOO / "cifar10_test_2000.npz")["images"][:3]
    x = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    captured = captured_here(folder, function, {"x": x}, model=f"zoo:{function}")
    assert captured.parameters == parameters
    assert captured.check.sqnr_db == np.inf
    assert captured.inputs[0].dynamic_batch
