"""What `convert` refuses before it works: options that contradict each other, samples that the job cannot use."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibrate.samples import Array, CalibrationSet
from convert import recipes
from convert.capture import Captured
from convert.compress import batch_size
from convert.errors import TightfitError
from convert.evaluation import evaluation_batches, float_runner

if TYPE_CHECKING:
    from convert.options import Options


def refuse_contradictions(options: "Options") -> None:
    """Raise TightfitError for options that exclude each other, mean nothing here, or name what does not exist."""
    automatic = recipes.automatic(options.recipe)
    chosen = recipes.load(recipes.resolved(options.recipe, "float32"))
    _refuse_token_options(options, chosen)
    budgets = {"--budget-mib": options.budget_mib, "--budget-ms": options.budget_ms}
    for name, value in budgets.items():
        pruned = name == "--budget-ms" and chosen.tokens
        if value is not None and not (automatic or chosen.search or pruned):
            pruning = ", or with one that prunes, such as prune-evit" if name == "--budget-ms" else ""
            raise TightfitError(
                f"{name} lets layers get formats of their own: use it with --recipe mixed or auto{pruning}."
            )
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise TightfitError(f"{name} {value:g} is no budget: give a number above 0.")
    given = [f"--{n}" for n in ("calibration", "evaluation", "labels") if getattr(options, n) is not None]
    if options.synthetic and given:
        raise TightfitError(f"--synthetic and {given[0]} exclude each other; give one of them.")
    if not options.synthetic and options.calibration is None:
        raise TightfitError(
            "calibration data is missing: give --calibration DATA (a .npz, .npy or .jsonl file, a folder of images, or "
            "module:function). To try the tool without data, --synthetic uses random numbers and says so in the report."
        )
    sources = [s for s in (options.calibration, options.evaluation) if s is not None]
    if options.preprocessing is not None and not any(Path(s).is_dir() for s in sources):
        raise TightfitError(
            f"--preprocessing says how a folder of images becomes inputs, but {' and '.join(sources) or 'the data'} is "
            "none: it is used as it is. Leave --preprocessing out, or give the folder."
        )
    if options.name is not None and (options.name.startswith(".") or Path(options.name).name != options.name):
        raise TightfitError(f"--name {options.name} is no name for a file: leave slashes and a leading dot out.")


def spends_on_tokens(recipe: str) -> bool:
    """Whether --budget-ms is met by removing tokens; where layers may get formats of their own, those meet it."""
    chosen = recipes.load(recipes.resolved(recipe, "float32"))
    return chosen.tokens is not None and not chosen.search and not recipes.automatic(recipe)


def _refuse_token_options(options: "Options", chosen: recipes.Recipe) -> None:
    """--keep and --max-drop: only where tokens are removed, in their range, and not in each other's way."""
    for name, value, most in (("--keep", options.keep, 1.0), ("--max-drop", options.max_drop, 100.0)):
        if value is None:
            continue
        if chosen.tokens is None:
            raise TightfitError(
                f"{name} says how many tokens a transformer loses, and the recipe {options.recipe} removes none: use "
                "it with a recipe such as prune-evit, merge-tome or prune-text; `tightfit steps` lists them."
            )
        if not 0 < value < most:
            raise TightfitError(f"{name} {value:g} is out of range: give a number between 0 and {most:g}.")
    timed = options.budget_ms is not None and spends_on_tokens(options.recipe)
    if options.keep is not None and (options.max_drop is not None or timed):
        other = "--max-drop" if options.max_drop is not None else "--budget-ms"
        raise TightfitError(f"--keep and {other} both say how many tokens stay; give one of them.")


def refuse_too_few(captured: Captured, calibration: CalibrationSet, evaluation: CalibrationSet, batch: int) -> None:
    """Raise TightfitError when the samples do not fill one batch."""
    fixed = batch_size(captured, 1)
    if len(calibration) < fixed:
        raise TightfitError(
            f"the model takes {fixed} samples at a time, and there are {len(calibration)} to calibrate with. Give "
            "more, or export the model with a dynamic batch axis."
        )
    unit = math.lcm(fixed, batch)
    if len(evaluation) < unit:
        raise TightfitError(
            f"the artifact takes {batch} samples at a time, and there are {len(evaluation)} to judge it on (a fifth of "
            f"the calibration data, where --evaluation is not given). Give at least {unit}, or a smaller --batch."
        )


def label_notes(captured: Captured, evaluation: CalibrationSet, batch: int, asked: bool) -> list[str]:
    """A note when the data brings labels that this model has no use for.

    Raises TightfitError for a label beyond the model's classes, and for useless ones that were `asked` for.
    """
    if evaluation.labels is None:
        return []
    scores = _first_output(captured, evaluation, batch)
    if scores.ndim != 2 or scores.shape[1] < 2 or not np.issubdtype(scores.dtype, np.floating):
        problem = (
            f"the labels are of no use: the model's first output '{captured.outputs[0]}' ({scores.dtype}, "
            f"{list(scores.shape[1:])} per sample) holds no scores of classes"
        )
        if asked:
            raise TightfitError(f"{problem}. Leave --labels out, or let the model return its scores first.")
        return [problem]
    highest = int(evaluation.labels.max())
    if highest >= scores.shape[1]:
        raise TightfitError(
            f"there is a label {highest}, but the model's output '{captured.outputs[0]}' has {scores.shape[1]} "
            f"classes, 0 to {scores.shape[1] - 1}. Give the labels this model was trained with."
        )
    return []


def _first_output(captured: Captured, evaluation: CalibrationSet, batch: int) -> Array:
    inputs, _ = next(evaluation_batches(captured, evaluation, batch))
    return float_runner(captured)(inputs)[captured.outputs[0]]
