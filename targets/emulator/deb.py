"""Unpack Debian packages: an `ar` archive that holds a compressed tar of files. Scripts in it are never run.

Packages come over the network: nothing in one can name a file outside the folder it is unpacked to, go through a
symbolic link, or make anything but files, folders and links.
"""

import io
import posixpath
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from targets.errors import TargetError

MAGIC = b"!<arch>\n"
HEADER_BYTES = 60
COMPRESSIONS = ("", ".gz", ".bz2", ".xz")
# Folders that live under /usr on every Debian of today, whatever a package calls them; links lead there.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def members(archive: Path) -> dict[str, tuple[int, int]]:
    """What an `ar` archive holds: name -> (offset, size) in bytes. Raises TargetError where it is none, or cut off."""
    found: dict[str, tuple[int, int]] = {}
    end = archive.stat().st_size
    with archive.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise TargetError(f"{archive.name} is no Debian package: it does not begin as an 'ar' archive does.")
        while header := file.read(HEADER_BYTES):
            size = header[48:58].strip()
            offset = file.tell()
            if header[58:] != b"`\n" or not size.isdigit() or offset + int(size) > end:
                raise TargetError(f"{archive.name} is damaged: the header at byte {offset - HEADER_BYTES} is wrong.")
            found[header[:16].decode("ascii", "replace").strip().rstrip("/")] = (offset, int(size))
            file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    return found


def unpack(archive: Path, root: Path, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack a package's files whose path, like "usr/bin/sh", passes `keep`. Raises TargetError for a bad one."""
    found = members(archive)
    name = next((name for name in found if name.removeprefix("data.tar") in COMPRESSIONS), None)
    if name is None:
        raise TargetError(
            f"{archive.name} holds no data that can be unpacked here, but {', '.join(found) or 'nothing'}."
        )
    offset, size = found[name]
    with archive.open("rb") as file:
        file.seek(offset)
        data = io.BytesIO(file.read(size))
    try:
        with tarfile.open(fileobj=data) as tar:
            for member in tar:
                path = _inside(member.name, archive)
                if path and keep(path):
                    _write(tar, member, root, path, archive)
    except (tarfile.TarError, EOFError, OSError) as error:
        # A full disk is the caller's to explain.
        if isinstance(error, OSError) and error.errno:
            raise
        raise TargetError(f"{archive.name} is damaged: {error}") from error


def _inside(name: str, archive: Path) -> str:
    """A member's path below the root, normalized; "" for the root itself."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise TargetError(f"{archive.name} is refused: '{name}' would be written outside of its folder.")
    return "/".join(["usr", *parts] if parts and parts[0] in MERGED else parts)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path, path: str, archive: Path) -> None:
    target = root / path
    for parent in list(target.parents)[: path.count("/")]:
        if parent.is_symlink():
            raise TargetError(f"{archive.name} is refused: '{member.name}' goes through a symbolic link.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        if not target.is_symlink():
            target.mkdir(exist_ok=True)
        return
    if target.is_symlink() or target.is_file():
        target.unlink()
    if member.issym():
        target.symlink_to(_link(member, path, archive))
    elif member.islnk():
        source = root / _inside(member.linkname, archive)
        if source.is_symlink() or not source.is_file() or not source.resolve().is_relative_to(root.resolve()):
            raise TargetError(f"{archive.name} is refused: '{member.name}' is linked to '{member.linkname}'.")
        target.hardlink_to(source)
    elif member.isreg():
        content = tar.extractfile(member)
        assert content is not None
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)
        target.chmod(0o755 if member.mode & 0o111 else 0o644)
    else:
        raise TargetError(f"{archive.name} is refused: '{member.name}' is neither a file, a folder nor a link.")


def _link(member: tarfile.TarInfo, path: str, archive: Path) -> str:
    """Where a link leads, from its own folder: an absolute one would leave the root for the host's files."""
    linked = member.linkname
    folder = "" if linked.startswith("/") else posixpath.dirname(posixpath.normpath(member.name.lstrip("/")))
    whole = posixpath.normpath(posixpath.join(folder, linked.lstrip("/")))
    if whole == ".." or whole.startswith("../"):
        raise TargetError(
            f"{archive.name} is refused: the link '{member.name}' leads out of its folder, to '{linked}'."
        )
    return posixpath.relpath(_inside(whole, archive) or ".", posixpath.dirname(path) or ".")
