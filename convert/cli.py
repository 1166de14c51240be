"""The command line: arguments in, printing out; everything else happens elsewhere, imported when a command runs."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from convert.cli_emulator import app as emulator

app = typer.Typer(
    name="tightfit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help imports Markdown and more, half of the time that --help takes
    help="Fit a trained model onto a small device, and prove what came out.\n\n"
    "Start with `tightfit demo`, then `tightfit convert --help`.",
    epilog="Exit codes: 0 good, 1 a gate failed, 2 bad input or usage, 3 something is not installed.",
)
app.add_typer(emulator, name="emulator")

Device = Annotated[
    list[str] | None,
    typer.Option("--device", "-d", metavar="NAME", help="A device, or ./my-board.toml; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights for module:function.")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SPEC", help="Such as x:float32:1x3x32x32; repeatable."),
]
Python = Annotated[Path | None, typer.Option(metavar="PATH", help="Interpreter for module:function.")]
On = Annotated[
    list[str] | None,
    typer.Option("--on", metavar="ADDR", help="Run there too: emulated:BOARD, ssh://HOST, adb:; repeatable."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer timed calls.")]
MaxInstructions = Annotated[
    int | None, typer.Option("--max-instructions", min=1, metavar="N", help="Gate: per inference, on emulated boards.")
]
Threads = Annotated[int, typer.Option(min=1, metavar="N", show_default=False, help="Threads to use (1).")]


@app.command(
    epilog="Example: tightfit convert model.onnx -d raspberry-pi-4b -d iphone-a17-pro --calibration images.npz -o out"
)
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2, a .onnx, or module:function.")],
    device: Device = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help=".npz .npy .jsonl FOLDER module:function.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", show_default=False, help="Where it goes (./tightfit-out).")
    ] = Path("tightfit-out"),
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", metavar="NAME", help="onnx, tflite, coreml, c; repeatable.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", show_default=False, help="auto, int8, float16, ...; join by +.")
    ] = "auto",
    effort: Annotated[
        str, typer.Option(metavar="LEVEL", show_default=False, help="fast, normal (default) or max.")
    ] = "normal",
    budget_mib: Annotated[float | None, typer.Option(metavar="MIB", help="Mixed precision: at most so large.")] = None,
    budget_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Mixed precision or pruning: at most so slow, as measured here.")
    ] = None,
    keep: Annotated[float | None, typer.Option(metavar="R", help="Pruning: mean share of tokens kept (0.7).")] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="P", help="Pruning: at most P % of the answers may change.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(metavar="DATA", help="Held-out samples (else a fifth).")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="Their class labels (.npy).")] = None,
    preprocessing: Annotated[Path | None, typer.Option(metavar="FILE", help="How images become inputs (TOML).")] = None,
    samples: Annotated[int | None, typer.Option(min=2, metavar="N", help="At most N calibration samples.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Batch size of the artifact (1).")] = None,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(metavar="N", show_default=False, help="Seed of every random choice (0).")] = 0,
    min_speedup: Annotated[float | None, typer.Option(metavar="X", help="Gate: float time / its time.")] = None,
    min_sqnr: Annotated[float | None, typer.Option(metavar="DB", help="Gate: signal to noise ratio.")] = None,
    min_agreement: Annotated[float | None, typer.Option(metavar="P", help="Gate: equal top-1, from 0 to 1.")] = None,
    max_fallback: Annotated[int | None, typer.Option(metavar="N", help="Gate: layers that fell back.")] = None,
    on: On = None,
    quick: Quick = False,
    max_instructions: MaxInstructions = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="No data: random numbers, marked.")] = False,
    weights: Weights = None,
    input_: Input = None,
    python: Python = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the artifacts.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    json: Json = False,
) -> None:
    """Turn a trained model into checked artifacts for named devices."""
    from convert.capture import parse_input
    from convert.errors import TightfitError
    from convert.gates import Budget
    from convert.options import Options
    from convert.pipeline import convert as run

    names = _split(device)
    if not names:
        raise TightfitError("which device is it for? Give --device NAME; `tightfit devices` lists the names.")
    gates = {
        "min_speedup": min_speedup,
        "min_sqnr_db": min_sqnr,
        "min_agreement": min_agreement,
        "max_fallbacks": max_fallback,
        "max_bytes": None if budget_mib is None else int(budget_mib * 2**20),
        "max_p50_ms": budget_ms,
        "max_instructions": max_instructions,
    }
    options = Options(
        model=model,
        devices=names,
        out=out,
        calibration=calibration,
        evaluation=evaluation,
        labels=labels,
        targets=_split(target),
        recipe=recipe,
        weights=weights,
        inputs=tuple(parse_input(i) for i in input_ or ()),
        preprocessing=preprocessing,
        samples=samples,
        batch=batch,
        threads=threads,
        seed=seed,
        synthetic=synthetic,
        python=python,
        force=force,
        name=name,
        effort=_effort(effort),
        budget_mib=budget_mib,
        budget_ms=budget_ms,
        keep=keep,
        max_drop=max_drop,
        on=_split(on),
        quick=quick,
        budget=Budget().with_limits(**gates),
        command=_command(),
    )
    from convert.console import show_report, working

    with working(quiet=json) as progress:
        report = run(options, progress)
    show_report(report, out, json)
    if any(not g.passed for r in report.results for g in r.gates):
        raise typer.Exit(1)


@app.command(epilog="Example: tightfit check out --budget budget.toml --baseline previous/out --junit check.xml")
def check(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `tightfit convert` wrote.")],
    budget: Annotated[Path | None, typer.Option(metavar="FILE", help="Limits (TOML); see docs/check.md.")] = None,
    baseline: Annotated[Path | None, typer.Option(metavar="OLD", help="An earlier OUT to compare with.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Inject faults; every one must trip a gate.")] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the JUnit XML goes (OUT/check.xml).")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the Markdown goes (OUT/check.md).")
    ] = None,
    on: On = None,
    quick: Quick = False,
    max_instructions: MaxInstructions = None,
    max_instruction_regression: Annotated[
        str | None, typer.Option(metavar="P%", help="Gate: growth against --baseline (2%).")
    ] = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Run the artifacts in OUT again; hold them to budget and baseline."""
    from convert.check import check as run
    from convert.console import show_gates, working

    with working(quiet=json) as progress:
        gates = run(
            out,
            budget,
            baseline,
            self_test=self_test,
            threads=threads,
            progress=progress,
            on=_split(on),
            quick=quick,
            max_instructions=max_instructions,
            instruction_regression=_share(max_instruction_regression),
        )
    passed = show_gates(gates, out, junit, markdown, json)
    if not passed:
        raise typer.Exit(1)


@app.command(epilog="Example: tightfit bench out/raspberry-pi-4b/resnet.tflite --threads 2")
def bench(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A .onnx, .tflite, .mlpackage or .cnet.")],
    float_: Annotated[
        Path | None,
        typer.Option("--float", metavar="FILE", help="The float twin (found beside the artifact by itself)."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=20, metavar="N", help="At least so many runs of each (1024; --quick: 100).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="At least so long for each.")] = 2.0,
    on: On = None,
    quick: Quick = False,
    sustained: Annotated[
        float, typer.Option(min=0, metavar="MIN", show_default=False, help="Go on so many minutes, for heat.")
    ] = 0.0,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Latency of an artifact, in turns with its float twin: here, or on devices."""
    from dataclasses import replace

    from convert.bench import bench as run
    from convert.console import show_bench, working
    from convert.on_device import QUICK
    from targets.errands import Timing

    usual = QUICK if quick else Timing()
    timing = replace(usual, min_runs=runs or usual.min_runs, min_seconds=seconds, sustained_minutes=sustained)
    with working(quiet=json) as progress:
        found = run(artifact, float_, timing, on=_split(on), threads=threads, progress=progress)
    show_bench(found, artifact, json)
    if any(there.failure for there in found.runs):
        raise typer.Exit(1)


@app.command(epilog="Example: tightfit report out-pi out-phones --budget budget.toml -o across")
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `tightfit convert` wrote.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", show_default=False, help="Where (./tightfit-report).")
    ] = Path("tightfit-report"),
    budget: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Limits (TOML), instead of each report's own gates.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    json: Json = False,
) -> None:
    """Compare several conversions; the oldest first."""
    from convert.report.across.build import across
    from convert.report.across.terminal import show

    show(across(folders, out, budget, force=force, command=_command()), out, json)


@app.command(epilog="Example: tightfit inspect model.onnx --device coral-edgetpu")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2, a .onnx, or module:function.")],
    device: Device = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="NAME", help="Instead of the device's own.")
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="What to plan for.")] = "auto",
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help="Diagnose: what int8 would break, and what helps.")
    ] = None,
    preprocessing: Annotated[Path | None, typer.Option(metavar="FILE", help="How images become inputs (TOML).")] = None,
    weights: Weights = None,
    input_: Input = None,
    python: Python = None,
    json: Json = False,
) -> None:
    """What a model is made of, and what will quantize on a device."""
    from convert.capture import parse_input
    from convert.console import show_inspection, working
    from convert.inspection import inspect_model

    inputs = tuple(parse_input(i) for i in input_ or ())
    with working(quiet=json) as progress:
        found = inspect_model(
            model,
            _split(device),
            target,
            recipe,
            weights=weights,
            inputs=inputs,
            python=python,
            calibration=calibration,
            preprocessing=preprocessing,
            progress=progress,
        )
    show_inspection(found, json)


@app.command(epilog="Example: tightfit devices raspberry-pi-5")
def devices(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None, json: Json = False) -> None:
    """The devices there are; or one in full, each fact sourced."""
    from convert.listings import show_device, show_devices

    show_device(name, json) if name else show_devices(json)


@app.command(epilog="Example: tightfit steps")
def steps(json: Json = False) -> None:
    """The steps that improve a graph, and the recipes made of them."""
    from convert.listings import show_steps

    show_steps(json)


@app.command(epilog="Example: tightfit targets")
def targets(json: Json = False) -> None:
    """The formats to lower to, and whether their packages are there."""
    from convert.listings import show_targets

    show_targets(json)


@app.command(epilog="Example: tightfit doctor")
def doctor(json: Json = False) -> None:
    """What is installed, what is missing, and how to get it."""
    from convert.listings import show_doctor

    if not show_doctor(json):
        raise typer.Exit(3)


@app.command(epilog="Example: tightfit demo -o demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where the results go.")] = Path(
        "tightfit-demo"
    ),
    threads: Threads = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace FOLDER if it is an earlier demo.")] = False,
    json: Json = False,
) -> None:
    """Convert two small models for three devices: a report to look at."""
    from convert.console import show_demo, working
    from convert.demo import demo as run

    with working(quiet=json) as progress:
        reports = run(out, threads=threads, force=force, command=_command(), progress=progress)
    show_demo(reports, out, json)


def _effort(level: str) -> Literal["fast", "normal", "max"]:
    from convert.errors import TightfitError

    match level:
        case "fast" | "normal" | "max":
            return level
    raise TightfitError(f"--effort {level} means nothing here; there are fast, normal and max.")


def _share(text: str | None) -> float | None:
    """A share of 1 from "2%" or "0.02"."""
    from convert.errors import TightfitError

    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise TightfitError(f"--max-instruction-regression {text} is no share: write 2% or 0.02.")
    return value


def _split(values: list[str] | None) -> tuple[str, ...]:
    """Repeated and comma-separated names, in order."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def _command() -> str:
    return shlex.join(["tightfit", *sys.argv[1:]])


def main() -> None:
    """Run the command line; every error a user can cause becomes a paragraph and an exit code."""
    from convert.stopping import Stopped, stoppable

    # Libraries that talk on import or start-up; what they say is not for our users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.warnoptions:  # python -W or PYTHONWARNINGS brings them back
        warnings.simplefilter("ignore")
    try:
        with stoppable():
            app()
    except Stopped as stop:
        print("stopped; nothing was left behind.", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        from convert.errors import TightfitError

        if not isinstance(error, TightfitError):
            raise
        _say(str(error))
        sys.exit(error.exit_code)


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {_escaped(text)}", highlight=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
