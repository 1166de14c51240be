"""Post-training quantization beside the runtimes' own converters: `python benchmarks/ptq.py --help`.

One case is one model in one runtime. Tightfit and the peers convert the same float model with the same samples; one
process then loads every artifact, compares it with float on the same held-out samples, and times all in turns (CPU
time of one thread, medians of rounds). Peers start from the plain export of PyTorch or LiteRT Torch; "float" is
Tightfit's own float artifact. The table prints each case's goal, and the reason where it was missed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import models
import numpy as np
from peers import OnnxSession, Samples, one_by_one
from ptq_cases import CASES, PEERS, PLAIN, Case

import targets
from convert.drift import Drift, classifies
from convert.host import cpu_name, system, versions
from targets._onnx_exact import saturates

HERE = Path(__file__).resolve().parent
ROUNDS = 7
BLOCK_SECONDS = 0.4
MISSED = "missed"


@dataclass
class Entry:
    """One artifact of a case; `note` says why something is missing. `ratio` is CPU time over float's."""

    how: str
    path: str | None = None
    mib: float | None = None
    value: float | None = None
    sqnr_db: float | None = None
    ratio: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass
class Outcome:
    """A case with what came of it; `failure` where Tightfit made nothing."""

    case: Case
    entries: list[Entry] = field(default_factory=list)
    failure: str = ""


def main() -> None:
    """Convert, measure, print and write the table; exit code 1 when Tightfit failed to convert something."""
    options = _options()
    if options.measure:
        print(json.dumps(_measured(json.loads(options.measure))))
        return
    wanted = [c for c in CASES if not options.only or any(o.lower() in c.name.lower() for o in options.only.split(","))]
    if not wanted:
        sys.exit(f"no case holds '{options.only}' in its name; there are: {'; '.join(c.name for c in CASES)}")
    with tempfile.TemporaryDirectory(prefix="ptq-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for case in wanted:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            outcomes.append(run(case, folder, options))
            print("\n".join(_lines(outcomes[-1])), flush=True)
    text = page(outcomes, options)
    options.out.write_text(text)
    if any(o.failure for o in outcomes):
        sys.exit(1)


def run(case: Case, folder: Path, options: argparse.Namespace) -> Outcome:
    """Convert with Tightfit and the peers, then measure all in one process."""
    outcome = Outcome(case)
    try:
        calibration, evaluation = prepare(case.model, folder, options)
    except SystemExit as reason:
        outcome.failure = f"skipped: {reason}"
        return outcome
    out = folder / case.name.replace(" ", "-").replace(",", "").lower()
    made = _tightfit(case, calibration, evaluation, out, options.reuse)
    if isinstance(made, str):
        outcome.failure = made
        return outcome
    result, twin, seconds = made
    ours = Entry(f"tightfit {result['recipe']}", str(out / result["artifact"]), seconds=seconds)
    outcome.entries.append(ours)
    with np.load(calibration) as arrays:
        samples = dict(arrays)
    plain = exported(case, samples, folder) if case.peers else twin
    for peer in case.peers:
        entry = Entry(peer)
        outcome.entries.append(entry)
        path = folder / f"{out.name}-{peer.replace(' ', '-')}{twin.suffix}"
        began = time.perf_counter()
        try:
            PEERS[peer](plain, samples, path)
            entry.path, entry.seconds = str(path), time.perf_counter() - began
        except Exception as error:  # whatever a peer's converter raises becomes its line in the table
            entry.note = f"failed: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
    job = {
        "target": case.target,
        "metric": case.metric,
        "twin": str(twin),
        "evaluation": str(evaluation),
        "paths": [e.path for e in outcome.entries],
        "timed": case.device == "x86",
    }
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        outcome.failure = f"measuring failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
        return outcome
    for entry, found in zip(outcome.entries, json.loads(done.stdout.splitlines()[-1]), strict=True):
        for name, value in (found or {}).items():
            setattr(entry, name, value)
    return outcome


def _tightfit(
    case: Case, calibration: Path, evaluation: Path, out: Path, reuse: bool
) -> tuple[dict, Path, float | None] | str:
    """Run `tightfit convert`; its result, the float twin and the seconds it took, or what it complained of.

    With `reuse` what an earlier run left in `out` is taken as it is.
    """
    kept = out.with_suffix(".json")
    if not (reuse and kept.exists()):
        command = [str(Path(sys.executable).with_name("tightfit")), "convert", f"models:{case.model}", "--json"]
        command += ["--force", "--device", device(case), "--target", case.target, "--recipe", case.recipe]
        command += [*case.options, "--calibration", str(calibration), "--evaluation", str(evaluation), "-o", str(out)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if done.returncode not in (0, 1) or not done.stdout:
            return " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        (result,) = json.loads(done.stdout)["results"]
        kept.write_text(json.dumps({"result": result, "seconds": time.perf_counter() - start}))
    found = json.loads(kept.read_text())
    return found["result"], next((out / device(case) / "float").iterdir()), found["seconds"]


def exported(case: Case, samples: Samples, folder: Path) -> Path:
    """The float model as PyTorch's own exporter, or LiteRT Torch, writes it for one sample: what peers start from."""
    path = folder / f"{case.model}-plain.{case.target}"
    if path.exists():
        return path
    import torch

    torch.set_num_threads(1)
    model = getattr(models, case.model)()
    sample = {name: torch.from_numpy(array[:1]) for name, array in samples.items()}
    if case.target == "onnx":
        torch.onnx.export(model, (), str(path), kwargs=sample, dynamo=True, external_data=False, verbose=False)
    else:
        import litert_torch

        litert_torch.convert(model, sample_kwargs=sample).export(str(path))
    return path


def device(case: Case) -> str:
    """The profile that fits this machine: without VNNI weights of 8 bits would saturate in silence."""
    return ("generic-x86" if saturates() else "generic-x86-vnni") if case.device == "x86" else case.device


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def prepare(model: str, folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """The samples of a model as two files. Exits with the reason when model or data are absent."""
    calibration, evaluation = folder / f"{model}-calibration.npz", folder / f"{model}-evaluation.npz"
    if calibration.exists() and evaluation.exists():
        return calibration, evaluation
    if model == "minilm":
        arrays = models.sentences(128 + options.sentences)
        np.savez(calibration, **{name: a[:128] for name, a in arrays.items()})
        np.savez(evaluation, **{name: a[128:] for name, a in arrays.items()})
    elif model == "deit":
        x = np.random.default_rng(0).standard_normal((40, 3, 224, 224), dtype=np.float32)
        np.savez(calibration, x=x[:16])
        np.savez(evaluation, x=x[16:])
    else:
        np.savez(calibration, x=models.images("train_5000", 256)[0])
        np.savez(evaluation, x=models.images("test_2000", options.images)[0])
    return calibration, evaluation


def _measured(job: dict) -> list[dict | None]:
    """In one process: quality of every artifact against the float twin, and CPU time in turns with it."""
    load = OnnxSession if job["target"] == "onnx" else targets.find(job["target"]).open
    with np.load(job["evaluation"]) as arrays:
        evaluation = dict(arrays)
    twin = load(Path(job["twin"]))
    sessions = [load(Path(p)) if p else None for p in job["paths"]]
    ours = targets.find(job["target"]).open(Path(job["paths"][0]))  # as Tightfit's own session sets the runtime up
    sessions[0] = ours
    found = [_quality(s, twin, evaluation, job["metric"]) if s else None for s in sessions]
    first = next(one_by_one(evaluation))
    ratios: list[float | None] = [None] * len(sessions)
    if job["timed"]:
        ratios = cpu_ratios(twin.bind(first), [s.bind(first) if s else None for s in sessions])
    for entry, path, ratio in zip(found, job["paths"], ratios, strict=True):
        if entry is not None:
            entry |= {"ratio": ratio, "mib": targets.artifact_bytes(Path(path)) / 2**20}
    return found


def _quality(session: object, twin: object, samples: Samples, metric: str) -> dict:
    drift = None
    cosines, same = [], []
    for sample in one_by_one(samples):
        expected, got = twin.run(sample), session.run(sample)
        got = dict(zip(expected, got.values(), strict=True))
        drift = drift or Drift(classifies(expected, None))
        drift.add(expected, got)
        a, b = (next(iter(o.values())).ravel().astype(np.float64) for o in (expected, got))
        cosines.append(float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)))
        same.append(int(a.argmax() == b.argmax()))
    assert drift is not None
    value = {"sqnr": drift.sqnr_db, "cosine": float(np.mean(cosines)), "agreement": float(np.mean(same))}[metric]
    return {"value": value, "sqnr_db": drift.sqnr_db}


def cpu_ratios(float_call: Callable[[], object], calls: list[Callable[[], object] | None]) -> list[float | None]:
    """CPU time of each call over the float call's: medians of rounds in which all take their turn."""
    everyone = [float_call, *calls]
    times: list[list[float]] = [[] for _ in everyone]
    for call in everyone:
        if call:
            call()
    for number in range(ROUNDS):
        order = range(len(everyone)) if number % 2 == 0 else reversed(range(len(everyone)))
        for which in order:
            call = everyone[which]
            if call is None:
                continue
            call()
            count, start = 0, time.process_time()
            while time.process_time() - start < BLOCK_SECONDS:
                call()
                count += 1
            times[which].append((time.process_time() - start) / count)
    base = float(np.median(times[0]))
    return [float(np.median(t)) / base if t else None for t in times[1:]]


def _lines(outcome: Outcome) -> Iterator[str]:
    """The rows of one case."""
    case = outcome.case
    if outcome.failure:
        yield f"| {case.name} | tightfit | {outcome.failure} | | | | |"
        return
    for entry in outcome.entries:
        goal = _verdict(case, outcome) if entry is outcome.entries[0] else ""
        quality = entry.note or _shown(case.metric, entry.value)
        ratio = "" if entry.ratio is None else f"{entry.ratio:.2f}x"
        size = "" if entry.mib is None else f"{entry.mib:.2f}"
        seconds = "" if entry.seconds is None else f"{entry.seconds:.0f}"
        yield f"| {case.name} | {entry.how} | {quality} | {ratio} | {size} | {seconds} | {goal} |"


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return {"sqnr": f"{value:.1f} dB", "cosine": f"cosine {value:.4f}", "agreement": f"{100 * value:.2f} %"}[metric]


def _verdict(case: Case, outcome: Outcome) -> str:
    """Each goal with whether it was reached."""
    ours = outcome.entries[0]
    others = [e for e in outcome.entries[1:] if e.value is not None and e.how != PLAIN]
    found = []
    goal = case.goal
    if goal is None and others:
        goal = max(e.value for e in others)
    if goal is not None and ours.value is not None:
        found.append((f"{_shown(case.metric, goal)}", ours.value >= goal))
    if case.ratio is not None and ours.ratio is not None:
        found.append((f"{case.ratio:.2f}x", ours.ratio <= case.ratio))
    if case.mib is not None and ours.mib is not None:
        found.append((f"{case.mib:g} MiB", ours.mib <= case.mib))
    return ", ".join(f"{text} {'reached' if good else MISSED}" for text, good in found)


def page(outcomes: list[Outcome], options: argparse.Namespace) -> str:
    """The table as a Markdown page, with where and how it was made."""
    where = f"{datetime.date.today().isoformat()}, {cpu_name()}, {system()}; "
    where += ", ".join(f"{name} {version}" for name, version in versions().items())
    where += f". Device profile: {device(CASES[0])}"
    head = "| case | how | drift or agreement | CPU time / float | MiB | s | goal |\n|---|---|---|---:|---:|---:|---|"
    rows = "\n".join(line for o in outcomes for line in _lines(o))
    reasons = "".join(f"- {o.case.name}: {o.case.why}.\n" for o in outcomes if o.entries and _missed(o))
    text = (
        f"# Results of `ptq.py`\n\n{where}\n\n256 calibration images and {options.images} test images, or 128 and "
        f"{options.sentences} sentences of 64 tokens; DeiT-tiny has random weights. Peers start from the plain "
        "export; float is Tightfit's own float artifact. CPU time of one thread, every "
        f"artifact of a case in one process, in turns, medians of {ROUNDS} rounds. `s`: wall seconds of the whole "
        "conversion; Tightfit's lowers the float twin, compares and times as well.\n\n"
    )
    return f"{text}{head}\n{rows}\n" + (f"\nWhy goals were missed:\n\n{reasons}" if reasons else "")


def _missed(outcome: Outcome) -> bool:
    return bool(outcome.case.why) and MISSED in _verdict(outcome.case, outcome)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="cases whose name holds this; several with commas")
    parser.add_argument("--images", type=int, default=2000, help="test images (%(default)s)")
    parser.add_argument("--sentences", type=int, default=500, help="test sentences (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and artifacts there")
    parser.add_argument("--reuse", action="store_true", help="take Tightfit's conversions that --keep holds already")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "ptq_results.md", help="(ptq_results.md beside this)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
