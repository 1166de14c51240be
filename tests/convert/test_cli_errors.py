"""Wrong input from the command line: an exit code, one clear paragraph with the next step, and nothing left behind."""

import os
import pickle
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Tightfit, contents, images, in_own_process, net, onnx_model

CONVERT = "convert net.pt2 -d generic-x86 -o out"
WITH_DATA = f"{CONVERT} --calibration cal.npz"


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def refused(tightfit: Tightfit, desk: Path, arguments: str, *said: str, code: int = 2) -> None:
    """The command ends with `code`, says all of `said` in its one paragraph, and writes nothing."""
    before = contents(desk)
    result = tightfit(arguments)
    assert result.code == code, result
    assert result.out == ""
    for part in said:
        assert part in result.error
    assert contents(desk) == before


# --- the model


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_missing_model_file_is_named_with_the_nearest_one(suffix: str, tightfit: Tightfit, desk: Path) -> None:
    arguments = f"convert nett.{suffix} -d generic-x86 --calibration cal.npz"
    refused(tightfit, desk, arguments, f"there is no file nett.{suffix}", f"Did you mean 'net.{suffix}'?")


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_model_file_is_called_damaged(suffix: str, share: float, tightfit: Tightfit, desk: Path) -> None:
    whole = (desk / f"net.{suffix}").read_bytes()
    (desk / f"cut.{suffix}").write_bytes(whole[: int(share * len(whole))])
    words = "Save it again" if suffix == "pt2" else "Export it again"
    refused(tightfit, desk, f"convert cut.{suffix} -d generic-x86 --calibration cal.npz", f"cut.{suffix}", words)


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "model.pt2", "model.onnx"])
def test_a_pickle_as_a_model_is_refused_and_not_executed(name: str, tightfit: Tightfit, desk: Path) -> None:
    (desk / name).write_bytes(pickle.dumps(Bomb()))
    words = "damaged or no ONNX model" if name == "model.onnx" else "is a pickle"
    refused(tightfit, desk, f"convert {name} -d generic-x86 --calibration cal.npz", words)
    assert not (desk / "exploded").exists()
    pickle.loads((desk / name).read_bytes())
    assert (desk / "exploded").exists()  # the bomb works


def test_pickled_data_is_refused_and_not_executed(tightfit: Tightfit, desk: Path) -> None:
    np.savez(desk / "bomb.npz", x=np.array([Bomb()] * 4, dtype=object))
    refused(tightfit, desk, f"{CONVERT} --calibration bomb.npz", "holds Python objects", "Save plain numbers")
    assert not (desk / "exploded").exists()


@pytest.mark.parametrize("name", ["notes.txt", "folder"])
def test_what_is_no_model_at_all_is_told_what_would_be(name: str, tightfit: Tightfit, desk: Path) -> None:
    (desk / "notes.txt").touch()
    (desk / "folder").mkdir()
    refused(tightfit, desk, f"convert {name} -d generic-x86 --calibration cal.npz", "a .onnx, or module:function")


def test_a_weight_that_is_nan_is_named(tightfit: Tightfit, desk: Path) -> None:
    (desk / "nan.onnx").write_bytes(onnx_model(float("nan")))
    arguments = "convert nan.onnx -d generic-x86 --calibration cal.npz"
    refused(tightfit, desk, arguments, "NaN of 192", "use an earlier checkpoint")


def test_a_branch_on_data_is_shown_with_its_line_and_what_to_write_instead(tightfit: Tightfit, desk: Path) -> None:
    arguments = "convert models:Branch -d generic-x86 --calibration cal.npz"
    refused(tightfit, desk, arguments, "models.py, line 17: if x.sum() > 0:", "torch.where", "torch.cond")


def test_what_export_cannot_capture_is_shown_with_its_line_and_what_to_try(tightfit: Tightfit, desk: Path) -> None:
    line = "models.py, line 23: return x * float(x.detach().numpy().sum())"
    arguments = "convert models:Loop -d generic-x86 --calibration cal.npz"
    refused(tightfit, desk, arguments, line, "Rewrite that line with tensor operations only")


def test_a_function_that_ends_its_interpreter_is_told_so(tightfit: Tightfit, desk: Path) -> None:
    refused(tightfit, desk, "inspect models:leaves", "it called sys.exit(0)", "Let it return the model")
    refused(tightfit, desk, f"{CONVERT} --calibration data:leaves", "it called sys.exit(0)", "must return samples")


def test_an_interpreter_that_does_not_exist_is_a_missing_dependency(tightfit: Tightfit, desk: Path) -> None:
    model = "convert models:Net -d generic-x86 --calibration cal.npz --python nowhere/python"
    refused(tightfit, desk, model, "nowhere/python does not start", "--python", code=3)
    data = f"{CONVERT} --calibration data:chatty --python nowhere/python"
    refused(tightfit, desk, data, "nowhere/python does not start", "--python", code=3)


def test_a_fixed_batch_refuses_another(tightfit: Tightfit, desk: Path) -> None:
    program = torch.export.export(net(), (torch.zeros(2, 1, 8, 8),))
    torch.export.save(program, desk / "two.pt2")
    arguments = "convert two.pt2 -d generic-x86 --calibration cal.npz"
    refused(tightfit, desk, f"{arguments} --batch 3", "a fixed batch of 2", "Leave --batch out")
    np.savez(desk / "few.npz", x=images(4))
    refused(
        tightfit, desk, arguments.replace("cal.npz", "few.npz"), "takes 2 samples at a time, and there are 1", "--batch"
    )


# --- the data

BAD_DATA = {
    "the shape": ({"x": images(shape=(1, 5, 8))}, "[1, 5, 8]", "takes [1, 8, 8]"),
    "the layout": ({"x": images(shape=(8, 8, 1))}, "looks NHWC", "array.transpose(0, 3, 1, 2)"),
    "the dtype": ({"x": images().astype("int64")}, "is int64", "takes float32", "normalise the data as in training"),
    "text": ({"x": np.full((16, 1, 8, 8), "a")}, "holds <U1", "Save numbers"),
    "complex numbers": ({"x": images().astype("complex64")}, "holds complex64", "Save numbers"),
    "the name": ({"image": images()}, "no array for the input 'x'", "Rename it to 'x'"),
    "one array too many": ({"x": images(), "mask": images()}, "'mask'", "feeds no input", "Take it out"),
    "another number of labels": ({"x": images(), "labels": np.zeros(3, int)}, "different numbers of samples"),
    "no samples": ({"x": images(0)}, "holds no samples"),
    "one sample": ({"x": images(1)}, "one sample", "at least 2"),
    "NaN": ({"x": np.where(np.arange(16) == 3, np.nan, 0).reshape(-1, 1, 1, 1) + images()}, "holds NaN", "sample 3"),
    "Inf": ({"x": np.where(np.arange(16) == 5, np.inf, 0).reshape(-1, 1, 1, 1) + images()}, "holds Inf", "sample 5"),
    "a class there is not": ({"x": images(), "labels": np.full(16, 3)}, "a label 3", "3 classes, 0 to 2"),
}


@pytest.mark.parametrize("wrong", BAD_DATA)
def test_data_is_refused_when_wrong_is(wrong: str, tightfit: Tightfit, desk: Path) -> None:
    arrays, *said = BAD_DATA[wrong]
    np.savez(desk / "bad.npz", **arrays)
    refused(tightfit, desk, f"{CONVERT} --calibration bad.npz", *said)


@pytest.mark.parametrize("wrong", ["the layout", "the name", "Inf"])
def test_an_onnx_model_refuses_the_same(wrong: str, tightfit: Tightfit, desk: Path) -> None:
    arrays, *said = BAD_DATA[wrong]
    np.savez(desk / "bad.npz", **arrays)
    refused(tightfit, desk, "convert net.onnx -d generic-x86 --calibration bad.npz", *said)


def test_labels_in_a_file_must_be_one_per_sample_and_of_the_models_classes(tightfit: Tightfit, desk: Path) -> None:
    np.save(desk / "short.npy", np.zeros(5, int))
    refused(tightfit, desk, f"{WITH_DATA} --labels short.npy", "are 5, the samples 16", "one label per sample")
    np.save(desk / "other.npy", np.full(16, 9))
    refused(tightfit, desk, f"{WITH_DATA} --labels other.npy", "a label 9", "3 classes")
    refused(tightfit, desk, f"{WITH_DATA} --labels none.npy", "none.npy does not exist")


def test_missing_and_truncated_data_is_named(tightfit: Tightfit, desk: Path) -> None:
    refused(tightfit, desk, f"{CONVERT} --calibration call.npz", "call.npz does not exist", "Did you mean cal.npz?")
    (desk / "cut.npz").write_bytes((desk / "cal.npz").read_bytes()[:900])
    refused(tightfit, desk, f"{CONVERT} --calibration cut.npz", "cut.npz is no readable .npz", "Copy it again")
    refused(tightfit, desk, f"{CONVERT} --calibration nowhere:samples", "no module 'nowhere'", "PYTHONPATH")


# --- names and options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--calibration cal.npz -d raspbery-pi-5", "did you mean raspberry-pi-5"),
        ("--calibration cal.npz -t onxx", "Did you mean 'onnx'?"),
        ("--calibration cal.npz --recipe int9", "did you mean 'int8'?"),
        ("--calibration cal.npz --recipe steps.toml", "did you mean 'quantize_static'?"),
        ("--calibration cal.npz --recipe int8+int8-dynamic", "name one of them"),
        ("", "give --calibration DATA"),
        ("--synthetic --calibration cal.npz", "--synthetic and --calibration exclude each other"),
        ("--synthetic --evaluation cal.npz", "--synthetic and --evaluation exclude each other"),
        ("--calibration cal.npz --preprocessing rules.toml", "Leave --preprocessing out"),
        ("--calibration cal.npz --min-agreement 1.5", "give a number in (0, 1]"),
        ("--calibration cal.npz --batch 99", "Give at least 99, or a smaller --batch"),
        ("--calibration cal.npz --weights w.pt", "--weights goes with module:function"),
        ("--calibration cal.npz --input y:float32:1x1x8x8", "the inputs of net.pt2 are 'x'"),
        ("--calibration cal.npz --input x:float33:1x1x8x8", "did you mean 'float32'?"),
        ("--calibration cal.npz --name a/b", "leave slashes and a leading dot out"),
    ],
)
def test_an_option_is_refused_with_the_next_step(options: str, said: str, tightfit: Tightfit, desk: Path) -> None:
    (desk / "steps.toml").write_text('steps = ["quantise_static"]\n')
    refused(tightfit, desk, f"{CONVERT} {options}", said)


def test_a_device_must_be_given(tightfit: Tightfit, desk: Path) -> None:
    arguments = "convert net.pt2 --calibration cal.npz"
    refused(tightfit, desk, arguments, "Give --device NAME", "`tightfit devices` lists the names")
    refused(tightfit, desk, "devices raspbery-pi-5", "did you mean raspberry-pi-5")
    refused(tightfit, desk, "inspect net.pt2 -d raspbery-pi-5", "did you mean raspberry-pi-5")


def test_a_profile_with_a_bad_field_names_file_line_and_field(tightfit: Tightfit, desk: Path) -> None:
    (desk / "board.toml").write_text('# My board\nname = "board"\ntitel = "x"\n')
    arguments = "convert net.pt2 -d ./board.toml --calibration cal.npz"
    refused(tightfit, desk, arguments, "board.toml, line 3, titel: unknown field 'titel'", "did you mean 'title'?")


@pytest.mark.parametrize("arguments", ["convert", "convert net.pt2 --bath 3", "convert net.pt2 --samples 1", "konvert"])
def test_wrong_usage_points_to_the_help(arguments: str, tightfit: Tightfit, desk: Path) -> None:
    before = contents(desk)
    said = tightfit(arguments)
    assert (said.code, said.out) == (2, "")
    assert "--help' for help" in said.err
    assert "Traceback" not in said.err
    assert contents(desk) == before


# --- where it goes


def test_a_folder_that_exists_is_replaced_only_with_force_and_only_if_it_is_ours(
    tightfit: Tightfit, desk: Path
) -> None:
    (desk / "out").mkdir()
    (desk / "out" / "thesis.txt").write_text("years of work")
    refused(tightfit, desk, WITH_DATA, "out exists already", "--force")
    refused(tightfit, desk, f"{WITH_DATA} --force", "was not made by Tightfit", "Choose another folder")
    refused(tightfit, desk, f"{WITH_DATA} --force -o .", "is the folder you are in", "a folder of its own")
    refused(tightfit, desk, f"{WITH_DATA} --force -o ..", "is the folder you are in", "a folder of its own")
    assert (desk / "out" / "thesis.txt").read_text() == "years of work"


def test_an_earlier_result_is_replaced_with_force_and_kept_when_the_new_run_fails(
    tightfit: Tightfit, desk: Path
) -> None:
    assert tightfit(f"{WITH_DATA} --recipe float32").code == 0
    (desk / "out" / "mark").touch()
    refused(tightfit, desk, f"{CONVERT} --force --calibration nowhere.npz", "does not exist")
    assert (desk / "out" / "mark").exists()
    assert tightfit(f"{WITH_DATA} --recipe float32 --force").code == 0
    assert not (desk / "out" / "mark").exists()
    assert (desk / "out" / "report.json").exists()
    assert [p.name for p in desk.glob(".*")] == []


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tightfit: Tightfit, desk: Path) -> None:
    (desk / "file").touch()
    refused(tightfit, desk, f"{WITH_DATA} -o file/out", "cannot write to file", "Choose another folder with -o")
    refused(tightfit, desk, f"{WITH_DATA} -o /proc/none/out", "cannot write to /proc/none", "Choose another folder")


def test_parents_made_for_a_result_that_failed_are_taken_back(tightfit: Tightfit, desk: Path) -> None:
    refused(tightfit, desk, f"{CONVERT} -o deep/down/out --calibration none.npz", "none.npz does not exist")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("check nowhere", "there is no folder nowhere"),
        ("check empty", "was not made by `tightfit convert`"),
        ("bench nowhere.onnx", "there is no nowhere.onnx"),
        ("bench cal.npz", "is no artifact"),
        ("inspect nowhere.onnx", "there is no file nowhere.onnx"),
    ],
)
def test_other_commands_refuse_as_clearly(arguments: str, said: str, tightfit: Tightfit, desk: Path) -> None:
    (desk / "empty").mkdir()
    refused(tightfit, desk, arguments, said)


# --- what is not installed

WITHOUT_EXTRAS = "import sys\nfor name in ('litert_torch', 'ai_edge_litert', 'coremltools'): sys.modules[name] = None"


@pytest.mark.parametrize(("target", "extra"), [("tflite", "tightfit[tflite]"), ("coreml", "tightfit[coreml]")])
def test_a_missing_extra_is_named_with_its_pip_command(target: str, extra: str, desk: Path) -> None:
    before = contents(desk)
    said = in_own_process(f"{WITH_DATA} -t {target}", before=WITHOUT_EXTRAS)
    assert (said.code, said.out) == (3, "")
    assert f"pip install '{extra}'" in said.error
    assert contents(desk) == before


def test_targets_says_what_is_missing_and_how_to_get_it(desk: Path) -> None:
    said = in_own_process("targets", before=WITHOUT_EXTRAS)
    assert (said.code, said.err) == (0, "")
    assert "pip install 'tightfit[tflite]'" in said.out
    assert "pip install 'tightfit[coreml]'" in said.out
    assert said.out.count("ready") == 2  # ONNX; and C99, whose sources need nothing to be written


def test_doctor_names_what_is_missing_and_ends_with_3_only_for_the_core(
    tightfit: Tightfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version

    def without(*absent: str) -> None:
        def version(name: str) -> str:
            if name in absent:
                raise metadata.PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(metadata, "version", version)

    without("litert-torch", "coremltools")
    said = tightfit("doctor")
    assert said.code == 0
    assert 'pip install "tightfit[tflite]"' in said.out
    assert 'pip install "tightfit[coreml]"' in said.out
    without("onnxscript")
    said = tightfit("doctor")
    assert said.code == 3
    assert 'pip install "onnxscript>=0.5"' in said.out


def test_a_board_that_is_not_there_and_what_cannot_be_added_to_one_are_named(tightfit: Tightfit, desk: Path) -> None:
    refused(tightfit, desk, "emulator build raspberry-pi-4", "Did you mean 'raspberry-pi-4b'?")
    refused(tightfit, desk, "emulator build raspberry-pi-4b/desktop", "nothing called 'desktop'", "tflite-runtime")
