"""From recipe, profile and model to a plan: what is quantized and how, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.fx import GraphModule

from calibrate.graph import constant_made, is_table, is_weighted, kind, layer_name
from calibrate.plan import Plan, WeightFormat
from calibrate.simulation import Adder
from convert import recipes
from convert.errors import TightfitError
from device_profiles import DeviceProfile, TargetRules

Family = Literal["cnn", "transformer", "other"]
# An artifact of `auto` whose simulation falls below this against float gets layers back in float until it does not.
# 20 dB is a cosine of 0.995; the drift of int8 that works is 25 dB and more.
AUTO_FLOOR_DB = 20.0
# LiteRT has no tables: levels of a row are codes of 4 bits there, elsewhere indices of 2 bits into finer ones.
LARGEST_LEVEL = {"litert": 7}
STEP_OF = {"int8": "quantize_static", "int8-dynamic": "quantize_dynamic", "int8-weights": "quantize_weights"}


@dataclass(frozen=True)
class Decision:
    """`plan` and `compute` for one device and target.

    `automatic`: Tightfit chose and may improve on it; `floor_db` is then set where layers may go back to float to
    hold it.
    `search`: "mixed" where layers are to get formats of their own. `tokens`: what is cut out of a transformer before.
    """

    recipe: str
    reason: str
    plan: Plan
    compute: Literal["float32", "float16"]
    rules: TargetRules
    floor_db: float | None
    automatic: bool = False
    search: str | None = None
    tokens: recipes.Tokens | None = None

    @property
    def adder(self) -> Adder:
        """How the runtime's kernels add codes: what the simulation is to follow."""
        return "fixed_point" if self.rules.runtime in ("litert", "c99") else "float"


def family(graph: GraphModule) -> Family:
    """What sort of network this is, by its operators: attention makes a transformer, convolutions alone a CNN."""
    kinds = {kind(n) for n in graph.graph.nodes}
    if "attention" in kinds or {"softmax", "matmul", "layer_norm"} <= kinds:
        return "transformer"
    return "cnn" if "conv" in kinds else "other"


def decide(graph: GraphModule, profile: DeviceProfile, target: str, recipe: str) -> Decision:
    """The plan for `target` on `profile`. `recipe` is NAME[+NAME...], `auto` among them or alone, or a TOML file."""
    rules = profile.rules(target)
    automatic = recipes.automatic(recipe)
    sort = family(graph)
    name = recipes.resolved(recipe, getattr(rules.recipe, sort))
    chosen = recipes.load(name)
    reason = getattr(rules.recipe_reason, sort) if automatic else "asked for on the command line"
    return planned(graph, chosen, rules, profile, reason, automatic)


def planned(
    graph: GraphModule,
    chosen: recipes.Recipe,
    rules: TargetRules,
    profile: DeviceProfile,
    reason: str,
    automatic: bool = False,
) -> Decision:
    """The plan of one recipe under a target's rules. Raises TightfitError for what the device cannot run."""
    # Embeddings became bits in the captured model already (convert/embedding_stage.py).
    own = tuple(s for s in chosen.steps if s != "binarize_embedding")
    steps = _resolved(own, rules, family(graph))
    _refuse_impossible(chosen, steps, rules, profile)
    compute = chosen.compute or rules.float_format
    wide = chosen.activation_bits == 16
    plan = Plan(
        steps=steps,
        activation="int16" if wide else rules.activation_dtype,
        symmetric=wide or rules.symmetric_activations,
        per_channel=rules.per_channel,
        weight_max=rules.weight_max,
        int32_bias=rules.runtime != "coreml" and compute == "float32" and not wide,
        half_scales=compute == "float16",
        quantize_inputs=frozenset(rules.quantize_inputs),
        quantize_outputs=frozenset(rules.quantize_outputs),
        shared_scale=frozenset(rules.shared_scale),
        fixed_output={k: (v.scale, v.zero_point) for k, v in rules.fixed_output.items()},
        residual_add=rules.residual_add,
        dynamic_scheme=rules.dynamic_scheme if rules.dynamic_scheme != "none" else "tensor_uint8",
        dynamic_kinds=frozenset(rules.dynamic_ops),
        weight=chosen.weight,
        formats={**_tables(graph, chosen), **_ends(graph, chosen)},
        parameters=_told(chosen, steps, rules),
    )
    floor = AUTO_FLOOR_DB if automatic and any(recipes.quantizes(s) for s in steps) else None
    label = f"{recipes.AUTO}: {chosen.name}" if automatic else chosen.name
    half: Literal["float32", "float16"] = "float16" if compute == "float16" else "float32"
    return Decision(label, reason, plan, half, rules, floor, automatic, chosen.search, chosen.tokens)


def _resolved(steps: tuple[str, ...], rules: TargetRules, sort: Family) -> tuple[str, ...]:
    """The steps with the stand-in `quantize` replaced by what the profile picks for this kind of network."""
    picked = STEP_OF.get(getattr(rules.recipe, sort), "quantize_weights")
    if "binarize" in steps and rules.runtime == "coreml":  # its int8 kernels read int8 codes alone, no palettes
        picked = "quantize_weights"
    return tuple(picked if s == recipes.QUANTIZE else s for s in steps)


def _told(chosen: recipes.Recipe, steps: tuple[str, ...], rules: TargetRules) -> dict[str, Mapping[str, Any]]:
    """What the recipe tells its steps, and what the runtime's storage tells the one that binarizes."""
    largest = LARGEST_LEVEL.get(rules.runtime)
    if "binarize" not in steps or largest is None:
        return chosen.parameters
    return {**chosen.parameters, "binarize": {"largest": largest, **chosen.parameters.get("binarize", {})}}


def _ends(graph: GraphModule, chosen: recipes.Recipe) -> dict[str, WeightFormat]:
    """The first and the last layer in the recipe's `ends_bits`: they are small, and errors there cost most."""
    if chosen.ends_bits is None:
        return {}
    layers = weighted_layers(graph)
    wide = replace(chosen.weight, bits=chosen.ends_bits, group=None)
    return {layers[i]: wide for i in (0, -1)} if layers else {}


def _tables(graph: GraphModule, chosen: recipes.Recipe) -> dict[str, WeightFormat]:
    """Embedding tables in groups of their own: half of a small encoder's weights, where an error costs little."""
    group = chosen.tables_group
    if group is None:
        return {}
    fixed = constant_made(graph.graph.nodes)
    tables = {layer_name(n): n for n in graph.graph.nodes if is_table(n, fixed)}
    return {
        name: replace(chosen.weight, group=group)
        for name, node in tables.items()
        if int(node.meta["val"].shape[-1]) % group == 0
    }


def weighted_layers(graph: GraphModule, tables: bool = False) -> list[str]:
    """Names of the conv and linear layers with constant weights, in order; with `tables` the embeddings too."""
    fixed = constant_made(graph.graph.nodes) if tables else set()
    nodes = [n for n in graph.graph.nodes if is_weighted(n) or (tables and is_table(n, fixed))]
    return list(dict.fromkeys(layer_name(n) for n in nodes))


def _refuse_impossible(
    recipe: recipes.Recipe, steps: tuple[str, ...], rules: TargetRules, profile: DeviceProfile
) -> None:
    """Say no, with a way out, to what would come out as a file that the device does not run as asked."""
    where = f"{profile.name} runs {rules.target} with {rules.runtime}, which"
    kind_ = recipe.weight.kind
    if "quantize_dynamic" in steps and rules.dynamic_scheme == "none":
        raise TightfitError(
            f"{where} cannot quantize activations at run time. "
            "Use --recipe int8-weights for size, or --recipe int8 for static int8."
        )
    if recipe.activation_bits == 16 and rules.runtime != "litert":
        raise TightfitError(
            f"{where} has no kernels for 16-bit activations. Use --target tflite, or --recipe int8-weights, which "
            "keeps activations in float."
        )
    if "binarize" in steps and rules.runtime in ("tensorrt", "edgetpu"):
        small = "4-bit weights: use --recipe w4" if rules.runtime == "tensorrt" else "int8: use --recipe int8"
        raise TightfitError(f"{where} has no weights of one or two bits. The smallest it runs is {small}.")
    if "binarize_activations" in steps and rules.runtime == "coreml":
        raise TightfitError(
            f"{where} has int8 kernels for codes of 8 bits alone, so signs would save nothing. Use "
            "--recipe binary, whose activations stay float."
        )
    if kind_ == "palette" and rules.target != "coreml":
        raise TightfitError(f"{where} has no palettes, a Core ML format. Use --recipe w4 for 4-bit weights.")
    if kind_.startswith("float8") and not (profile.accelerator and profile.accelerator.fp8):
        raise TightfitError(
            f"{profile.name} has no arithmetic for 8-bit floats, as far as its profile says (accelerator.fp8). "
            "Use --recipe int8 or float16."
        )
    if kind_.startswith("float8") and rules.target != "onnx":
        raise TightfitError(f"{rules.target} has no 8-bit floats. Use --target onnx, for TensorRT.")


def keeping_float(decision: Decision, layers: dict[str, str]) -> Decision:
    """The same decision with these layers (name -> reason) left float."""
    plan = replace(decision.plan, keep_float={**decision.plan.keep_float, **layers})
    return replace(decision, plan=plan)


def with_formats(decision: Decision, formats: dict[str, WeightFormat]) -> Decision:
    """The same decision with these layers' weights (name -> format) stored so."""
    return replace(decision, plan=replace(decision.plan, formats={**decision.plan.formats, **formats}))


def with_levels(decision: Decision, levels: dict[str, str]) -> Decision:
    """The same decision with these layers (name -> binarizer) at two to four levels, and no others."""
    if "binarize" not in decision.plan.steps:
        return decision
    return replace(decision, plan=replace(decision.plan, levels=levels))
