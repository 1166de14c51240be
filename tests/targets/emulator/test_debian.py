"""Which packages a system takes, and that nothing of an archive is believed without its chain of hashes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from targets.emulator import debian
from targets.errors import TargetError

INDEX = """Package: python
Version: 3.11-1
Depends: libc (>= 2.36), ssl3 | ssl1:any, mail-agent, docs-tool
Pre-Depends: base
Filename: pool/p/python_3.11-1.deb
Size: 10
SHA256: aa
Description: a language
 Depends: nothing, here

Package: libc
Version: 2.36
Depends: base
Filename: pool/l/libc.deb
Size: 20
SHA256: bb

Package: base
Version: 12
Depends: libc
Filename: pool/b/base.deb
Size: 30
SHA256: cc

Package: ssl1
Version: 1
Filename: pool/s/ssl1.deb
Size: 40
SHA256: dd

Package: postfix
Version: 1
Provides: mail-agent (= 1), other
Filename: pool/p/postfix.deb
Size: 50
SHA256: ee

Package: exim
Version: 1
Provides: mail-agent
Filename: pool/e/exim.deb
Size: 60
SHA256: ff
"""


def names(*wanted: str, ignore: tuple[str, ...] = ("docs-tool",)) -> list[str]:
    return [package.name for package in debian.closure(debian.parse(INDEX), wanted, ignore)]


def test_an_index_is_read() -> None:
    python = debian.parse(INDEX)["python"]
    assert (python.version, python.size, python.sha256) == ("3.11-1", 10, "aa")
    assert python.needs == (("base",), ("libc",), ("ssl3", "ssl1"), ("mail-agent",), ("docs-tool",))


def test_all_that_is_needed_is_taken_and_no_more() -> None:
    assert names("libc") == ["base", "libc"], "a circle ends"
    assert names("python") == ["base", "exim", "libc", "python", "ssl1"], "an alternative, and one that provides"


def test_what_is_chosen_already_provides() -> None:
    assert names("postfix", "python") == ["base", "libc", "postfix", "python", "ssl1"]


def test_what_is_not_to_be_had_is_named_with_what_names_it() -> None:
    with pytest.raises(TargetError, match="'docs-tool', which 'python' names"):
        names("python", ignore=())
    with pytest.raises(TargetError, match="'perl'"):
        names("perl")


SIGNED = """Origin: Debian
Codename: bookworm
Date: Sat, 11 Jul 2026 10:16:37 UTC
MD5Sum:
 d41d8cd98f00b204e9800998ecf8427e 12 main/binary-arm64/Packages.xz
SHA256:
 9e0b5aabb2465b3d2e7a7fe27f9913846277833f7a2826e7767acccff5b588c5 12 main/binary-arm64/Packages.xz
"""


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """An InRelease, and the ring that holds the key of its signature."""
    if shutil.which("gpg") is None or shutil.which("gpgv") is None:
        pytest.skip("no signature was verified: gpg and gpgv are not installed")
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-generate-key", "Archive <a@example.org>", "rsa2048", "sign"], check=True)
    made = subprocess.run([*gpg, "--clearsign"], input=SIGNED.encode(), capture_output=True, check=True)
    ring = home / "ring.gpg"
    ring.write_bytes(subprocess.run([*gpg, "--export"], capture_output=True, check=True).stdout)
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return made.stdout, ring


def test_a_signature_vouches_for_what_it_covers(signed: tuple[bytes, Path]) -> None:
    text, ring = signed
    read, vouched = debian.verified(b"SHA256:\n around it\n" + text, ring, "here")
    assert read == SIGNED, "what stands around the signed text is not read"
    assert "Archive <a@example.org>" in vouched


def test_a_changed_text_and_a_strange_key_are_refused(signed: tuple[bytes, Path], tmp_path: Path) -> None:
    text, ring = signed
    with pytest.raises(TargetError, match="signature of here is wrong"):
        debian.verified(text.replace(b"9e0b", b"9e0c"), ring, "here")
    (tmp_path / "other.gpg").write_bytes(b"")
    with pytest.raises(TargetError, match="signature of here is wrong"):
        debian.verified(text, tmp_path / "other.gpg", "here")


def test_without_keys_it_says_that_only_tls_vouches(tmp_path: Path) -> None:
    text, vouched = debian.verified(SIGNED.encode(), tmp_path / "none.gpg", "here")
    assert text == SIGNED
    assert vouched.startswith("TLS alone")
