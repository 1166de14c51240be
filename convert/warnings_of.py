"""What a reader must know before any number: the warnings at the top of a report."""

from collections.abc import Iterable, Iterator

from convert.report import words
from convert.report.runs import DeviceRun
from convert.report.schema import Report, Result
from convert.results import JUMP_DB, QUIET_DB

# Below this SQNR (a cosine of about 0.95) an artifact no longer computes what the model does.
BROKEN_DB = 10.0
# Codes of unrelated embeddings differ in half of their bits. A share of flipped bits is (1 - cosine) / 2.
MOST_FLIPPED = 0.1
# How the target `c` names layers whose bits are unpacked: 1.16 times the instructions and time of int8 where both were
# counted and measured (benchmarks/binary_kernels_results.md).
UNPACKED = "int8-w1 "


def warnings_of(report: Report, notes: Iterable[str] = ()) -> Iterator[str]:
    """One sentence each, the gravest first."""
    if report.calibration.synthetic:
        yield "Calibrated and judged on random numbers (--synthetic): every drift below is a guess, none a measurement."
    for result in report.results:
        yield from _of_result(result)
    yield from notes


def _of_result(result: Result) -> Iterator[str]:
    artifact, subject = result.drift.artifact, result.subject
    if artifact.undefined:
        yield f"{subject}: the artifact's outputs cannot be compared: {artifact.undefined}."
    elif any(e.step == "binarize_embedding" for e in result.ledger):
        flipped = (1 - artifact.cosine) / 2 if artifact.cosine is not None else 0.0
        if flipped > MOST_FLIPPED:
            yield (
                f"{subject}: {flipped:.0%} of the embedding's bits are not the float model's: too many. "
                "Take a recipe file whose steps quantize less, with binarize_embedding as the first."
            )
    elif artifact.sqnr_db is not None and artifact.sqnr_db < BROKEN_DB:
        worst = result.drift.first_jump.worst_layers[:3] if result.drift.first_jump else ()
        where = f" Worst layers: {', '.join(worst)}." if worst else ""
        yield (
            f"{subject}: the artifact drifted to {artifact.sqnr_db:.1f} dB against float; it no longer computes what "
            f"the model does.{where} Try --recipe auto, which puts such layers back to float."
        )
    if not result.match.within_one_step:
        yield f"{subject}: the artifact differs from the torch simulation by more than one output step."
    if result.latency and result.latency.surely_slower and not result.recipe.endswith("float32"):
        speedup, cpu = result.latency.speedup, result.latency.cpu
        beside = words.elsewhere(result)
        yield f"{subject}: slower than float here ({speedup:.2f}x on {cpu}){', ' if beside else ''}{beside}."
    if result.latency and not result.latency.stable:
        yield f"{subject}: timing was too unstable to compare; run again on a quiet machine."
    for run in result.runs:
        yield from _of_run(subject, run)
        yield from _kernels_of(result, run)
    unpacked = sum(n for kind, n in result.placement.kinds.items() if kind.startswith(UNPACKED))
    if unpacked:
        yield (
            f"{subject}: {unpacked} layers have weights of one bit and int8 inputs. The C kernels unpack those and "
            "multiply in int8: the file is smaller, and takes more instructions than int8. Where speed counts, choose "
            "--recipe int8."
        )
    if result.placement.fallbacks:
        names = ", ".join(f.node for f in result.placement.fallbacks[:3])
        yield f"{subject}: {len(result.placement.fallbacks)} layers do not run as planned ({names})."


def _kernels_of(result: Result, run: DeviceRun) -> Iterator[str]:
    """Where the kernels at an address compute something else than those here."""
    here, there = result.drift.artifact.sqnr_db, run.drift.sqnr_db if run.drift is not None else None
    if here is not None and there is not None and there < min(here, QUIET_DB) - JUMP_DB:
        yield (
            f"{result.subject}: on {run.on} it drifts to {there:.1f} dB against float, here {here:.1f} dB: the "
            "kernels there compute something else, such as sums of 8-bit products that saturate. Trust the former."
        )


def _of_run(subject: str, run: DeviceRun) -> Iterator[str]:
    if run.failure is not None:
        yield f"{subject}: it does not run on {run.on}: {run.failure}"
    if run.void is not None:
        yield f"{subject}: the times taken on {run.on} are void: {run.void}."
    if run.latency is not None and run.latency.surely_slower:
        yield f"{subject}: slower than float on {run.on} ({run.latency.speedup:.2f}x)."
    counts = run.instructions
    if counts is not None and counts.float_all is not None and counts.all > counts.float_all:
        share = counts.all / counts.float_all
        yield f"{subject}: takes {share:.2f} times the instructions of float on {run.on}: it may well be slower there."
    for warning in run.warnings:
        yield f"{subject} on {run.on}: {warning}"
