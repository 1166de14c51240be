"""Convert real models for real devices and print what came out, next to float: `python benchmarks/compare.py --help`.

Each conversion is a child process of the installed `tightfit`, so that its time and its memory are its own.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
from peers import peer_rows
from table import Row, markdown, row

import targets
from convert.report.schema import Environment, Report
from device_profiles import load

HERE = Path(__file__).resolve().parent
MODELS = ("resnet20", "vit", "minilm")
DEVICES = ("raspberry-pi-4b", "iphone-a17-pro", "jetson-orin-nano")
CALIBRATION_IMAGES = 256
CALIBRATION_SENTENCES, EVALUATION_SENTENCES = 64, 100


@dataclass(frozen=True)
class Data:
    """Two .npz files; samples in them are disjoint."""

    calibration: Path
    evaluation: Path


@dataclass
class Found:
    """The rows, a line for each model that is absent, and where it all ran, as a report names it."""

    rows: list[Row]
    skipped: list[str]
    environment: Environment | None = None


def main() -> None:
    """Parse the options, convert, print and write the table; exit code 1 when a conversion failed."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = gather(options, folder)
    if found.environment is None:
        sys.exit("nothing was converted, so there is nothing to compare")
    settings = f"{options.images} evaluation images, {CALIBRATION_IMAGES} calibration images, one thread."
    text = markdown(found.rows, found.environment, datetime.date.today().isoformat(), settings, found.skipped)
    print(text)
    options.out.write_text(text)
    if any(r.failure for r in found.rows):
        sys.exit(1)


def gather(options: argparse.Namespace, folder: Path) -> Found:
    """Convert every model that is there, telling of each row and of each model that is not."""
    found = Found([], [])
    for model in options.models.split(","):
        try:
            data = prepare(model, options.images, folder)
        except SystemExit as reason:  # what models.py ends with when a model is absent
            found.skipped.append(f"{model} was skipped: {reason}")
            print(found.skipped[-1], flush=True)
            continue
        for made, environment in converted(model, data, options, folder):
            found.rows.append(made)
            found.environment = environment or found.environment
            print(_progress(made), flush=True)
    return found


def prepare(model: str, images: int, folder: Path) -> Data:
    """Write the samples of a model to `folder`. Exits with the reason when model or data are absent."""
    data = Data(folder / f"{model}-calibration.npz", folder / f"{model}-evaluation.npz")
    if model == "minilm":
        arrays = models.sentences(CALIBRATION_SENTENCES + EVALUATION_SENTENCES)
        np.savez(data.calibration, **{name: a[:CALIBRATION_SENTENCES] for name, a in arrays.items()})
        np.savez(data.evaluation, **{name: a[CALIBRATION_SENTENCES:] for name, a in arrays.items()})
        return data
    x, _ = models.images("train_5000", CALIBRATION_IMAGES)
    held_out, labels = models.images("test_2000", images)
    np.savez(data.calibration, x=x)
    np.savez(data.evaluation, x=held_out, labels=labels)
    return data


def converted(
    model: str, data: Data, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[Row, Environment | None]]:
    """Yield a row for every device and target, with the environment that a report names; then rows of the peers."""
    twins: dict[str, Path] = {}
    for device in options.devices.split(","):
        default = load(device).default_target
        for target in targets.names() if options.all_targets else (default,):
            out = folder / f"{model}-{device}-{target}"
            done = _convert(model, device, target, data, out)
            if isinstance(done, str):
                yield Row(model, device, target, "tightfit", failure=done), None
                continue
            yield row(model, done), done.environment
            twins.setdefault(target, next((out / device / "float").iterdir()))
    if options.peers:
        for made in peer_rows(model, twins, data.calibration, data.evaluation, folder):
            yield made, None


def _convert(model: str, device: str, target: str, data: Data, out: Path) -> Report | str:
    """Run `tightfit convert`; its report, or what it complained of."""
    command = [str(_tightfit()), "convert", f"models:{model}", "--device", device, "--target", target, "--json"]
    command += ["--calibration", str(data.calibration), "--evaluation", str(data.evaluation), "-o", str(out)]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        return " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return Report.model_validate(json.loads(done.stdout))


def _tightfit() -> Path:
    command = Path(sys.executable).with_name("tightfit")
    if not command.exists():
        sys.exit(f"tightfit is not installed for {Path(sys.executable).name}: pip install '.[all]'")
    return command


def _progress(made: Row) -> str:
    seconds = "failed" if made.failure else f"{made.seconds:.0f} s"
    return f"{made.model} {made.device} {made.format} {made.how}: {seconds}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="(%(default)s)")
    parser.add_argument("--devices", default=",".join(DEVICES), help="(%(default)s)")
    parser.add_argument("--all-targets", action="store_true", help="every format, not only each device's own")
    parser.add_argument("--images", type=int, default=2000, help="evaluation images (%(default)s)")
    parser.add_argument("--peers", action="store_true", help="also other converters, those that are installed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and artifacts there")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=HERE / "results.md", help="(results.md beside this)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
