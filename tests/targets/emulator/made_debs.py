"""Debian packages made by hand, good and bad ones."""

import io
import tarfile
from pathlib import Path

from targets.emulator.deb import MAGIC


def ar(members: dict[str, bytes]) -> bytes:
    """An `ar` archive, as `dpkg-deb` writes it."""
    whole = MAGIC
    for name, data in members.items():
        whole += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return whole


def entry(name: str, data: bytes = b"", link: str = "", kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> tuple:
    """One member of a tar, with its data."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(data), mode
    return info, data


def deb(path: Path, *entries: tuple, compression: str = "xz") -> Path:
    """A package with these files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    suffix = f".{compression}" if compression else ""
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{suffix}": tar.getvalue()}
    path.write_bytes(ar(members))
    return path
