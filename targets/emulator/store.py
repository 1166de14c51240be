"""Where emulated boards are kept: parts in the cache folder, each with a manifest that says what it was built from.

`<cache>/emulator/` holds `qemu` (the emulator), `debian-<architecture>` (a system that boards share), and a folder
for every board. A part is built beside its place and renamed, so what is there is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from targets.errors import TargetError

# To be raised whenever what is built changes by code alone; the data files below are hashed.
LAYOUT = 1
MANIFEST = "manifest.json"
RECIPE = Path(__file__).parent / "recipe.toml"


def folder() -> Path:
    """The cache folder of all boards: below $TIGHTFIT_CACHE, $XDG_CACHE_HOME/tightfit or ~/.cache/tightfit."""
    own, shared = os.environ.get("TIGHTFIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "tightfit"
    return cache.expanduser().absolute() / "emulator"


def recipe() -> dict[str, Any]:
    """What boards are made of: `recipe.toml`."""
    return tomllib.loads(RECIPE.read_text("utf-8"))


def identity(*sources: Path) -> str:
    """What a part made from these files, and by this layout, has in its manifest."""
    whole = hashlib.sha256(str(LAYOUT).encode())
    for source in sources:
        whole.update(source.read_bytes())
    return whole.hexdigest()


def manifest(part: Path) -> dict[str, Any] | None:
    """What a part says of itself; None where it is not there."""
    try:
        found: dict[str, Any] = json.loads((part / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found


@contextlib.contextmanager
def building(part: Path, says: dict[str, Any]) -> Iterator[Path]:
    """A new folder beside `part`, which takes its place with the manifest `says` when the block ends well.

    `says` may be filled inside the block. A folder of an attempt that failed is removed. Raises TargetError where the
    disk is full or the folder cannot be written.
    """
    fresh, old = part.with_name(f".{part.name}.new"), part.with_name(f".{part.name}.old")
    try:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        (fresh / MANIFEST).write_text(json.dumps(says, indent=1) + "\n", "utf-8")
        if part.exists():
            part.rename(old)
        fresh.rename(part)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise TargetError(_in_words(part, error)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def locked(waiting: Any) -> Iterator[None]:
    """One build at a time in this cache; `waiting()` is called once where another one is under way."""
    import fcntl  # not there on Windows, where nothing is built

    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = (folder() / ".lock").open("w")
    except OSError as error:
        raise TargetError(_in_words(folder(), error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _in_words(part: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"The disk is full: {part.name} cannot be built in {part.parent}. A first board needs about 500 MiB "
            "there while it is built. Make room, or name another folder in TIGHTFIT_CACHE; what was downloaded is kept."
        )
    return f"{part.name} cannot be built in {part.parent}: {error}. TIGHTFIT_CACHE may name another folder for it."
