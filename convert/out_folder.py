"""The folder a command writes: made beside its final place and renamed, so nothing is ever half there.

A killed run leaves `.OUT.partial-*` behind. The next run removes it, once its maker is known to be gone: a maker holds
a lock (`flock`) on its folder, which the kernel lets go of when the process ends, however it ends.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.errors import TightfitError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPLACED = ".replaced"
# A write that fails for want of room first fills what there is.
LITTLE_ROOM = 2**20


@contextmanager
def written_whole(out: Path, force: bool = False) -> Iterator[Path]:
    """Give a fresh folder beside `out`; rename it to `out` at the end, or remove it when anything fails.

    Raises TightfitError when `out` may not be written or replaced, and for an OSError in the work inside.
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise TightfitError(f"{out} is the folder you are in, or around it. Give a folder of its own with -o.")
    _clear_remains(out)
    refuse_existing(out, force)
    missing = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work, lock = _locked_folder(out)
    except OSError as error:
        _remove_empty(missing)
        raise TightfitError(
            f"cannot write to {out.parent}: {error.strerror}. Choose another folder with -o."
        ) from error
    try:
        yield work
        work.chmod(0o755)
        _swap(work, out)
    except (OSError, TightfitError) as error:
        cause = _full_disk(error) or error
        if isinstance(cause, TightfitError):
            raise
        raise TightfitError(_failure(cause, work, out)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        _remove_empty(missing)


def raise_if_full(folder: Path) -> None:
    """Raise OSError (ENOSPC) when the disk of `folder` is full: for what a child process that died could not say."""
    if shutil.disk_usage(folder).free < LITTLE_ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def refuse_existing(out: Path, force: bool) -> None:
    """Raise TightfitError when `out` is there and may not be replaced, or holds things that are not ours."""
    if not out.exists():
        return
    if not force:
        raise TightfitError(f"{out} exists already. Choose another folder with -o, or replace it with --force.")
    ours = out.is_dir() and (not any(out.iterdir()) or any(out.glob("report.json")) or any(out.glob("*/report.json")))
    if not ours:
        raise TightfitError(
            f"{out} was not made by Tightfit (it has no report.json), so --force will not delete it. "
            "Choose another folder with -o."
        )


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk without room that is behind `error`, whatever was made of it on the way; None if none is."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__
    return None


def _failure(error: OSError, work: Path, out: Path) -> str:
    place = Path(os.fsdecode(error.filename)) if error.filename else work
    subject = f"cannot write {out}" if place.is_relative_to(work) else str(place)
    if error.errno in NO_ROOM:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return f"{subject}: {reason}. Nothing was left behind. Free some space, or name another disk with -o."
    return f"{subject}: {error.strerror or error}. Nothing was left behind."


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A fresh folder beside `out`, and the open descriptor that holds its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        with suppress(FileNotFoundError):
            lock = os.open(work, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: there no remnant is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if work.exists():
                return work, lock
            os.close(lock)  # another run took it for a remnant before it was locked


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _clear_remains(out: Path) -> None:
    """Remove what killed runs left of `out`; an earlier result that one was about to replace comes back."""
    if not out.parent.is_dir():
        return
    prefix = _prefix(out)
    for folder in [p for p in out.parent.iterdir() if p.name.startswith(prefix) and p.is_dir() and not p.is_symlink()]:
        with suppress(OSError), _abandoned(folder):
            if (folder / REPLACED).is_dir() and not out.exists():
                os.rename(folder / REPLACED, out)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _abandoned(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder` for the work inside. Raises OSError when its maker lives, or nobody can tell."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _remove_empty(folders: list[Path]) -> None:
    """Take back the parent folders that were made for nothing, innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _swap(work: Path, out: Path) -> None:
    if not out.exists():
        os.rename(work, out)
        return
    keep, lock = _locked_folder(out)
    os.rename(out, keep / REPLACED)
    try:
        os.rename(work, out)
    except BaseException:
        os.rename(keep / REPLACED, out)
        raise
    finally:
        shutil.rmtree(keep, ignore_errors=True)
        os.close(lock)
