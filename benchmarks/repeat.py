"""Whether two timings of one artifact agree: `python benchmarks/repeat.py --help`.

A repetition is two runs of the whole measurement, each in a process of its own as `bench --on` has it, one after the
other. They agree where the intervals of their speed-ups overlap; a repetition counts as kept where they do, or where
one of the two was marked unstable. Without an artifact, the demo's CNN is converted for a Raspberry Pi first.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import targets
from calibrate.samples import Batch, InputSpec
from convert.demo_assets import FOLDER, digits_arrays, factory, weights
from convert.host import cpu_name
from convert.latency import summary
from convert.pipeline import Options, convert
from convert.progress import Silent
from convert.report.measures import Latency
from targets.errands import Errand, Timing, carry_out
from targets.transports import Transport, opened

DEVICE = "raspberry-pi-4b"
SAMPLES = 256


@dataclass(frozen=True)
class Repetition:
    """Two runs of one measurement."""

    first: Latency
    second: Latency

    @property
    def overlaps(self) -> bool:
        """Whether the intervals of the speed-up have a value in common."""
        assert self.first.ratio_interval is not None
        assert self.second.ratio_interval is not None
        (low, high), (other_low, other_high) = self.first.ratio_interval, self.second.ratio_interval
        return low <= other_high and other_low <= high

    @property
    def unstable(self) -> bool:
        """Whether one of the two was marked so."""
        return not (self.first.stable and self.second.stable)


def main() -> int:
    """Run the repetitions and print the table; 1 where fewer than 19 of 20 were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?", help="an .onnx or .tflite file (default: the demo's CNN)")
    parser.add_argument("--float", type=Path, dest="twin", help="its float twin (default: float/ beside it)")
    parser.add_argument("--target", default="tflite", help="of the demo's CNN: tflite or onnx")
    parser.add_argument("--on", default="local", metavar="ADDRESS")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the raw times there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, opened(options.on) as transport:
        artifact = options.artifact or _demo(Path(made) / "out", options.target)
        twin = options.twin or artifact.parent / "float" / artifact.name
        timing = Timing(min_runs=options.runs, min_seconds=options.seconds)
        inputs = _inputs(artifact)
        repetitions = []
        for index in range(options.repetitions):
            runs = [
                _run(transport, Errand(artifact, twin, inputs, 1, timing=timing), options.keep, f"{index}-{which}")
                for which in ("first", "second")
            ]
            repetitions.append(Repetition(*runs))
            print(_row(index, repetitions[-1]), flush=True)
    return _verdict(repetitions)


def _run(transport: Transport, errand: Errand, keep: Path | None, name: str) -> Latency:
    answer = carry_out(transport, errand, lambda *_: None)
    assert answer.twin is not None
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        pairs = {"artifact": answer.artifact.blocks, "float": answer.twin.blocks}
        rounds = {f"{which}/{i}": block for which, blocks in pairs.items() for i, block in enumerate(blocks)}
        np.savez(keep / f"{name}.npz", others=np.array(answer.others, np.float64), **rounds)
    return summary(
        answer.artifact.blocks,
        answer.twin.blocks,
        threads=errand.threads,
        where=transport.address,
        cpu=answer.facts.get("machine", cpu_name()),
        governor=None,
        others=answer.others,
    )


def _row(index: int, repetition: Repetition) -> str:
    cells = [f"{index + 1:3d}"]
    for run in (repetition.first, repetition.second):
        assert run.ratio_interval is not None
        low, high = run.ratio_interval
        cells.append(f"{run.p50_ms:8.4f} ms  {run.speedup:6.3f}x [{low:6.3f}, {high:6.3f}]{'' if run.stable else ' ~'}")
    cells.append("overlap" if repetition.overlaps else "APART")
    return " | ".join(cells) + (" (unstable)" if repetition.unstable else "")


def _verdict(repetitions: list[Repetition]) -> int:
    count = len(repetitions)
    overlap = sum(r.overlaps for r in repetitions)
    unstable = sum(r.unstable for r in repetitions)
    kept = sum(r.overlaps or r.unstable for r in repetitions)
    stable = [r for r in repetitions if not r.unstable]
    print(f"\nrepetitions {count}, intervals overlap in {overlap}, marked unstable {unstable}, kept {kept}")
    print(f"of the {len(stable)} stable ones {sum(r.overlaps for r in stable)} overlap")
    return 0 if kept * 20 >= count * 19 else 1


def _inputs(artifact: Path) -> Batch:
    """One sample of random values."""
    target = next(found for found in map(targets.find, targets.names()) if found.suffix == artifact.suffix)
    generator = np.random.default_rng(0)
    return {spec.name: _random(spec, generator) for spec in target.open(artifact).inputs}


def _random(spec: InputSpec, generator: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return generator.uniform(-1, 1, spec.shape).astype(dtype)
    return generator.integers(0, 2, spec.shape).astype(dtype)


def _demo(out: Path, target: str) -> Path:
    images, _ = digits_arrays("train")
    data = out.parent / "calibration.npz"
    np.savez(data, x=images[:SAMPLES])
    options = Options(
        model=factory("digits_cnn"),
        devices=(),
        pairs=((DEVICE, target),),
        out=out,
        calibration=str(data),
        weights=weights("digits_cnn"),
        search_path=FOLDER,
    )
    report = convert(options, Silent())
    return out / report.results[0].artifact


if __name__ == "__main__":
    sys.exit(main())
