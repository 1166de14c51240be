"""`module:function`: a model from the user's own code, which runs in a child interpreter and never in ours."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibrate.samples import Array, Batch, InputSpec
from convert.capture_archive import load_program
from convert.capture_program import functional, input_specs, unlift
from convert.capture_raw import Raw, Reference
from convert.errors import MissingDependency, TightfitError
from convert.out_folder import raise_if_full

SCRIPT = Path(__file__).with_name("capture_child.py")
WRAPPER = "model."
LAST_LINES = 12


def capture_factory(
    reference: str,
    *,
    weights: Path | None,
    inputs: Sequence[InputSpec],
    examples: Batch | None,
    python: Path | None,
    work: Path,
    search_path: Path | None = None,
) -> Raw:
    """Export what `reference` returns in `python` (ours when None), which sees PYTHONPATH and the working directory,
    and `search_path` before them.

    Raises TightfitError with the user's own line where their side is at fault, MissingDependency for an interpreter
    that does not start or lacks a package. Nothing is left in `work`.
    """
    if weights is not None and not weights.is_file():
        raise TightfitError(f"there is no weights file {weights}; check --weights.")
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="capture-", dir=work))
    try:
        job = _write_job(folder, reference, weights, inputs, examples)
        result = _run_child(job, folder, reference, python, search_path)
        return read_result(folder, result, reference)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_job(
    folder: Path, reference: str, weights: Path | None, inputs: Sequence[InputSpec], examples: Batch | None
) -> Path:
    if examples is not None:
        arrays: dict[str, Any] = {f"x/{name}": array for name, array in examples.items()}
        np.savez(folder / "examples.npz", **arrays)
    job = {
        "model": reference,
        "weights": None if weights is None else str(weights.resolve()),
        "examples": None if examples is None else str(folder / "examples.npz"),
        "inputs": [asdict(i) for i in inputs],
        "threads": torch.get_num_threads(),
        "out": str(folder),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def _run_child(
    job: Path, folder: Path, reference: str, python: Path | None, search_path: Path | None
) -> dict[str, Any]:
    command = [str(python or sys.executable), str(SCRIPT), str(job)]
    # A user's folder should not gain a __pycache__ because its model was read.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if search_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(search_path), os.environ.get("PYTHONPATH"))))
    try:
        with (folder / "log.txt").open("wb") as log:
            code = _finished(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            )
    except OSError as error:
        raise MissingDependency(
            f"the interpreter {command[0]} does not start ({error}); name another one with --python."
        ) from error
    answer = folder / "result.json"
    if code != 0 or not answer.exists():
        raise_if_full(folder)
        tail = "\n".join((folder / "log.txt").read_text(errors="replace").strip().splitlines()[-LAST_LINES:])
        raise TightfitError(
            f"the interpreter that captured {reference} {_how(code)}. Run the function by itself in that "
            f"interpreter to see why. Its last words:\n{tail or '(none)'}"
        )
    result: dict[str, Any] = json.loads(answer.read_text())
    if "error" in result:
        kind = MissingDependency if result["error"]["kind"] == "environment" else TightfitError
        raise kind(result["error"]["message"])
    return result


def _finished(child: "subprocess.Popen[bytes]") -> int:
    """The child's exit code; whatever interrupts the wait, the child is dead and gone before it is passed on."""
    try:
        return child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _how(code: int) -> str:
    return (
        f"was killed by signal {-code} (9 is what a machine out of memory sends)" if code < 0 else f"ended with {code}"
    )


def read_result(folder: Path, result: dict[str, Any], reference: str) -> Raw:
    """What the child left in `folder`: the program, the samples it ran and the module's answers to them."""
    try:
        program, _ = load_program(folder / "program.pt2", folder)
    except TightfitError as error:
        raise TightfitError(
            f"torch {result['torch']} of that interpreter exported {reference}, but torch {torch.__version__} here "
            f"cannot read it: {error}"
        ) from error
    raw = unlift(functional(program), WRAPPER)
    named = [replace(s, name=n) for s, n in zip(input_specs(raw), result["inputs"], strict=True)]
    references = [_reference(folder, path.stem.removeprefix("inputs_")) for path in sorted(folder.glob("inputs_*.npz"))]
    return Raw(
        graph=raw,
        inputs=tuple(named),
        outputs=tuple(result["outputs"]),
        references=tuple(references),
        against="the module itself",
        samples=int(result["samples"]),
        synthetic=bool(result["synthetic"]),
        notes=tuple(result["notes"]),
    )


def _reference(folder: Path, size: str) -> Reference:
    inputs = {name.partition("/")[2]: array for name, array in _arrays(folder / f"inputs_{size}.npz").items()}
    outputs = _arrays(folder / f"outputs_{size}.npz")
    return Reference(inputs, tuple(outputs[str(i)] for i in range(len(outputs))))


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
