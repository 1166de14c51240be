"""`module:function`: samples from the user's own code, which runs in a child interpreter and never in ours."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from convert.data.npy import NpySource
from convert.errors import MissingDependency, TightfitError
from convert.out_folder import raise_if_full

SCRIPT = Path(__file__).with_name("spool_samples.py")
LOG = "log.txt"
LAST_LINES = 12


def is_factory(source: str) -> bool:
    """Whether `source` reads as `module:function` (and not as a Windows path)."""
    module, colon, function = source.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def open_factory(source: str, work: Path, *, limit: int | None = None, python: Path | None = None) -> NpySource:
    """Run `source` in `python` (ours when None) and memory-map what it gave.

    The samples are spooled to a new folder in `work`, which the caller removes when done. At most `limit` samples are
    drawn, so an endless generator is welcome with one. The child sees PYTHONPATH and the working directory; what it
    prints goes to log.txt beside the samples.
    """
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="samples-", dir=work))
    command = [str(python or sys.executable), str(SCRIPT), source, str(folder), str(limit or 0)]
    try:
        with (folder / LOG).open("wb") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=_environment()
            )
    except OSError as error:
        raise MissingDependency(
            f"the interpreter {command[0]} does not start ({error}); name one with --python."
        ) from error
    return NpySource(source, _columns(source, folder, done.returncode))


def _columns(source: str, folder: Path, exit_code: int) -> dict[str, Path]:
    manifest = folder / "spool.json"
    if exit_code != 0 or not manifest.exists():
        raise_if_full(folder)
        tail = "\n".join((folder / LOG).read_text(errors="replace").strip().splitlines()[-LAST_LINES:])
        raise TightfitError(
            f"the interpreter that ran {source} died with exit code {exit_code}. Run the function by itself in that "
            f"interpreter to see why. Its last words:\n{tail or '(none)'}"
        )
    result = json.loads(manifest.read_text())
    if "error" in result:
        raise_if_full(folder)
        raise TightfitError(
            f"{result['error']}. The function must return samples one by one, without a batch axis: arrays, dicts of "
            "arrays by input name, or pairs (inputs, class index)."
        )
    if not result["columns"]:
        raise TightfitError(f"{source} gave no sample.")
    return {name: folder / f"{number}.npy" for name, number in result["columns"].items()}


def _environment() -> dict[str, str]:
    # A user's folder should not gain a __pycache__ because its data was read.
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
