"""Debian's archive without apt: which packages a system needs, and by what chain of hashes each is believed.

InRelease, signed, holds the hash of Packages.xz, which holds the hash of every package.
"""

import lzma
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from targets.emulator import download
from targets.errors import TargetError

# https://www.debian.org/doc/debian-policy/ch-relationships.html: a name, perhaps ":any", perhaps "(>= version)".
NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
# What is read of an entry. None of these goes on in a second line.
FIELDS = ("Package: ", "Version: ", "Filename: ", "Size: ", "SHA256: ", "Pre-Depends: ", "Depends: ", "Provides: ")


@dataclass(frozen=True)
class Package:
    """One entry of the index. `needs`: for each dependency, the names any of which fulfils it."""

    name: str
    version: str
    file: str
    size: int
    sha256: str
    needs: tuple[tuple[str, ...], ...] = ()
    provides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Release:
    """A suite as of one day: hashes of its index files, and who vouches for them."""

    date: str
    vouched: str
    sha256: Mapping[str, str]


def release(url: str, suite: str, keyring: Path) -> Release:
    """The suite's signed list of hashes. Raises TargetError where the signature is wrong."""
    at = f"{url}/dists/{suite}/InRelease"
    text, vouched = verified(download.text(at), keyring, at)
    date = re.search(r"^Date: (.+)$", text, re.M)
    hashes = text.partition("\nSHA256:")[2]
    found = re.findall(r"^ ([0-9a-f]{64}) +\d+ (\S+)$", hashes, re.M)
    if date is None or not found:
        raise TargetError(f"{at} is not what Debian's archive has there; something in between answers for it.")
    return Release(date[1], vouched, {name: sha256 for sha256, name in found})


def verified(signed: bytes, keyring: Path, at: str) -> tuple[str, str]:
    """The text that a signature covers, and who vouches for it. Raises TargetError for a wrong signature."""
    gpgv = shutil.which("gpgv")
    if gpgv is None or not keyring.exists():
        lack = "gpgv" if gpgv is None else str(keyring)
        return signed.decode(), f"TLS alone: the signature could not be verified without {lack}"
    # Only what gpgv itself hands out is read: text around the signed part is not covered.
    result = subprocess.run([gpgv, "--keyring", str(keyring), "--output", "-"], input=signed, capture_output=True)
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        raise TargetError(
            f"The signature of {at} is wrong, so nothing of it is used. gpgv says: {said[-1] if said else ''}"
        )
    signers = re.findall(r'Good signature from "(.+?)"', result.stderr.decode(errors="replace"))
    return result.stdout.decode(), f"signature of {', '.join(signers)}"


def index(url: str, suite: str, of: Release, architecture: str, folder: Path) -> dict[str, Package]:
    """All packages of a suite's main section, by name."""
    name = f"main/binary-{architecture}/Packages.xz"
    if name not in of.sha256:
        raise TargetError(f"Debian's {suite} has no packages for {architecture}.")
    path = folder / f"Packages-{architecture}.xz"
    download.fetch(f"{url}/dists/{suite}/{name}", path, of.sha256[name])
    try:
        return parse(lzma.decompress(path.read_bytes()).decode())
    except (lzma.LZMAError, KeyError, ValueError) as error:
        raise TargetError(f"{url}/dists/{suite}/{name} cannot be read: {error!r}") from error


def parse(text: str) -> dict[str, Package]:
    """The packages of an index: paragraphs of lines "Field: value"."""
    found = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if line.startswith(FIELDS))
        if not fields:
            continue
        needs = [_names(part, "|") for key in ("Pre-Depends", "Depends") for part in fields.get(key, "").split(",")]
        package = Package(
            fields["Package"],
            fields["Version"],
            fields["Filename"],
            int(fields["Size"]),
            fields["SHA256"],
            tuple(names for names in needs if names),
            _names(fields.get("Provides", ""), ","),
        )
        found[package.name] = package
    return found


def closure(packages: Mapping[str, Package], wanted: Iterable[str], ignore: Iterable[str] = ()) -> list[Package]:
    """The wanted packages and all that they need, sorted by name. Versions are not compared: a suite fits itself.

    Of alternatives it takes what is chosen already, else the first there is, else the first that provides it.
    Raises TargetError where something is not to be had.
    """
    providers: dict[str, list[str]] = {}
    for package in packages.values():
        for name in package.provides:
            providers.setdefault(name, []).append(package.name)
    chosen: dict[str, Package] = {}
    left: list[tuple[tuple[str, ...], str]] = [((name,), "the list of what is wanted") for name in wanted]
    skipped = frozenset(ignore)
    while left:
        names, reason = left.pop(0)
        if skipped & set(names) or any(name in chosen for name in names):
            continue
        offers = [name for name in names if name in packages]
        offers += sorted(offer for name in names for offer in providers.get(name, ()))
        if not offers:
            raise TargetError(f"Debian's index has no package '{' | '.join(names)}', which {reason} names.")
        if any(offer in chosen for offer in offers):
            continue
        package = chosen[offers[0]] = packages[offers[0]]
        left += [(need, f"'{package.name}'") for need in package.needs]
    return sorted(chosen.values(), key=lambda package: package.name)


def fetch_all(url: str, packages: Iterable[Package], folder: Path, progress: Callable[[int, int], None]) -> list[Path]:
    """Download packages into a folder; `progress` hears the bytes there are, and those there will be."""
    packages = list(packages)
    total, before, paths = sum(package.size for package in packages), 0, []
    for package in packages:
        path = folder / Path(package.file).name

        def advance(there: int, before: int = before) -> None:
            progress(before + there, total)

        download.fetch(f"{url}/{package.file}", path, package.sha256, advance)
        before += package.size
        paths.append(path)
    return paths


def _names(text: str, separator: str) -> tuple[str, ...]:
    found = (NAME.match(part.strip()) for part in text.split(separator))
    return tuple(match[0] for match in found if match)
