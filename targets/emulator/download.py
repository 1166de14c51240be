"""Downloads that go on where they broke off, and are believed only by their SHA-256."""

import hashlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from targets.errors import TargetError

CHUNK = 1 << 18
TRIES = 4
SECONDS = 30.0
# Not every OSError: a full disk is none of the network.
NETWORK = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)


def fetch(url: str, path: Path, sha256: str, advance: Callable[[int], None] = lambda count: None) -> None:
    """Download `url` to `path`, unless it is there; `advance` hears how many bytes there are.

    What arrived of a broken download stays beside `path`, and the next call goes on from there. Raises TargetError
    where the network gives nothing, or something else than what was promised.
    """
    if path.exists() and digest(path) == sha256:
        advance(path.stat().st_size)
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(TRIES):
        try:
            _go_on(url, part, advance)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or turn == TRIES - 1:
                part.unlink(missing_ok=True)
                raise TargetError(
                    f"{url} cannot be downloaded: the server answers {error.code} {error.reason}."
                ) from error
        except NETWORK as error:
            if turn == TRIES - 1:
                raise TargetError(_no_network(url, error)) from error
        time.sleep(2.0**turn / 2)
    if digest(part) != sha256:
        part.unlink()
        raise TargetError(
            f"{url} is not what the index promises: its SHA-256 differs, and it was removed. The archive may just be "
            "changing: try again. If it stays so, something between here and there changes what you download."
        )
    part.replace(path)


def text(url: str) -> bytes:
    """What is at `url`, all of it in memory. Raises TargetError where the network does not give it."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, http.client.HTTPException) as error:
        raise TargetError(_no_network(url, error)) from error


def digest(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _go_on(url: str, part: Path, advance: Callable[[int], None]) -> None:
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and begun:
            return  # all of it is there already: its hash decides
        raise
    with answer, part.open("ab" if answer.status == http.client.PARTIAL_CONTENT else "wb") as file:
        advance(file.tell())
        while block := answer.read(CHUNK):
            file.write(block)
            advance(file.tell())
        # Python reports a connection that closed too early only to whoever reads all at once.
        if getattr(answer, "length", 0):
            raise http.client.IncompleteRead(b"", answer.length)


def _no_network(url: str, error: Exception) -> str:
    cause = getattr(error, "reason", None) or str(error) or type(error).__name__
    return (
        f"{url} cannot be downloaded: {cause}. Look at the network, and at https_proxy if there is a proxy. "
        "What arrived is kept: the same command goes on from there."
    )
