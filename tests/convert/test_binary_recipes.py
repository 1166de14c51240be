"""The recipes of one to two bits: what they plan for each runtime, and who is refused with a way out."""

import pytest
import torch
from torch import nn

from convert import recipes
from convert.errors import TightfitError
from convert.planning import decide
from device_profiles import load

RECIPES = ("binary", "binary-planes", "ternary")


@pytest.fixture(scope="module")
def cnn() -> torch.fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return torch.export.export(model.eval(), (torch.zeros(1, 3, 8, 8),)).module(check_guards=False)


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_follows_the_quantizing_step_that_the_profile_picks(name: str, cnn: torch.fx.GraphModule) -> None:
    for device, target, quantizing in (
        ("generic-x86-vnni", "onnx", "quantize_static"),
        ("raspberry-pi-5", "tflite", "quantize_static"),
        ("apple-m4", "coreml", "quantize_weights"),  # though int8 there is static: its kernels read no palettes
        ("iphone-a15", "coreml", "quantize_weights"),
    ):
        plan = decide(cnn, load(device), target, name).plan
        assert plan.steps.index("binarize") == plan.steps.index(quantizing) + 1
        assert plan.weight.bits == 8  # what is not binarized


def test_levels_are_codes_of_four_bits_where_the_runtime_has_no_tables(cnn: torch.fx.GraphModule) -> None:
    told = {
        target: decide(cnn, load(device), target, "binary-planes").plan.parameters["binarize"]
        for device, target in (("raspberry-pi-5", "tflite"), ("generic-x86-vnni", "onnx"), ("apple-m4", "coreml"))
    }
    assert told["tflite"]["largest"] == 7
    assert "largest" not in told["onnx"]
    assert "largest" not in told["coreml"]


@pytest.mark.parametrize("name", RECIPES)
def test_runtimes_without_such_weights_are_refused_with_the_smallest_they_have(
    name: str, cnn: torch.fx.GraphModule
) -> None:
    with pytest.raises(TightfitError, match=r"no weights of one or two bits\. The smallest it runs is int8"):
        decide(cnn, load("coral-edgetpu"), "tflite", name)
    with pytest.raises(TightfitError, match="The smallest it runs is 4-bit weights: use --recipe w4"):
        decide(cnn, load("jetson-orin-nano"), "onnx", name)


def test_two_of_them_cannot_be_joined() -> None:
    with pytest.raises(TightfitError, match="binarizes the same layers twice"):
        recipes.load("binary+ternary")


def test_the_recipe_with_signs_for_activations_is_static_everywhere_and_says_what_it_needs(
    cnn: torch.fx.GraphModule,
) -> None:
    for device, target in (("generic-x86-vnni", "onnx"), ("raspberry-pi-5", "tflite"), ("generic-riscv64", "c")):
        plan = decide(cnn, load(device), target, "binary-full").plan
        assert plan.steps[-6:-3] == ("quantize_static", "binarize_activations", "ridge")
        assert plan.steps[-3:] == ("finetune:signs", "binarize", "finetune"), "weights behind a first training"
    assert "needs recovery" in recipes.load("binary-full").summary
    with pytest.raises(TightfitError, match="signs would save nothing"):
        decide(cnn, load("apple-m4"), "coreml", "binary-full")


def test_auto_never_tries_signs_for_activations(cnn: torch.fx.GraphModule) -> None:
    from device_profiles import names

    for device in names():
        profile = load(device)
        assert "binarize_activations" not in decide(cnn, profile, profile.default_target, "auto").plan.steps


def test_auto_joined_with_bits_of_embeddings_says_that_they_quantize_already(cnn: torch.fx.GraphModule) -> None:
    with pytest.raises(TightfitError, match="binary-embedding already quantizes as the device's profile picks"):
        decide(cnn, load("raspberry-pi-5"), "tflite", "auto+binary-embedding")


@pytest.mark.parametrize("name", RECIPES)
def test_every_device_plans_them_or_names_a_recipe_it_has(name: str, cnn: torch.fx.GraphModule) -> None:
    from device_profiles import names

    for device in names():
        profile = load(device)
        if profile.rules(profile.default_target).runtime in ("tensorrt", "edgetpu"):
            with pytest.raises(TightfitError, match=rf"^{device} .* use --recipe"):
                decide(cnn, profile, profile.default_target, name)
        else:
            assert "binarize" in decide(cnn, profile, profile.default_target, name).plan.steps
