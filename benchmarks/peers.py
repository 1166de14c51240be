"""Other converters on the same float artifact, samples and runtime: one child process each, and one row.

`python peers.py JOB` (JSON) is that child; it prints the row as JSON. Converters work as their documentation shows
them: ONNX Runtime's own (static per channel with min-max ranges, dynamic) and the AI Edge Quantizer's recipes.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from table import Quality, Row

import targets
from convert.drift import Drift, classifies, top1
from convert.latency import measure
from convert.report.schema import Latency

Samples = dict[str, np.ndarray]
MIB = 1024 if sys.platform != "darwin" else 2**20  # in units of ru_maxrss


def onnxruntime_static(twin: Path, samples: Samples, path: Path, **kinds: Any) -> None:
    """Static int8 in QDQ form, weights per channel, after the preparation its documentation asks for; `kinds` are other
    arguments of its quantize_static."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = one_by_one(samples)

        def get_next(self) -> Samples | None:
            return next(self.feeds, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(twin, prepared)
    quantize_static(prepared, path, Reader(), per_channel=True, **kinds)


def onnxruntime_dynamic(twin: Path, samples: Samples, path: Path, **kinds: Any) -> None:
    """Int8 weights, activations quantized at run time; `kinds` are other arguments of its quantize_dynamic.

    What its shape inference does not know, behind operators of its own runtime, is told to be float.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(twin, path, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT}, **kinds)


def ai_edge_static(twin: Path, samples: Samples, path: Path) -> None:
    """Static int8."""
    from ai_edge_quantizer import quantizer, recipe

    work = quantizer.Quantizer(str(twin), recipe.static_wi8_ai8())
    ranges = work.calibrate({"serving_default": list(one_by_one(samples))}, num_threads=1)
    path.write_bytes(work.quantize(ranges).quantized_model)


def ai_edge_dynamic(twin: Path, samples: Samples, path: Path) -> None:
    """Int8 weights, activations quantized at run time."""
    from ai_edge_quantizer import quantizer, recipe

    path.write_bytes(quantizer.Quantizer(str(twin), recipe.dynamic_wi8_afp32()).quantize().quantized_model)


class OnnxSession:
    """An ONNX file in ONNX Runtime as it comes, on one thread; Tightfit's own session forces int8 kernels."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, inputs: Samples) -> Samples:
        """Outputs by name."""
        return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))

    def bind(self, inputs: Samples) -> Callable[[], object]:
        """A call that runs once."""
        return lambda: self.session.run(None, inputs)


Session = OnnxSession | targets.Session
Converter = Callable[[Path, Samples, Path], None]
PEERS: dict[str, tuple[str, str, Converter]] = {
    "onnxruntime static": ("onnx", "onnxruntime", onnxruntime_static),
    "onnxruntime dynamic": ("onnx", "onnxruntime", onnxruntime_dynamic),
    "ai-edge-quantizer static": ("tflite", "ai_edge_quantizer", ai_edge_static),
    "ai-edge-quantizer dynamic": ("tflite", "ai_edge_quantizer", ai_edge_dynamic),
}


def peer_rows(model: str, twins: dict[str, Path], calibration: Path, evaluation: Path, folder: Path) -> Iterator[Row]:
    """A row for every peer that is installed; `twins` are Tightfit's float artifacts by format."""
    for number, (how, (form, package, _)) in enumerate(PEERS.items()):
        if form not in twins or importlib.util.find_spec(package) is None:
            continue
        path = folder / f"{model}-peer-{number}{twins[form].suffix}"
        job = {"model": model, "how": how, "twin": str(twins[form]), "path": str(path)}
        job |= {"calibration": str(calibration), "evaluation": str(evaluation)}
        done = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True, check=False)
        yield _row(model, how, form, done)


def _row(model: str, how: str, form: str, done: subprocess.CompletedProcess) -> Row:
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Row(model, "-", form, how, failure=last[0])
    found = json.loads(done.stdout.splitlines()[-1])
    found["quality"] = Quality(**found["quality"])
    found["latency"] = Latency.model_validate(found["latency"])
    return Row(model, "-", form, how, **found)


def main() -> None:
    """The child: convert, then compare with float on every evaluation sample, then time in turns with float."""
    job = json.loads(sys.argv[1])
    form, _, convert = PEERS[job["how"]]
    twin, path = Path(job["twin"]), Path(job["path"])
    with np.load(job["calibration"]) as arrays:
        calibration = dict(arrays)
    start = time.perf_counter()
    convert(twin, calibration, path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    with np.load(job["evaluation"]) as arrays:
        evaluation = dict(arrays)
    labels = evaluation.pop("labels", None)
    load = OnnxSession if form == "onnx" else targets.find(form).open
    session, float_session = load(path), load(twin)
    drift, shares = _compared(session, float_session, evaluation, labels)
    first = next(one_by_one(evaluation))
    latency = measure(session.bind(first), float_session.bind(first), threads=1)
    found = {
        "sqnr_db": drift.sqnr_db,
        "quality": {"top1": shares, "cosine": drift.cosine},
        "float_bytes": targets.artifact_bytes(twin),
        "bytes": targets.artifact_bytes(path),
        "latency": latency.model_dump(mode="json"),
        "seconds": seconds,
        "peak_mib": peak,
    }
    print(json.dumps(found))  # with NaN and Infinity where a ratio has no number; the parent reads them


def _compared(
    session: Session, float_session: Session, samples: Samples, labels: np.ndarray | None
) -> tuple[Drift, tuple[float, float] | None]:
    """Drift over all samples, and top-1 of float and artifact as shares where there are labels."""
    drift: Drift | None = None
    correct = np.zeros(2, dtype=np.int64)
    for number, sample in enumerate(one_by_one(samples)):
        expected, got = float_session.run(sample), session.run(sample)
        got = dict(zip(expected, got.values(), strict=True))
        drift = drift or Drift(classifies(expected, labels))
        drift.add(expected, got)
        if labels is not None:
            correct += [int(top1(next(iter(o.values())))[0] == labels[number]) for o in (expected, got)]
    assert drift is not None, "there are no evaluation samples"
    if labels is None:
        return drift, None
    before, after = correct / len(labels)
    return drift, (float(before), float(after))


def one_by_one(samples: Samples) -> Iterator[Samples]:
    """Batches of one sample, [1, ...] by input."""
    for number in range(len(next(iter(samples.values())))):
        yield {name: array[number : number + 1] for name, array in samples.items()}


if __name__ == "__main__":
    main()
