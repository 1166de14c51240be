"""Recipes that remove tokens, through the command line: one small ViT, as a user would convert it."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import Said, Tightfit, contents
from onnx import numpy_helper
from token_setup import Vit, Windows, images, vit

import targets
from calibrate.samples import InputSpec
from convert.compress import Builder
from convert.evaluation import judge
from convert.planning import decide
from convert.results import match_of
from convert.token_picture import token_facts
from device_profiles import load

DEVICE = "raspberry-pi-4b"
CONVERT = f"convert vit.pt2 -d {DEVICE} --target onnx --calibration images.npz --effort fast -o out"


@functools.cache
def exported(kind: str) -> bytes:
    model = Windows() if kind == "windows" else Vit(kind, depth=2)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model.eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "vit.pt2")
        return (Path(folder) / "vit.pt2").read_bytes()


@pytest.fixture
def pruned(tightfit: Tightfit, desk: Path) -> Tightfit:
    """The command line, on a desk with a small ViT and 32 images."""
    (desk / "vit.pt2").write_bytes(exported("class token"))
    np.savez(desk / "images.npz", x=images(32))
    return tightfit


def report(out: Path) -> dict[str, Any]:
    """The one result."""
    (result,) = json.loads((out / "report.json").read_text())["results"]
    return dict(result)


def stages(result: dict[str, Any]) -> list[str]:
    return [s["stage"] for s in result["drift"]["stages"]]


def good(said: Said) -> None:
    assert said.code == 0, said


def test_a_pruned_artifact_is_what_its_report_says_and_made_again_the_same(pruned: Tightfit, desk: Path) -> None:
    good(pruned(f"{CONVERT} --recipe prune-evit --keep 0.6"))
    result, tokens = report(desk / "out"), report(desk / "out")["tokens"]
    assert (tokens["method"], tokens["tokens"], tokens["protected"]) == ("evit", 17, 1)
    counts = tokens["per_block"]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 17
    assert tokens["share"] == pytest.approx(0.6, abs=0.06)  # whole tokens of 17
    assert result["recipe"] == "prune-evit"
    assert "A share of 0.6 of the tokens is kept, as asked: 17 →" in result["recipe_reason"]
    assert result["match"]["within_one_step"]
    assert stages(result) == ["captured", "prune_tokens", "fold_batchnorm", "artifact"]
    ledger = [e for e in result["ledger"] if e["step"] == "prune_tokens"]
    assert [e["layer"] for e in ledger[: len(tokens["cuts"])]] == [c["layer"] for c in tokens["cuts"]]
    manifest = json.loads((desk / "out" / DEVICE / "manifest.json").read_text())["artifacts"]["onnx"]["tokens"]
    assert manifest == {k: v for k, v in tokens.items() if k != "samples"}
    names = {n.op_type for n in onnx.load(desk / "out" / DEVICE / "vit.onnx").graph.node}
    assert "TopK" in names
    # the float twin has every token
    assert "TopK" not in {n.op_type for n in onnx.load(desk / "out" / DEVICE / "float" / "vit.onnx").graph.node}
    page = (desk / "out" / "report.html").read_text()
    assert "Tokens that leave each block, of 17" in page
    # the folder holds when it is checked
    good(pruned("check out"))
    # and a second run gives the same bytes
    artifact = (desk / "out" / DEVICE / "vit.onnx").read_bytes()
    good(pruned(f"{CONVERT} --recipe prune-evit --keep 0.6 --force"))
    assert artifact == (desk / "out" / DEVICE / "vit.onnx").read_bytes()
    assert artifact != (desk / "out" / DEVICE / "float" / "vit.onnx").read_bytes()


def test_pruning_stands_before_the_steps_that_quantize(pruned: Tightfit, desk: Path) -> None:
    good(pruned(f"{CONVERT} --recipe prune-evit+int8-dynamic"))
    result = report(desk / "out")
    assert stages(result) == [
        "captured", "prune_tokens", "fold_batchnorm", "fuse_activations", "quantize_dynamic", "artifact"
    ]  # fmt: skip
    assert "A share of 0.7 of the tokens is kept, the recipe's default" in result["recipe_reason"]
    assert result["placement"]["int8_ops"] > 0
    assert result["match"]["within_one_step"]
    good(pruned("check out"))


@pytest.mark.slow
def test_auto_quantizes_what_was_pruned(pruned: Tightfit, desk: Path) -> None:
    good(pruned(f"{CONVERT} --recipe prune-evit+auto --keep 0.6"))
    result = report(desk / "out")
    assert result["recipe"] == "auto: prune-evit+int8-dynamic"
    assert result["tokens"]["method"] == "evit"
    assert stages(result).index("prune_tokens") < stages(result).index("quantize_dynamic")


@pytest.mark.slow
def test_tokens_go_until_answers_change(pruned: Tightfit, desk: Path) -> None:
    good(pruned(f"{CONVERT} --recipe prune-evit --max-drop 60"))
    result = report(desk / "out")
    assert result["tokens"]["changed"] <= 60
    assert "while at most 60 % of the answers change" in result["recipe_reason"]
    assert "choosing tokens once costs" in result["recipe_reason"]  # measured where the file runs
    assert not list((desk / "out").rglob("stairs"))


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--recipe int8 --keep 0.6", "--keep says how many tokens a transformer loses"),
        ("--recipe prune-evit --keep 1.5", "--keep 1.5 is out of range: give a number between 0 and 1"),
        ("--recipe prune-evit --keep 0.6 --max-drop 1", "--keep and --max-drop both say how many tokens stay"),
        ("--recipe prune-evit+merge-tome", "removes tokens twice"),
        ("--recipe prune-evit --keep 0.02", "the least that works here is about 0."),
    ],
)
def test_what_cannot_be_asked_for_is_refused_and_nothing_is_left(
    options: str, words: str, pruned: Tightfit, desk: Path
) -> None:
    before = contents(desk)
    said = pruned(f"{CONVERT} {options}")
    assert said.code == 2
    assert words in " ".join(said.error.split())
    assert contents(desk) == before


@pytest.mark.parametrize(
    ("kind", "recipe", "words"),
    [
        ("cnn", "prune-evit", "a convolutional network has no tokens to drop"),
        ("windows", "merge-tome", "only encoders whose attention sees all tokens can be pruned"),
        ("causal", "prune-evit", "a causal decoder reads each token with those before it"),
        ("dense", "prune-evit", "cluster-tokens"),
    ],
)
def test_models_that_need_their_tokens_are_refused(
    kind: str, recipe: str, words: str, pruned: Tightfit, desk: Path
) -> None:
    if kind == "cnn":
        shutil.copy(desk / "net.pt2", desk / "vit.pt2")
    else:
        (desk / "vit.pt2").write_bytes(exported(kind))
    said = pruned(f"{CONVERT} --recipe {recipe}")
    assert said.code == 2
    assert words in " ".join(said.error.split())
    assert not (desk / "out").exists()


@pytest.mark.slow
def test_a_dense_model_gets_its_tokens_back(pruned: Tightfit, desk: Path) -> None:
    (desk / "vit.pt2").write_bytes(exported("dense"))
    good(pruned(f"{CONVERT} --recipe cluster-tokens"))
    result = report(desk / "out")
    assert result["tokens"]["method"] == "cluster"
    assert result["match"]["within_one_step"]


# --- a fault in the file


def test_another_token_kept_in_the_file_than_in_the_graph_is_seen(tmp_path: Path) -> None:
    """One index of a fixed pattern, changed in the artifact alone: it no longer computes what its simulation does."""
    from token_setup import pruner

    found, (model, data) = pruner("even"), vit()
    scored = found.score(found.schedules(0.6)[0])
    cut = found.pruned(scored, "topk", "", [])
    profile = load(DEVICE)
    made = Builder(cut.captured, data).build(decide(cut.captured.graph, profile, "onnx", "float32"))
    inputs = tuple(InputSpec(i.name, (1, *i.sample_shape), i.dtype, False) for i in model.inputs)
    job = targets.Job("vit", made.graph, inputs, model.outputs, profile.rules("onnx"), "float32")
    path, target = tmp_path / "vit.onnx", targets.find("onnx")
    target.lower(job, path)

    def match() -> Any:
        return match_of(made, judge(model, made, target.open(path), data, 1))

    assert match().within_one_step
    file = onnx.load(path)
    before = cut.schedule.cuts[0][1]
    (kept,) = [t for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT64 and list(t.dims) == [before]]
    indices = numpy_helper.to_array(kept).copy()
    missing = next(i for i in range(1, 17) if i not in indices)
    indices[-1] = missing
    kept.CopyFrom(numpy_helper.from_array(indices, kept.name))
    onnx.save(file, path)
    wrong = match()
    assert not wrong.exact
    assert not wrong.within_one_step
    assert "LARGER THAN ONE STEP" in wrong.reason
    assert token_facts(cut, data).cuts
