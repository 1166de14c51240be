"""Binary embeddings from recipe to artifact: the float model's head, what runtimes make of it, how it is judged."""

from dataclasses import replace
from pathlib import Path

import made_reports
import numpy as np
import pytest
import torch
from small_models import Samples, captured
from torch import nn

import targets
from calibrate.graph import layer_name, run
from calibrate.packed_codes import KERNEL, pack
from calibrate.samples import InputSpec
from calibrate.simulation import simulate
from convert import recipes
from convert.compress import Builder, Compressed
from convert.drift import classifies
from convert.embedding_stage import Embedded, embedded
from convert.errors import TightfitError
from convert.evaluation import judge
from convert.planning import decide
from convert.results import match_of
from convert.warnings_of import warnings_of
from device_profiles import load
from targets import Job
from targets.errors import TargetError

WIDTH = 24
DEVICES = {"onnx": "generic-x86-vnni", "tflite": "raspberry-pi-5", "coreml": "iphone-a15"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, WIDTH))


def samples(count: int = 160) -> Samples:
    return Samples("input_1", np.random.default_rng(0).standard_normal((count, 12)).astype(np.float32))


def silent(what: str, done: int, total: int | None = None) -> None:
    pass


def with_head(recipe: str = "binary-embedding") -> Embedded:
    found = embedded(captured(model(), torch.zeros(4, 12)), recipe, samples(), silent, 0)
    assert found is not None
    return found


def made(head: Embedded, target: str, recipe: str = "binary-embedding") -> Compressed:
    decision = decide(head.captured.graph, load(DEVICES[target]), target, recipe)
    return Builder(head.captured, samples(), effort="fast").build(decision)


def job(head: Embedded, result: Compressed) -> Job:
    inputs = tuple(InputSpec(i.name, (1, *i.sample_shape), i.dtype, False) for i in head.captured.inputs)
    return Job("made", result.graph, inputs, head.captured.outputs, result.decision.rules, result.decision.compute)


def recipe_file(folder: Path, quantizer: str, *lines: str) -> str:
    path = folder / "own.toml"
    steps = ["binarize_embedding", "fold_batchnorm", "fuse_activations", quantizer]
    path.write_text("\n".join(['summary = "own"', f"steps = {steps}", *lines]))
    return str(path)


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("planes", [1, 2])
def test_the_artifact_puts_out_the_codes_that_its_simulation_does(target: str, planes: int, tmp_path: Path) -> None:
    module = targets.find(target)
    if module.missing():
        pytest.skip(f"the target needs: {module.missing()}")
    recipe = "binary-embedding"
    if planes == 2:
        recipe = recipe_file(tmp_path, "quantize", "[parameters.binarize_embedding]", "planes = 2")
    head = with_head(recipe)
    result = made(head, target, recipe)
    path = tmp_path / f"made{module.suffix}"
    module.lower(job(head, result), path)
    session = module.open(path)
    judged = judge(head.captured, result, session, samples(64), 1)
    match = match_of(result, judged)
    assert match.within_one_step, match
    assert match.share_equal > 0.99
    assert not judged.classifies
    x = samples(8).array
    codes = np.concatenate([next(iter(session.run({"input_1": row[None]}).values())) for row in x])
    assert codes.dtype == np.float32
    assert pack(codes).shape == (8, planes * WIDTH // 8)
    assert 0.8 < judged.stages["artifact"].cosine <= 1


def test_flips_beyond_what_rounding_makes_are_no_match() -> None:
    head = with_head()
    result = made(head, "onnx")
    call = simulate(result.graph)

    class Flipping:
        """The simulation with every 20th bit turned over."""

        def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            codes = call([torch.from_numpy(batch["input_1"])])[0].numpy().copy()
            codes[:, ::20] *= -1
            return {"output": codes}

    match = match_of(result, judge(head.captured, result, Flipping(), samples(64), 1))  # type: ignore[arg-type]
    assert not match.within_one_step
    assert "bit may flip" in match.reason


def test_drift_counts_the_bits_that_quantizing_flips(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, "quantize_static", "weight = { bits = 2 }")
    head = with_head(recipe)
    result = made(head, "onnx", recipe)
    x = torch.from_numpy(samples(64).array)
    wanted, got = run(head.captured.graph, [x])[0], simulate(result.graph)([x])[0]
    flipped = float((wanted != got).float().mean())

    class Simulated:
        def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"output": simulate(result.graph)([torch.from_numpy(batch["input_1"])])[0].numpy()}

    judged = judge(head.captured, result, Simulated(), samples(64), 1)  # type: ignore[arg-type]
    assert flipped > 0
    assert (1 - judged.stages["artifact"].cosine) / 2 == pytest.approx(flipped)


def test_a_target_without_comparisons_refuses_the_head_by_name(tmp_path: Path) -> None:
    head = with_head()
    decision = decide(head.captured.graph, load("generic-riscv64"), "c", "binary-embedding")
    result = Builder(head.captured, samples(), effort="fast").build(decision)
    with pytest.raises(TargetError, match=r"no kernel for ge \(layer 'binary_embedding.*choose --target onnx"):
        targets.find("c").lower(job(head, result), tmp_path / "made")


def test_the_head_stays_float_and_the_model_does_not() -> None:
    for target in ("onnx", "coreml"):
        ledger = made(with_head(), target).ledger
        heads = [e for e in ledger if e.layer.startswith("binary_embedding")]
        assert all(e.action == "left float" for e in heads), heads
        assert any("int8" in e.action or e.action == "quantized" for e in ledger), ledger


def test_the_plan_has_no_second_head_and_other_recipes_none() -> None:
    plain = captured(model(), torch.zeros(4, 12))
    assert "binarize_embedding" not in decide(plain.graph, load("generic-x86"), "onnx", "binary-embedding").plan.steps
    assert embedded(plain, "int8", samples(), silent, 0) is None
    assert embedded(plain, "auto", samples(), silent, 0) is None


def test_the_users_graph_is_left_as_it_was() -> None:
    plain = captured(model(), torch.zeros(4, 12))
    before = [layer_name(n) for n in plain.graph.graph.nodes]
    embedded(plain, "binary-embedding", samples(), silent, 0)
    assert [layer_name(n) for n in plain.graph.graph.nodes] == before


def test_a_model_without_an_embedding_is_refused() -> None:
    conv = captured(nn.Conv1d(3, 4, 1), torch.zeros(4, 3, 5))
    data = replace(samples(), array=np.zeros((40, 3, 5), np.float32))
    with pytest.raises(TightfitError, match=r"made: binarize_embedding needs an embedding.*Pool over tokens"):
        embedded(conv, "binary-embedding", data, silent, 0)


def test_codes_are_no_class_scores() -> None:
    codes = np.sign(np.random.default_rng(0).standard_normal((20, 16))).astype(np.float32)
    assert not classifies({"output": codes}, None)
    assert classifies({"output": codes * 2}, None)


@pytest.mark.parametrize(("cosine", "warned"), [(0.9, False), (0.7, True)])
def test_a_report_warns_of_many_flipped_bits_and_not_of_few(cosine: float, warned: bool) -> None:
    entry = {"step": "binarize_embedding", "layer": "output 0", "action": "16 numbers become 16 bits", "reason": ""}
    stages = [made_reports.stage("captured", None), made_reports.stage("artifact", 3.0, cosine=cosine)]
    facts = made_reports.result(ledger=[entry], drift={"stages": stages, "layers": [], "first_jump": None})
    said = list(warnings_of(made_reports.report(facts)))
    assert any("15% of the embedding's bits are not the float model's" in s for s in said) == warned
    assert not any("no longer computes" in s for s in said)


def test_the_recipe_is_listed_and_its_kernel_shipped() -> None:
    assert recipes.load("binary-embedding").steps[0] == "binarize_embedding"
    assert "void hamming_search(" in KERNEL.read_text()
