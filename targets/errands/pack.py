"""What is sent: the agent as one file, the job, the inputs, and the files to be run."""

import io
import json
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from targets.errors import TargetError

from .nouns import Errand, Timing

if TYPE_CHECKING:
    from targets._c_cross import Processor

AGENT, JOB, INPUTS = "agent.pyz", "job.json", "inputs.npz"
VERSION = 1
SOURCES = ".cnet"
CARRIED = (".onnx", ".tflite", SOURCES)


def can_be_carried(artifact: str | Path) -> bool:
    """Whether an artifact of this name can be run elsewhere at all."""
    return Path(artifact).suffix in CARRIED


PACKAGE = "tightfit_agent"
_SOURCE = Path(__file__).resolve().parents[1] / "agent"
_START = f"import sys\n\nfrom {PACKAGE}.main import main\n\nsys.exit(main(sys.argv[1:]))\n"
_NO_DATE = (1980, 1, 1, 0, 0, 0)


def agent() -> bytes:
    """The agent as a Python zip application, uncompressed: the same sources give the same bytes everywhere."""
    files = {f"{PACKAGE}/{path.name}": path.read_text(encoding="utf-8") for path in _SOURCE.glob("*.py")}
    files["__main__.py"] = _START
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _NO_DATE), files[name])
    return packed.getvalue()


def packed(
    errand: Errand, folder: Path, *, count: bool, processor: tuple[str, str] | None = None
) -> tuple[dict[str, Path], str]:
    """Write what is to be sent into `folder`: {name there: path here}, and the identity that the answer must bear.

    `processor`: the transport's, for which C sources are compiled. Raises TargetError for a file that no device of this
    kind runs, or that is not there; MissingRuntime without a compiler for the processor.
    """
    identity = uuid.uuid4().hex
    artifacts = [("artifact", errand.artifact)] + ([("float", errand.twin)] if errand.twin is not None else [])
    entries, files = [], {}
    for name, path in artifacts:
        entry, sent = (
            _sources(name, path, folder, processor) if path.suffix == SOURCES else _artifact(name, path, errand.threads)
        )
        entries.append(entry)
        files.update(sent)
    job = {
        "version": VERSION,
        "identity": identity,
        "artifacts": entries,
        "inputs": INPUTS,
        "batch": errand.batch,
        "threads": errand.threads,
        "count": errand.count if count else 0,
        "timing": None if errand.timing is None else _timing(errand.timing),
    }
    (folder / AGENT).write_bytes(agent())
    (folder / JOB).write_text(json.dumps(job, indent=1), encoding="utf-8")
    _write_inputs(errand.inputs, folder / INPUTS)
    return {**{name: folder / name for name in (AGENT, JOB, INPUTS)}, **files}, identity


def _artifact(name: str, path: Path, threads: int) -> tuple[dict[str, Any], dict[str, Path]]:
    """The job's entry of a file, and the files to send for it."""
    if not can_be_carried(path):
        raise TargetError(
            f"{path.name} can't be run elsewhere: the agent takes {', '.join(CARRIED)}. A Core ML package "
            "runs on Apple's systems only."
        )
    if not path.is_file():
        raise TargetError(f"there is no file {path}. Convert the model again.")
    file, data = f"{name}{path.suffix}", path.with_name(f"{path.name}.data")
    entry: dict[str, Any] = {"name": name, "file": file}
    sent = {file: path}
    if data.is_file():
        entry["data"] = {f"{file}.data": data.name}
        sent[f"{file}.data"] = data
    if path.suffix == ".onnx":
        from targets._onnx_session import CONFIG, spinning, unfused

        entries, disabled = unfused(path)
        entry |= {"config": {**CONFIG, **spinning(threads), **entries}, "disabled": disabled}
    return entry, sent


def can_compile(name: str, processor: tuple[str, str] | None) -> "Processor":
    """The processor that C sources are compiled for. Raises TargetError, or MissingRuntime, where they cannot be."""
    from targets._c_cross import Processor, cross_compiler

    if processor is None:
        raise TargetError(
            f"{name}: folders of C sources are compiled here, for this machine and for emulated boards; the processor "
            "of another device is not known. Copy the folder there, run `make`, and give the driver its samples "
            "(the folder's README says how)."
        )
    found = Processor(*processor)
    cross_compiler(found)
    return found


def _sources(
    name: str, path: Path, folder: Path, processor: tuple[str, str] | None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The job's entry of a folder of C sources, and the library that it is compiled to."""
    from targets._c_cross import library
    from targets._c_session import read_manifest

    file = f"{name}.so"
    compiler = library(path, folder / file, can_compile(path.name, processor))
    manifest = read_manifest(path)
    config = {"inputs": json.dumps(manifest["inputs"]), "outputs": json.dumps(manifest["outputs"])}
    return {"name": name, "file": file, "config": {**config, "compiler": compiler}}, {file: folder / file}


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "min_runs": timing.min_runs,
        "min_seconds": timing.min_seconds,
        "warmup_seconds": timing.warmup_seconds,
        "sustained_seconds": timing.sustained_minutes * 60,
        "affinity": timing.affinity,
    }


def _write_inputs(inputs: Mapping[str, np.ndarray], path: Path) -> None:
    """As np.savez, for any names: its own arguments' names are no limit here."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in inputs.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _NO_DATE), member.getvalue())
