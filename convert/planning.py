"""From recipe, profile and model to a plan: what is quantized and how, and why."""

from dataclasses import dataclass, replace
from typing import Literal

from torch.fx import GraphModule

from calibrate.graph import kind
from calibrate.plan import Plan
from convert import recipes
from convert.errors import TightfitError
from device_profiles import DeviceProfile, TargetRules

Family = Literal["cnn", "transformer", "other"]
# An artifact of `auto` whose simulation falls below this against float gets layers back in float until it does not.
# 20 dB is a cosine of 0.995; the drift of int8 that works is 25 dB and more.
AUTO_FLOOR_DB = 20.0


@dataclass(frozen=True)
class Decision:
    """`plan` and `compute` for one device and target; `floor_db` is set when layers may go back to float to hold it."""

    recipe: str
    reason: str
    plan: Plan
    compute: Literal["float32", "float16"]
    rules: TargetRules
    floor_db: float | None


def family(graph: GraphModule) -> Family:
    """What sort of network this is, by its operators: attention makes a transformer, convolutions alone a CNN."""
    kinds = {kind(n) for n in graph.graph.nodes}
    if "attention" in kinds or {"softmax", "matmul", "layer_norm"} <= kinds:
        return "transformer"
    return "cnn" if "conv" in kinds else "other"


def decide(graph: GraphModule, profile: DeviceProfile, target: str, recipe: str) -> Decision:
    """The plan for `target` on `profile`. `recipe` is `auto`, NAME[+NAME...] or a TOML file."""
    rules = profile.rules(target)
    automatic = recipe == recipes.AUTO
    sort = family(graph)
    name = getattr(rules.recipe, sort) if automatic else recipe
    chosen = recipes.load(name)
    reason = getattr(rules.recipe_reason, sort) if automatic else "asked for on the command line"
    _refuse_impossible(chosen, rules, profile, target)
    compute = chosen.compute or rules.float_format
    plan = Plan(
        steps=chosen.steps,
        activation=rules.activation_dtype,
        symmetric=rules.symmetric_activations,
        per_channel=rules.per_channel,
        weight_max=rules.weight_max,
        int32_bias=rules.runtime != "coreml" and compute == "float32",
        half_scales=compute == "float16",
        quantize_inputs=frozenset(rules.quantize_inputs),
        quantize_outputs=frozenset(rules.quantize_outputs),
        shared_scale=frozenset(rules.shared_scale),
        fixed_output={k: (v.scale, v.zero_point) for k, v in rules.fixed_output.items()},
        residual_add=rules.residual_add,
        dynamic_scheme=rules.dynamic_scheme if rules.dynamic_scheme != "none" else "tensor_uint8",
        dynamic_kinds=frozenset(rules.dynamic_ops),
    )
    quantizes = any(s.startswith("quantize_") for s in chosen.steps)
    floor = AUTO_FLOOR_DB if automatic and quantizes else None
    label = f"{recipes.AUTO}: {chosen.name}" if automatic else chosen.name
    return Decision(label, reason, plan, "float16" if compute == "float16" else "float32", rules, floor)


def _refuse_impossible(recipe: recipes.Recipe, rules: TargetRules, profile: DeviceProfile, target: str) -> None:
    if "quantize_dynamic" in recipe.steps and rules.dynamic_scheme == "none":
        raise TightfitError(
            f"{profile.name} runs {target} with {rules.runtime}, which cannot quantize activations at run time. "
            "Use --recipe int8-weights for size, or --recipe int8 for static int8."
        )


def keeping_float(decision: Decision, layers: dict[str, str]) -> Decision:
    """The same decision with these layers (name -> reason) left float."""
    plan = replace(decision.plan, keep_float={**decision.plan.keep_float, **layers})
    return replace(decision, plan=plan)
