"""Debian packages are unpacked whole, and nothing in one reaches outside of its folder."""

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_debs import ar, deb, entry

from targets.emulator.deb import members, unpack
from targets.errors import TargetError


@given(
    st.dictionaries(st.text("abcdefgh.-_", min_size=1, max_size=15).filter(lambda n: n.strip()), st.binary(max_size=99))
)
def test_an_archive_holds_what_was_put_in(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("ar") / "a"
    path.write_bytes(ar(contents))
    whole = path.read_bytes()
    assert {name: whole[at : at + size] for name, (at, size) in members(path).items()} == contents


@given(st.binary(max_size=300))
def test_bytes_that_are_no_package_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bad") / "a.deb"
    for content in (data, ar({})[:8] + data, ar({"data.tar.xz": data})):
        path.write_bytes(content)
        with pytest.raises(TargetError, match=r"a\.deb"):
            unpack(path, path.parent / "root")


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_files_folders_and_links_come_out(tmp_path: Path, compression: str) -> None:
    package = deb(
        tmp_path / "a.deb",
        entry("./", kind=tarfile.DIRTYPE),
        entry("./usr/share/a/", kind=tarfile.DIRTYPE),
        entry("./usr/share/a/text", b"text"),
        entry("./bin/run", b"#!", mode=0o755),
        entry("./usr/share/a/same", link="./usr/share/a/text", kind=tarfile.LNKTYPE),
        entry("./usr/share/a/near", link="text", kind=tarfile.SYMTYPE),
        entry("./lib64/far", link="/bin/run", kind=tarfile.SYMTYPE),
        entry("./usr/share/doc/a/copyright", b"long"),
        compression=compression,
    )
    root = tmp_path / "root"
    unpack(package, root, keep=lambda path: not path.startswith("usr/share/doc/"))
    assert (root / "usr/share/a/text").read_text() == "text"
    assert (root / "usr/share/a/same").read_text() == "text"
    assert (root / "usr/share/a/near").resolve() == (root / "usr/share/a/text").resolve()
    assert (root / "usr/bin/run").stat().st_mode & 0o111, "what lies in /bin is in /usr/bin, and can still be run"
    assert (root / "usr/lib64/far").resolve() == (root / "usr/bin/run").resolve(), "not the host's file of that name"
    assert not (root / "usr/share/doc").exists()


BAD = {
    "a path that goes up": [entry("./usr/../../out", b"x")],
    "a path that goes up at once": [entry("../out", b"x")],
    "a link that goes up": [entry("./etc/a", link="../../out", kind=tarfile.SYMTYPE)],
    "a file written through a link": [
        entry("./etc/a", link="/usr", kind=tarfile.SYMTYPE),
        entry("./etc/a/b", b"x"),
    ],
    "a hard link that goes up": [entry("./etc/a", link="../out", kind=tarfile.LNKTYPE)],
    "a hard link to nothing": [entry("./etc/a", link="./etc/b", kind=tarfile.LNKTYPE)],
    "a hard link to a link": [
        entry("./etc/b", link="/etc/c", kind=tarfile.SYMTYPE),
        entry("./etc/a", link="./etc/b", kind=tarfile.LNKTYPE),
    ],
    "a device": [entry("./dev/null", kind=tarfile.CHRTYPE)],
    "a pipe": [entry("./run/pipe", kind=tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("what", BAD)
def test_a_package_that_reaches_out_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TargetError, match="refused"):
        unpack(deb(tmp_path / "a.deb", *BAD[what]), tmp_path / "root")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_absolute_path_stays_inside(tmp_path: Path) -> None:
    unpack(deb(tmp_path / "a.deb", entry("/etc/passwd", b"x")), tmp_path / "root")
    assert (tmp_path / "root/etc/passwd").read_text() == "x"


def test_a_package_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    package = deb(tmp_path / "a.deb", entry("./etc/a", b"x" * 5000))
    whole = package.read_bytes()
    package.write_bytes(whole[:-40])
    with pytest.raises(TargetError, match="damaged"):
        unpack(package, tmp_path / "root")


def test_a_compression_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(ar({"debian-binary": b"2.0\n", "data.tar.zst": b"x"}))
    with pytest.raises(TargetError, match=r"data\.tar\.zst"):
        unpack(tmp_path / "a.deb", tmp_path / "root")
