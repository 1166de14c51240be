"""Downloads over real HTTP: they go on where they broke off, and only the promised bytes are kept."""

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from targets.emulator import download
from targets.errors import TargetError

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Archive(http.server.BaseHTTPRequestHandler):
    """Serves DATA, in parts where asked; /breaks ends the first answer half-way, /whole ignores what part is asked."""

    asked: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        if self.path == "/gone":
            self.send_error(404, "Not Found")
            return
        begun = int(wanted[6:-1]) if wanted and self.path != "/whole" else 0
        if begun >= len(DATA):
            self.send_error(416)
            return
        self.send_response(206 if begun else 200)
        self.send_header("Content-Length", str(len(DATA) - begun))
        self.end_headers()
        end = len(DATA) // 2 if self.path == "/breaks" and len(self.asked) == 1 else len(DATA)
        self.wfile.write(DATA[begun:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Archive.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_comes_and_is_not_fetched_again(archive: str, tmp_path: Path) -> None:
    told: list[int] = []
    for _ in range(2):
        download.fetch(f"{archive}/file", tmp_path / "a" / "file", SHA256, told.append)
    assert (tmp_path / "a/file").read_bytes() == DATA
    assert Archive.asked == [None]
    assert told[-1] == len(DATA)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_broken_download_goes_on(archive: str, tmp_path: Path) -> None:
    download.fetch(f"{archive}/breaks", tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    assert Archive.asked == [None, f"bytes={len(DATA) // 2}-"]


@pytest.mark.parametrize("page", ["file", "whole"])
@pytest.mark.parametrize("there", [1000, len(DATA)])
def test_what_an_earlier_run_left_is_used_or_replaced(archive: str, tmp_path: Path, page: str, there: int) -> None:
    (tmp_path / "file.part").write_bytes(DATA[:there])
    download.fetch(f"{archive}/{page}", tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    assert Archive.asked == [f"bytes={there}-"]


def test_other_bytes_than_promised_are_refused_and_removed(archive: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is not what the index promises"):
        download.fetch(f"{archive}/file", tmp_path / "file", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_named(archive: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"/gone cannot be downloaded: the server answers 404"):
        download.fetch(f"{archive}/gone", tmp_path / "file", SHA256)


def test_no_network_is_said_with_what_to_look_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        (tmp_path / "file.part").write_bytes(b"begun")
        with pytest.raises(TargetError, match=r"Connection refused.*Look at the network"):
            download.fetch(url, tmp_path / "file", SHA256)
        with pytest.raises(TargetError, match="Connection refused"):
            download.text(url)
    assert (tmp_path / "file.part").read_bytes() == b"begun", "kept, to go on from"
