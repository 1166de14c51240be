"""The command line as it is used: help, JSON, gates, quiet libraries, and models with several inputs and outputs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ROOT, Tightfit, images, in_own_process
from made_out import converted, copy, need_all_targets

COMMANDS = ("convert", "check", "bench", "inspect", "devices", "steps", "targets", "doctor", "demo")
CONVERT = "convert net.pt2 -d generic-x86 -o out"
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "coremltools", "litert_torch", "pydantic", "matplotlib", "PIL")


# --- help


def test_help_imports_no_library_that_takes_long() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['tightfit', '--help']\n"
        "from convert.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([n for n in {HEAVY} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
    assert "tightfit demo" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_has_an_example(name: str, tightfit: Tightfit) -> None:
    said = tightfit(f"{name} --help")
    lines = said.out.splitlines()
    assert (said.code, said.err) == (0, "")
    assert len(lines) <= 50
    assert max(len(line) for line in lines) <= 80
    assert f"Example: tightfit {name}" in said.out


def test_the_help_lists_every_command(tightfit: Tightfit) -> None:
    said = tightfit("--help")
    assert said.code == 0
    assert all(f" {name} " in said.out for name in COMMANDS)


# --- JSON


@pytest.mark.parametrize("arguments", ["devices", "devices raspberry-pi-5", "steps", "targets", "doctor"])
def test_listings_as_json_are_json_alone(arguments: str, tightfit: Tightfit) -> None:
    said = tightfit(f"{arguments} --json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)


def test_the_commands_that_work_print_json_alone(tightfit: Tightfit, desk: Path) -> None:
    out = copy(converted(), desk)
    artifact = out / "raspberry-pi-4b" / "digits_cnn.onnx"
    for arguments, key in (
        (f"{CONVERT}2 --calibration cal.npz", "results"),
        (f"check {out}", "gates"),
        (f"bench {artifact} --runs 20 --seconds 0", "latency"),
        ("inspect net.pt2 -d coral-edgetpu", "operators"),
    ):
        said = tightfit(f"{arguments} --json")
        assert (said.code, said.err) == (0, ""), said
        assert key in json.loads(said.out)


def test_a_model_and_data_that_print_a_lot_disturb_no_json(tightfit: Tightfit) -> None:
    said = tightfit("inspect models:chatty --json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["parameters"] == 55
    said = tightfit(f"{CONVERT} --calibration data:chatty --json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["calibration"]["samples"] == 13  # of 16, a fifth set aside


# --- gates and warnings


def test_a_gate_that_fails_exits_with_1_and_leaves_the_artifacts(tightfit: Tightfit, desk: Path) -> None:
    said = tightfit(f"{CONVERT} --calibration cal.npz --recipe int8 --min-sqnr 150")
    assert said.code == 1
    assert "gate failed" in said.out
    report = json.loads((desk / "out" / "report.json").read_text())
    assert [g["passed"] for g in report["results"][0]["gates"]] == [False]
    assert (desk / "out" / report["results"][0]["artifact"]).is_file()


def test_a_gate_that_holds_exits_with_0(tightfit: Tightfit, desk: Path) -> None:
    said = tightfit(f"{CONVERT} --calibration cal.npz --recipe int8 --min-sqnr 5")
    assert said.code == 0
    report = json.loads((desk / "out" / "report.json").read_text())
    assert [g["passed"] for g in report["results"][0]["gates"]] == [True]


def test_synthetic_needs_no_data_and_says_so_first(tightfit: Tightfit, desk: Path) -> None:
    said = tightfit(f"{CONVERT} --synthetic")
    assert said.code == 0
    report = json.loads((desk / "out" / "report.json").read_text())
    assert report["calibration"]["synthetic"] is True
    assert "random numbers (--synthetic)" in report["warnings"][0]
    assert "random numbers" in said.out
    assert "random numbers (--synthetic)" in (desk / "out" / "report.md").read_text()
    page = (desk / "out" / "report.html").read_text()
    assert page.index("random numbers (--synthetic)") < page.index("<table")


def test_two_samples_are_enough_and_few_are_warned_of(tightfit: Tightfit, desk: Path) -> None:
    np.savez(desk / "two.npz", x=images(2))
    said = tightfit(f"{CONVERT} --calibration two.npz")
    assert said.code == 0
    assert "only 2 samples" in said.out


def test_labels_that_a_model_without_classes_cannot_use_are_told(tightfit: Tightfit, desk: Path) -> None:
    class Row(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).mean((1, 2, 3)).unsqueeze(1)

    shapes = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(Row(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes), desk / "row.pt2")
    np.savez(desk / "labelled.npz", x=images(), labels=np.zeros(16, int))
    np.save(desk / "labels.npy", np.zeros(16, int))
    said = tightfit("convert row.pt2 -d generic-x86 -o out --calibration labelled.npz --recipe float32")
    assert said.code == 0
    assert "the labels are of no use" in " ".join(said.out.split())
    said = tightfit("convert row.pt2 -d generic-x86 -o out2 --calibration cal.npz --labels labels.npy")
    assert said.code == 2
    assert "Leave --labels out" in said.error


# --- several inputs and outputs, on all targets, in a process of its own


class Encoder(torch.nn.Module):
    """Token ids and a mask -> class scores and a pooled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, 16)
        self.mix = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.mix(self.words(ids)))
        weight = mask.to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return self.head(pooled), pooled


def _encoder(folder: Path) -> None:
    torch.manual_seed(0)
    example = (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64))
    axis = torch.export.Dim("batch")
    program = torch.export.export(Encoder().eval(), example, dynamic_shapes={"ids": {0: axis}, "mask": {0: axis}})
    torch.export.save(program, folder / "encoder.pt2")
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 20, (40, 6))
    mask = (np.arange(6) < generator.integers(1, 7, (40, 1))).astype(np.int64)
    np.savez(folder / "text.npz", ids=ids, mask=mask)


# Short timing, as `made_out.hasty`: these tests look at anything but time.
HASTY = (
    "import functools\nfrom convert import artifact\n"
    "artifact.measure = functools.partial(artifact.measure, min_runs=20, min_seconds=0.0, warmup_seconds=0.0)"
)


@pytest.mark.slow
def test_ids_and_mask_and_two_outputs_convert_everywhere_without_a_word_from_the_libraries(
    tightfit: Tightfit, desk: Path
) -> None:
    need_all_targets()
    _encoder(desk)
    arguments = "convert encoder.pt2 -d raspberry-pi-4b -t onnx,tflite,coreml --calibration text.npz -o out"
    said = in_own_process(arguments, before=HASTY)
    assert said.code == 0, said
    stages = [f"  raspberry-pi-4b / {t} ({i} of 3)" for i, t in enumerate(("onnx", "tflite", "coreml"), 1)]
    assert said.err.splitlines() == ["  capture", *stages]
    assert said.out.splitlines()[0].startswith("encoder: ")
    assert "Warning" not in said.out
    report = json.loads((desk / "out" / "report.json").read_text())
    assert [r["target"] for r in report["results"]] == ["onnx", "tflite", "coreml"]
    for result in report["results"]:
        assert result["match"]["within_one_step"], result["match"]
        # Cosine over the worse of two outputs; a mask or an output that is mixed up gives far less.
        assert result["drift"]["stages"][-1]["cosine"] > 0.98
    with np.load(desk / "out" / "reference.npz") as kept:
        assert {"input/ids", "input/mask"} <= set(kept.files)
        assert len([name for name in kept.files if name.startswith("float/")]) == 2
        assert len([name for name in kept.files if name.startswith("artifact/raspberry-pi-4b/coreml/")]) == 2
    checked = tightfit("check out --json")
    assert (checked.code, checked.err) == (0, "")
    assert json.loads(checked.out)["passed"] is True
