"""A .mlpackage on disk, as coremltools' in-memory MIL program; works where Core ML itself does not exist."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from targets.errors import MissingRuntime, TargetError

INSTALL = "pip install 'tightfit[coreml]'"
WEIGHTS = Path("Data/com.apple.CoreML/weights")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence coremltools: its warnings about versions, its logging and its progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def coremltools() -> Any:
    """The module, imported without its noise. Raises MissingRuntime."""
    with quiet():
        try:
            import coremltools as module
        except ImportError as error:
            raise MissingRuntime(f"coremltools is not installed ({error}); {INSTALL}") from error
    return module


def read_spec(path: Path) -> Any:
    """The model's description (protobuf). Raises TargetError when there is no readable .mlpackage at `path`."""
    ct = coremltools()
    if not (path / "Manifest.json").is_file():
        raise TargetError(f"{path} is no .mlpackage: it has no Manifest.json")
    try:
        with quiet():
            return ct.utils.load_spec(str(path))
    except Exception as error:
        raise TargetError(f"{path} cannot be read as a .mlpackage: {error}") from error


def read_function(path: Path) -> Any:
    """The program's `main` function with its weights, every operator typed and checked by coremltools.

    Raises TargetError when the package is damaged, or holds several functions or a model that is no program.
    """
    spec = read_spec(path)
    from coremltools.converters.mil.frontend.milproto.load import load

    try:
        with quiet():
            program = load(spec, spec.specificationVersion, str(path / WEIGHTS))
    except Exception as error:
        raise TargetError(f"the program in {path} cannot be read: {error}") from error
    if list(program.functions) != ["main"]:
        raise TargetError(f"{path} holds the functions {', '.join(program.functions)}; only 'main' is expected")
    return program.functions["main"]
