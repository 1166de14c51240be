"""What finding the ranges of static int8 costs: float passes per sample, and peak memory by number of samples.

    python benchmarks/calibration.py            # needs TIGHTFIT_ZOO, see README.md

Prints the table and writes it to --out. Each row is a process of its own. Passes: CPU seconds of the whole step
quantize_static over those of the float graph on the same samples in batches of 16, one thread, the least of three runs
of each, in turns.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
BATCH = 16
DEVICE, TARGET, RECIPE = "raspberry-pi-4b", "tflite", "int8"


def measure(model: str, count: int) -> dict[str, float]:
    """One row: passes per sample, peak MiB of this process."""
    import models
    import torch

    import device_profiles
    from calibrate import steps
    from calibrate.graph import clone, run
    from convert import planning
    from convert.capture import capture

    torch.set_num_threads(1)
    x = torch.from_numpy(models.images("train_5000", count)[0])
    with tempfile.TemporaryDirectory() as work:
        examples = {"": x[:8].numpy()}
        captured = capture(f"models:{model}", examples=examples, work=Path(work), search_path=HERE)
    plan = planning.decide(captured.graph, device_profiles.load(DEVICE), TARGET, RECIPE).plan

    def batches(limit: int = count):
        return ([x[start : start + BATCH]] for start in range(0, min(count, limit), BATCH))

    def context() -> steps.Context:
        return steps.Context(plan=plan, batches=batches, few_batches=lambda: batches(64))

    graph = clone(captured.graph)
    steps.apply("fold_batchnorm", graph, context())

    def floats() -> None:
        for inputs in batches():
            run(graph, inputs)

    def ranges(fresh) -> None:
        steps.apply("quantize_static", fresh, context())

    spent: dict[str, list[float]] = {"float": [], "ranges": []}
    for _ in range(3):
        for name, work_of in (("float", floats), ("ranges", partial(ranges, clone(graph)))):
            start = time.process_time()
            work_of()
            spent[name].append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    return {"passes": min(spent["ranges"]) / min(spent["float"]), "peak": peak - x.numel() * 4 / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "vit"])
    parser.add_argument("--samples", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--out", type=Path, default=HERE / "calibration_results.md", help="where the table goes")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    lines = ["| model | samples | float passes per sample | peak MiB without the samples |", "|---|---:|---:|---:|"]
    print(*lines, sep="\n", flush=True)
    for model in args.models:
        for count in args.samples:
            command = [sys.executable, __file__, "--one", model, str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr.strip().splitlines()[-1])
            row = json.loads(done.stdout.strip().splitlines()[-1])
            lines.append(f"| {model} | {count:,} | {row['passes']:.2f} | {row['peak']:.0f} |")
            print(lines[-1], flush=True)
    args.out.write_text(
        "\n".join([*heading(), *lines, "", "What the columns mean is in [README.md](README.md)."]) + "\n"
    )


def heading() -> list[str]:
    """Title, and when and on what the table was made."""
    from convert import host

    packages = host.versions()
    machine = f"{host.cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    named = ", ".join(f"{name} {packages[name]}" for name in ("tightfit", "torch", "numpy") if name in packages)
    made = f"{datetime.now(UTC):%Y-%m-%d}, {machine}; {named}"
    settings = f"plan for {DEVICE} under {TARGET}, recipe {RECIPE}, one thread"
    return ["# Results of `calibration.py`", "", f"{made}. {settings}", ""]


if __name__ == "__main__":
    main()
