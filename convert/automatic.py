"""The recipe `auto`: cheap steps that help are kept, heavier ones follow only while the drift goal is missed.

What helps is judged on calibration samples that the steps did not look at, by the simulation of the whole model:
scores of single layers mislead. Choices here depend on numbers, not on the clock: the same input gives the same file,
where no step was stopped by a time limit of its own.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from calibrate import steps as known
from calibrate.plan import Entry, Plan
from convert import recipes
from convert.compress import Builder, Compressed, Effort
from convert.planning import Decision, keeping_float

# What may be added to a recipe of `auto`, in the order in which steps run; "*" marks where the quantizing step stands.
ORDER = (
    "fold_batchnorm",
    "fuse_activations",
    "equalize",
    "rotate",
    "balance_heads",
    "smooth",
    "reparameterize_layernorm",
    "split_outliers",
    "*",
    "ridge",
    "gptq",
    "reconstruct",
    "correct_bias",
    "finetune",
)
# Tried one after the other, the likeliest to help first: ALWAYS, or where the diagnosis names what it stands for.
ALWAYS = {
    "quantize_static": ("gptq", "equalize", "correct_bias"),
    "quantize_dynamic": ("gptq", "correct_bias"),
    "quantize_weights": ("gptq", "correct_bias"),
}
NAMED: dict[str, dict[str, tuple[str, ...]]] = {
    "quantize_static": {"smooth": ("smooth", "balance_heads", "reparameterize_layernorm", "rotate")},
    "quantize_dynamic": {"smooth": ("smooth", "rotate")},
    "quantize_weights": {},
}
# Parameters of a step that are tried one after the other, the cheaper on the device first.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"smooth": ({}, {"explicit": "all"})}
HEAVY = ("split_outliers", "ridge", "reconstruct", "finetune")
# A step is kept for a gain of this much, which is more than the choice of samples makes.
GAIN_DB = 0.1


def improve(builder: Builder, decision: Decision, goal_db: float, effort: Effort) -> Compressed:
    """The best that `auto` finds within `effort` for a decision of its own making.

    "fast" applies the recipe alone; "normal" tries the cheap steps, and puts layers back to float while the simulation
    stays below `goal_db` on calibration samples; "max" tries the heavy steps before that, whatever the goal.
    """
    search = _Search(builder, decision)
    if effort != "fast":
        search.diagnosis = builder.look("diagnose", decision.plan)
        search.try_all(_cheap(decision, {e.action for e in search.diagnosis}))
    if effort == "max" or (effort == "normal" and search.score < goal_db):
        search.try_all(HEAVY if effort == "max" else HEAVY[:2])
    if search.score < goal_db:
        search.restore(goal_db)
    return search.result()


class _Search:
    """The best so far, its score, and what was tried."""

    def __init__(self, builder: Builder, decision: Decision) -> None:
        self.builder = builder
        self.best = builder.build(decision)
        self.score = self.start = builder.score(self.best)
        self.tried: list[Entry] = []
        self.diagnosis: list[Entry] = []

    def try_all(self, names: Iterable[str]) -> None:
        """Add each step where it belongs, or take it out where the recipe has it, and keep what scores better."""
        wanted = list(names)
        for count, name in enumerate(wanted):
            self.builder.progress(f"try {name}", count, len(wanted))
            if name in self.best.decision.plan.steps:
                self._without(name)
                continue
            for parameters in VARIANTS.get(name, ({},)):
                self._with(name, parameters)

    def _without(self, name: str) -> None:
        plan = self.best.decision.plan
        made, score = self._built(plan, tuple(s for s in plan.steps if s != name), {})
        helps = self.score > score + GAIN_DB
        self._note(name, helps, self.score, score)
        if not helps:
            self.best, self.score = made, score

    def _with(self, name: str, parameters: dict[str, Any]) -> None:
        plan = self.best.decision.plan
        present = name in plan.steps  # a dearer variant of what was kept
        steps = plan.steps if present else placed(plan.steps, name)
        made, score = self._built(plan, steps, {name: parameters} if parameters else {})
        label = name + "".join(f" ({key} {value})" for key, value in parameters.items())
        if not present and _idle(made, name):
            self.tried.append(Entry("auto", label, "not needed", _idle_reason(made, name)))
            return
        helps = score > self.score + GAIN_DB
        self._note(label, helps, score, self.score)
        if helps:
            self.best, self.score = made, score

    def _built(
        self, plan: Plan, steps: tuple[str, ...], parameters: dict[str, dict[str, Any]]
    ) -> tuple[Compressed, float]:
        told = {**plan.parameters, **parameters}
        made = self.builder.build(replace(self.best.decision, plan=replace(plan, steps=steps, parameters=told)))
        return made, self.builder.score(made)

    def _note(self, label: str, helps: bool, with_it: float, without: float) -> None:
        figures = f"the simulation has {with_it:.1f} dB with it and {without:.1f} dB without"
        self.tried.append(Entry("auto", label, "kept" if helps else "left out", figures))

    def restore(self, goal_db: float) -> None:
        """Put back the layers that hurt most, judged one by one, until the goal holds or nothing is quantized."""
        decision, reached = self.best.decision, self.score
        names = [s for s in decision.plan.steps if not known.refines(s)]
        plain = replace(decision, plan=replace(decision.plan, steps=tuple(names)))
        layers = quantized_layers(self.best)
        scores = []
        for count, layer in enumerate(layers):
            others = {name: "float while one layer is judged" for name in layers if name != layer}
            scores.append((self.builder.score(self.builder.build(keeping_float(plain, others))), layer))
            self.builder.progress("sensitivity", count + 1, len(layers))
        ranked = [layer for _, layer in sorted(scores)]
        stride = max(1, len(ranked) // 12)
        reason = f"put back to float by auto: with it the simulation had {reached:.1f} dB, below {goal_db:.0f} dB"
        for count in [*range(stride, len(ranked), stride), len(ranked)]:
            chosen = dict.fromkeys(ranked[:count], reason)
            made = self.builder.build(keeping_float(decision, chosen))
            self.best, self.score = replace(made, restored=chosen), self.builder.score(made)
            if self.score >= goal_db:
                break

    def result(self) -> Compressed:
        """The best, with the trials in its ledger and a sentence on what they brought."""
        kept = [e.layer for e in self.tried if e.action == "kept"]
        note = f"On calibration samples the simulation has {self.score:.1f} dB"
        if kept and self.score > self.start:
            note += f"; {', '.join(kept)} helped"
        return replace(self.best, ledger=(*self.best.ledger, *self.diagnosis, *self.tried), notes=(f"{note}.",))


def quantized_layers(made: Compressed) -> list[str]:
    """The layers that the quantizing step of `made` turned into codes, in order, each once."""
    found = [
        e.layer
        for e in made.ledger
        if recipes.quantizes(e.step) and not e.action.startswith("left") and e.layer != "model"
    ]
    return list(dict.fromkeys(found))


def _cheap(decision: Decision, advice: set[str]) -> tuple[str, ...]:
    """The steps to try: those that a finding asks for first, as they remove what the others would work around."""
    quantizer = next((s for s in decision.plan.steps if recipes.quantizes(s)), "")
    named = [step for word, names in NAMED.get(quantizer, {}).items() if word in advice for step in names]
    return (*named, *ALWAYS.get(quantizer, ()))


def placed(present: tuple[str, ...], name: str) -> tuple[str, ...]:
    """`present` with `name` where ORDER wants it."""

    def rank(step: str) -> int:
        if recipes.quantizes(step):
            return ORDER.index("*")
        return ORDER.index(step) if step in ORDER else len(ORDER)

    return tuple(sorted((*present, name), key=rank))


def _idle(made: Compressed, name: str) -> bool:
    """Whether the step found nothing to change."""
    entries = [e for e in made.ledger if e.step == name]
    return all(e.action.startswith(("left", "kept")) for e in entries)


def _idle_reason(made: Compressed, name: str) -> str:
    reasons = [e.reason for e in made.ledger if e.step == name and e.reason]
    return reasons[0] if reasons else "it found nothing to change"
