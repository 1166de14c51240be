"""The stage before all steps: tokens are removed as recipe and options ask, for one device and target."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.fx import GraphModule

import targets
from calibrate.samples import InputSpec
from calibrate.tokens.attention import sites
from calibrate.tokens.schedule import Schedule
from convert import recipes, schedules, staircase
from convert.compress import Builder
from convert.errors import TightfitError
from convert.options import Run
from convert.planning import Decision
from convert.pruning import Pruned, Pruner, Scored
from convert.refusals import spends_on_tokens
from convert.token_training import Lessons, trained

# How often a schedule is built whole, measured, and the estimate corrected by what was measured.
ROUNDS = 4
# Every whole number up to this is a half-precision one.
HALF_EXACT = 2048


@dataclass(frozen=True)
class Costs:
    """The cost of a schedule, and in words where it comes from; `measured`: it is milliseconds."""

    of: schedules.Cost
    said: str
    measured: bool


def with_fewer_tokens(run: Run, decision: Decision) -> Run:
    """The run with tokens removed as --keep, --max-drop or the recipe says; the run itself where none are to be."""
    if decision.tokens is None:
        return run
    options, form = run.options, decision.rules.token_form
    pruner = _pruner(run, decision)
    if options.max_drop is None:
        share = options.keep or decision.tokens.keep
        return _shelved(run, (form, share), lambda: _kept(run, pruner, share, form, asked=options.keep is not None))
    costs = costs_of(run, decision, pruner)
    scored, tried = schedules.cheapest(pruner, costs.of, options.max_drop, run.builder.progress)
    scored = trained(pruner, scored, _lessons(run))
    limit = f"while at most {options.max_drop:g} % of the answers change"
    how = f"Tokens were removed {limit}: {_said(scored)}; {costs.said}."
    return _on(run, pruner.pruned(scored, form, how, tried))


def within_budget(run: Run, decision: Decision, make: Callable[[Run], float]) -> Run:
    """The run whose artifact was measured within --budget-ms with the least drift.

    `make` builds and lowers everything for a run and returns the milliseconds at the median; it is called last with
    the run that is returned. Raises TightfitError where the budget cannot be met or no time can be measured.
    """
    budget = run.options.budget_ms
    assert budget is not None
    pruner = _pruner(run, decision)
    costs = costs_of(run, decision, pruner)
    if not costs.measured:
        raise TightfitError(
            f"--budget-ms can't be met for {decision.rules.target}: {costs.said}. Give --keep or --max-drop."
        )
    limit, last = budget, None
    for number in range(ROUNDS):
        run.progress.advance(number, ROUNDS, "token budget")
        scored, tried = schedules.within(pruner, costs.of, limit, run.options.max_drop, run.builder.progress)
        scored = trained(pruner, scored, _lessons(run))
        how = f"Tokens were removed to take at most {budget:g} ms: {_said(scored)}; {costs.said}."
        made = _on(run, pruner.pruned(scored, decision.rules.token_form, how, tried))
        took = make(made)
        if took <= budget:
            return made
        last = took if last is None else min(last, took)
        limit *= 0.98 * budget / took
    raise TightfitError(
        f"no schedule was measured within --budget-ms {budget:g}: the fastest of {ROUNDS} took {last:.3g} ms. Give a "
        "larger budget, or add +int8-dynamic to the recipe."
    )


def meets_budget(run: Run, decision: Decision) -> bool:
    """Whether --budget-ms is to be met by removing tokens."""
    return decision.tokens is not None and run.options.budget_ms is not None and spends_on_tokens(run.options.recipe)


def costs_of(run: Run, decision: Decision, pruner: Pruner) -> Costs:
    """What a schedule costs on this machine in the target's runtime, float; counted where no time can be measured."""
    rules = decision.rules
    target = targets.find(rules.target)
    sample = next(iter(run.samples.evaluation.batches(run.batch)))
    # What is lowered there once serves every device of this command whose rules agree.
    key = f"{rules.target}-{rules.opset}-{rules.deployment_target}-{rules.runtime}-{rules.token_form}"
    folder = run.twins.parent / "stairs" / key
    artifact_inputs = tuple(
        InputSpec(i.name, (run.batch, *i.sample_shape), i.dtype, False) for i in run.captured.inputs
    )

    def lower(graph: GraphModule, path: Path) -> targets.Session:
        job = targets.Job(
            name=run.captured.name,
            graph=graph,
            inputs=artifact_inputs,
            outputs=run.captured.outputs,
            rules=decision.rules,
            compute="float32",
        )
        if not path.exists():
            target.lower(job, path)
        return target.open(path, threads=run.options.threads)

    folder.mkdir(parents=True, exist_ok=True)
    whole = lower(run.captured.graph, folder / f"all{target.suffix}")  # the stairs take it over
    if not whole.measures_latency:
        return Costs(
            staircase.counted,
            f"work was counted, as {whole.executor} shows numerics and its time says nothing about the device",
            measured=False,
        )
    # A fixed pattern costs nothing to choose; where tokens are put back, only the method itself can be cut with.
    pattern = pruner
    if not pruner.restores:
        even = recipes.Tokens("even")
        pattern = Pruner(run.captured, run.builder.judge, even, run.samples.calibration, run.options.seed)
    form = decision.rules.token_form

    def cut(by: Pruner, keep: int) -> GraphModule:
        cuts = ((0, keep),) if keep < by.tokens else ()
        return by.graph(Schedule(by.blocks, by.tokens, cuts), form)

    stairs = staircase.measured(
        pruner.blocks,
        pruner.tokens,
        pruner.protected,
        lambda keep: cut(pattern, keep),
        lambda keep: cut(pruner, keep),
        lower,
        lambda session: session.bind(sample),
        folder,
        target.suffix,
        lambda done, total: run.progress.advance(done, total, "time over tokens"),
    )
    return Costs(stairs.ms, stairs.said(), measured=True)


def _pruner(run: Run, decision: Decision) -> Pruner:
    """One for all devices of this command, so that what is trained is the same in every form of the graph."""
    wanted = decision.tokens
    assert wanted is not None
    refuse_half_ranks(sites(run.captured.graph)[0].tokens, decision)
    key = f"{wanted.method} {sorted(wanted.options.items())}"
    if key not in run.pruners:
        run.pruners[key] = Pruner(run.captured, run.builder.judge, wanted, run.samples.calibration, run.options.seed)
    return run.pruners[key]


def refuse_half_ranks(tokens: int, decision: Decision) -> None:
    """Raise TightfitError where ranks of so many tokens are no exact numbers in the artifact's arithmetic."""
    if decision.compute == "float16" and tokens > HALF_EXACT:
        raise TightfitError(
            f"{decision.rules.target} would compute in half precision there, which counts to {HALF_EXACT} exactly, "
            f"and the model has {tokens} tokens: ranks would round. Add +float32 to the recipe."
        )


def _lessons(run: Run) -> Lessons:
    return Lessons(run.builder.effort, run.builder.progress, run.options.max_drop)


def _kept(run: Run, pruner: Pruner, share: float, form: str, asked: bool) -> Pruned:
    scored, tried = schedules.choose(pruner, share, run.builder.progress)
    scored = trained(pruner, scored, _lessons(run))
    why = "as asked" if asked else "the recipe's default"
    return pruner.pruned(scored, form, f"A share of {share:g} of the tokens is kept, {why}: {_said(scored)}.", tried)


def _said(scored: Scored) -> str:
    """A schedule in words."""
    schedule = scored.schedule
    if not schedule.cuts:
        return "no token has to go"
    counts = " → ".join(str(n) for n in (schedule.tokens, *(keep for _, keep in schedule.cuts)))
    places = ", ".join(str(block + 1) for block, _ in schedule.cuts)
    return (
        f"{counts} tokens behind block {places} of {schedule.blocks}, a mean share of {schedule.share:.2f}, "
        f"{scored.db:.1f} dB on calibration samples"
    )


def _shelved(run: Run, key: object, make: Callable[[], Pruned]) -> Run:
    """What another device of this command had made in the same form, or made now."""
    if key not in run.shelf:
        made = make()
        run.shelf[key] = made, _builder(run, made)
    pruned, builder = run.shelf[key]
    return replace(run, pruned=pruned, builder=builder)


def _on(run: Run, pruned: Pruned) -> Run:
    return replace(run, pruned=pruned, builder=_builder(run, pruned))


def _builder(run: Run, pruned: Pruned) -> Builder:
    old = run.builder
    return Builder(pruned.captured, old.data, old.progress, old.effort, old.seed, run.batch)
