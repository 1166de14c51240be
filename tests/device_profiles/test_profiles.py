"""What every profile that comes with the package must hold."""

import re
import subprocess
import sys
import typing

import pytest

import device_profiles
from device_profiles.kinds import OpKind

TARGETS = ("c", "coreml", "onnx", "tflite")
PROMISED = {
    "raspberry-pi-zero-2w", "raspberry-pi-3b-plus", "raspberry-pi-4b", "raspberry-pi-5",
    "jetson-nano", "jetson-xavier-nx", "jetson-orin-nano", "jetson-agx-orin", "jetson-agx-thor",
    "iphone-a15", "iphone-a17-pro", "apple-m4", "snapdragon-8-gen-2", "snapdragon-8-elite",
    "pixel-tensor", "coral-edgetpu", "generic-x86", "generic-arm64", "generic-riscv64",
}  # fmt: skip

every_profile = pytest.mark.parametrize("name", device_profiles.names())


def test_all_promised_devices_are_there_and_sorted():
    assert set(device_profiles.names()) >= PROMISED
    assert device_profiles.names() == sorted(device_profiles.names())


@every_profile
def test_a_profile_is_named_as_its_file(name: str):
    profile = device_profiles.load(name)
    assert profile.name == name
    assert profile.default_target in TARGETS


@every_profile
def test_a_title_line_is_a_sentence_of_its_own(name: str):
    assert len(device_profiles.title(name)) > 20


@every_profile
@pytest.mark.parametrize("target", TARGETS)
def test_any_profile_has_complete_rules_for_any_target(name: str, target: str):
    rules = device_profiles.load(name).rules(target)
    assert rules.target == target
    assert (rules.opset is not None) == (target == "onnx")
    assert (rules.deployment_target is not None) == (target == "coreml")
    recipes, reasons = rules.recipe.model_dump(), rules.recipe_reason.model_dump()
    assert all(reasons[family].endswith(".") for family in recipes)


@every_profile
@pytest.mark.parametrize("target", TARGETS)
def test_no_recipe_asks_for_what_the_rules_exclude(name: str, target: str):
    rules = device_profiles.load(name).rules(target)
    dynamic = "int8-dynamic" in rules.recipe.model_dump().values()
    assert not (dynamic and (rules.dynamic_scheme == "none" or not rules.dynamic_ops))
    assert set(rules.quantize_outputs) <= set(rules.quantize_inputs)
    assert not set(rules.shared_scale) & set(rules.quantize_outputs)


@every_profile
def test_the_float_format_can_carry_the_quantized_operators(name: str):
    rules = device_profiles.load(name).rules("onnx")
    quantized = "int8" in rules.recipe.model_dump().values()
    # QuantizeLinear takes float16 from opset 19 on.
    assert rules.float_format == "float32" or not quantized or (rules.opset or 0) >= 19


@every_profile
def test_every_fact_has_a_source_and_unverified_ones_say_why(name: str):
    profile = device_profiles.load(name)
    for fact in profile.facts():
        source = profile.source(fact)
        assert source, fact
        assert "unverified" not in source or re.search(r"unverified: \S+|: unverified", source), (fact, source)


@every_profile
def test_cpu_flags_agree_with_the_feature_list(name: str):
    cpu = device_profiles.load(name).cpu
    if cpu.features:
        assert cpu.dotprod == ("asimddp" in cpu.features)
        assert cpu.fp16 == ("asimdhp" in cpu.features)
        assert cpu.i8mm == ("i8mm" in cpu.features)


@every_profile
def test_a_profile_survives_its_own_dump(name: str):
    profile = device_profiles.load(name)
    assert type(profile).model_validate(profile.model_dump()) == profile


def test_recipes_follow_the_hardware():
    def recipe(name: str) -> tuple[str, str]:
        profile = device_profiles.load(name)
        rules = profile.rules(profile.default_target)
        return rules.recipe.cnn, rules.recipe.transformer

    assert recipe("jetson-nano") == ("float16", "float16")
    assert recipe("jetson-orin-nano") == ("int8", "float16")
    assert recipe("iphone-a15") == ("int8-weights", "int8-weights")
    assert recipe("iphone-a17-pro") == ("int8", "int8-weights")
    assert recipe("raspberry-pi-4b") == ("int8", "int8-dynamic")
    assert recipe("coral-edgetpu") == ("int8", "int8")


def test_tensorrt_rules_are_symmetric_and_quantize_only_the_skip_of_a_residual_add():
    for name in ("jetson-xavier-nx", "jetson-orin-nano", "jetson-agx-orin", "jetson-agx-thor"):
        rules = device_profiles.load(name).rules("onnx")
        assert rules.symmetric_activations
        assert rules.activation_dtype == "int8"
        assert rules.residual_add == "skip"
        assert rules.quantize_outputs == ()


def test_8_bit_floats_have_a_device_whose_opset_has_them():
    found = [n for n in device_profiles.names() if (a := device_profiles.load(n).accelerator) and a.fp8]
    assert found == ["jetson-agx-thor"]
    assert (device_profiles.load("jetson-agx-thor").rules("onnx").opset or 0) >= 19


def test_kinds_cover_those_that_graphs_are_sorted_into():
    graph = pytest.importorskip("calibrate.graph")
    assert set(graph.KINDS.values()) | {"other"} == set(typing.get_args(OpKind))


def test_listing_devices_imports_no_heavy_library():
    script = (
        "import sys, device_profiles as d; [d.title(n) for n in d.names()];"
        "print(sorted({'pydantic', 'torch', 'numpy', 'tomllib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
