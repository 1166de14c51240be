"""From what was judged to what the report says: drift, match, accuracy, in the report's own nouns."""

import math

from convert.capture import Captured
from convert.compress import Compressed
from convert.evaluation import Judged, compares, output_step
from convert.report import schema

# A stage that loses this much SQNR against the one before is a jump worth naming.
JUMP_DB = 6.0
# float64 sums of float32 differences resolve no more; above it a stage counts as unchanged when jumps are sought.
QUIET_DB = 90.0
# Where rounding decides which of two tokens stays, or a bit of an embedding, the largest move of one draw may be so
# many times another's; so may the mean, which one token more or less hardly changes: a lowering that takes other tokens
# is far beyond both.
DRAW = 2.0


def reason_of(made: Compressed) -> str:
    """Why this recipe, and which layers went back to float."""
    reason = made.decision.reason
    if made.restored:
        reason += f" {len(made.restored)} layers went back to float to hold the drift: {', '.join(made.restored)}."
    for note in made.notes:
        reason = f"{reason.rstrip('.')}. {note}"
    return reason


def drift_of(captured: Captured, judged: Judged) -> schema.Drift:
    """The waterfall from the captured graph to the artifact, the layers, and the first stage that jumps."""
    first = schema.Stage(
        stage="captured",
        sqnr_db=captured.check.sqnr_db,
        cosine=1.0 if captured.check.max_abs == 0 else None,
        max_abs=captured.check.max_abs,
        top1_agreement=None,
    )
    stages = [first]
    for name, drift in judged.stages.items():
        stages.append(
            schema.Stage(
                stage=name,
                sqnr_db=drift.sqnr_db,
                cosine=_finite(drift.cosine),
                max_abs=_finite(drift.max_abs),
                top1_agreement=drift.top1_agreement,
            )
        )
    layers = tuple(schema.LayerDrift(layer=name, sqnr_db=drift.sqnr_db) for name, drift in judged.layers)
    return schema.Drift(stages=tuple(stages), layers=layers, first_jump=_jump(judged))


def _jump(judged: Judged) -> schema.FirstJump | None:
    before = math.inf
    for name, drift in judged.stages.items():
        now = min(drift.sqnr_db, QUIET_DB) if not math.isnan(drift.sqnr_db) else -math.inf
        if min(before, QUIET_DB) - now > JUMP_DB:
            worst = tuple(layer for layer, d in judged.layers[:5] if d.sqnr_db < QUIET_DB)
            return schema.FirstJump(stage=name, worst_layers=worst)
        before = now
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def match_of(made: Compressed, judged: Judged) -> schema.Match:
    """The artifact against the simulation, in steps of the output: its scale where it leaves as codes, else 1/255 of
    its range; or how far the simulation itself moves when float rounding is jittered, where codes come from floats."""
    step = output_step(made.graph)
    moved = judged.unsteady.max_abs if judged.unsteady.outputs else 0.0
    usual, allowed = True, moved
    if made.tokens is not None or compares(made.graph):
        allowed = DRAW * moved
        usual = judged.match.rms <= DRAW * judged.unsteady.rms + 1e-6 * judged.output_range
    base = step if step is not None else judged.output_range / 255
    unit = max(base, allowed)
    difference = judged.match.max_abs
    exact = difference == 0 and judged.match.share_equal == 1
    # An output stored in half precision is itself rounded to one part in 2^11.
    slack = 2.0**-11 * judged.output_range if made.decision.compute == "float16" else 1e-6 * judged.output_range
    within = bool(difference <= unit + slack) and (usual or difference <= base + slack)
    return schema.Match(
        exact=exact,
        max_abs=_finite(difference),
        output_step=_finite(unit),
        within_one_step=within,
        share_equal=judged.match.share_equal,
        reason="" if exact else _why_not_exact(made, step is not None, moved, within),
    )


def _why_not_exact(made: Compressed, codes: bool, moved: float, within: bool) -> str:
    unit = "The step is the output's own scale" if codes else "Outputs are float: the step is 1/255 of their range"
    if moved:
        unit += (
            f", or what the simulation's own outputs move by ({moved:.3g}, measured) under float rounding: of values "
            "about to be quantized or that tokens are chosen by, or of everything in half precision; whichever is more"
        )
    unit += "."
    if made.decision.compute == "float16":
        cause = "Half-precision results depend on where the runtime rounds: after other operators than the simulation."
    elif any(s in ("quantize_static", "quantize_dynamic") for s in made.decision.plan.steps):
        cause = (
            "The runtime adds float32 numbers in another order, so a value that lies between two codes can fall to the "
            "other one, and later layers carry that on."
        )
    else:
        cause = "The runtime adds float32 numbers in another order."
    if made.tokens is not None:
        cause += (
            f" Where two tokens score nearly alike, it may keep the other one: {DRAW:g} times what one draw of such "
            "rounding moves is allowed, in the largest and in the mean square."
        )
    elif compares(made.graph):
        cause += (
            " Where a number behind a bit of the embedding is next to zero, the bit may flip: as many flips as make "
            f"{DRAW:g} times the root mean square that one draw of such rounding makes are allowed."
        )
    return f"{cause} {unit}" + ("" if within else " THE DIFFERENCE IS LARGER THAN ONE STEP: look at the layers.")


def accuracy_of(judged: Judged) -> schema.Accuracy | None:
    """Task accuracy of float and artifact on the same samples; None without labels that fit the outputs."""
    if not judged.labelled:
        return None
    return schema.Accuracy(
        float=judged.correct_float / judged.samples,
        artifact=judged.correct_artifact / judged.samples,
        samples=judged.samples,
        classes=judged.classes,
        per_class=tuple(
            schema.ClassAgreement(
                label=label, samples=seen, agreement=same / seen, float=right / seen, artifact=kept / seen
            )
            for label, (seen, same, right, kept) in sorted(judged.per_class.items())
        ),
    )
