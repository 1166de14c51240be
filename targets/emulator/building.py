"""Building an emulated board: the emulator, the system that it shares with other boards, and its own files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.emulator import board as boards
from targets.emulator import counting, deb, debian, machine, store, wheels
from targets.errors import TargetError

Progress = Callable[[str, int, int | None], None]
COMPILED = ("usr/lib/python3.11", "opt")
# What is not imported where a model runs; half of all files.
UNCOMPILED = r"/(tests?|tools|transformers|quantization|f2py|lib2to3|ensurepip|distutils|pydoc_data)/"
EXTRAS = ("login", "tflite-runtime")
# What nobody reads on an emulated board.
UNWANTED = tuple(f"usr/share/{name}/" for name in ("doc", "man", "info", "locale", "lintian", "bug", "bash-completion"))


def build(name: str, progress: Progress, extras: Collection[str] = ()) -> Path:
    """Make a board ready in the cache, and return its folder. What is there and current is left as it is.

    `extras`: "login" adds a shell and what ssh needs, "tflite-runtime" the older runtime in a folder of its own.
    Raises MissingRuntime where this machine cannot, TargetError for an unknown board, no network, or a full disk.
    """
    board = boards.load(name)
    machine.refuse_host()
    unknown = sorted(set(extras) - set(EXTRAS))
    if unknown:
        raise TargetError(f"There is nothing called '{unknown[0]}' to add to a board; there are {', '.join(EXTRAS)}.")
    with store.locked(lambda: progress("wait for another build", 0, None)):
        work = _Work(board, progress, store.folder(), store.recipe())
        work.part(store.folder() / "qemu", machine.of_emulator(), set(extras) & {"login"}, work.emulator)
        work.part(machine.base_of(board), machine.of_base(), set(extras), work.system)
        work.part(store.folder() / name, machine.of_board(name), set(), work.board_files)
        shutil.rmtree(work.downloads, ignore_errors=True)
    return store.folder() / name


@dataclass
class _Work:
    board: boards.Board
    progress: Progress
    folder: Path
    recipe: dict[str, Any]
    release: debian.Release | None = None

    @property
    def downloads(self) -> Path:
        return self.folder / "downloads"

    def part(self, place: Path, identity: str, extras: set[str], make: Callable[[Path, dict, set[str]], None]) -> None:
        """Build one part, unless it is there, current, and has these extras; what it had stays in it."""
        manifest = store.manifest(place)
        if manifest is not None:
            had = set(manifest.get("extras", ()))
            if manifest["identity"] == identity and extras <= had:
                return
            stale = manifest["identity"] != identity
            self.progress(
                f"build {place.name} again: " + ("made by another version" if stale else "more is wanted"), 0, None
            )
            extras = extras | had & set(EXTRAS)
        says: dict[str, Any] = {"identity": identity, "layout": store.LAYOUT, "extras": sorted(extras)}
        with store.building(place, says) as fresh:
            make(fresh, says, extras)

    def emulator(self, fresh: Path, says: dict, extras: set[str]) -> None:
        """QEMU for this machine, with its libraries, and the plugin."""
        wanted = self.recipe["emulator"]
        programs = set(wanted["programs"]) | (set(wanted["login_programs"]) if extras else set())
        names = wanted["packages"] + (wanted["login_packages"] if extras else [])

        def keep(path: str) -> bool:
            return path in programs or (path.startswith("usr/lib") and ".so" in path and "/gconv/" not in path)

        architecture = machine.ARCHITECTURES[os.uname().machine]
        says["packages"] = self._packages(names, architecture, fresh, keep, says)
        says["version"] = says["packages"][wanted["packages"][0]]["version"]
        self.progress("compile the counting plugin", 0, None)
        says["uncounted"] = counting.compile_plugin(fresh / "libcost.so")

    def system(self, fresh: Path, says: dict, extras: set[str]) -> None:
        """Debian, Python and the runtimes of one architecture."""
        names = self.recipe["packages"]["base"] + (self.recipe["packages"]["login"] if "login" in extras else [])
        says["packages"] = self._packages(
            names, self.board.architecture, fresh, lambda path: not path.startswith(UNWANTED), says
        )
        for name in deb.MERGED:
            if (fresh / "usr" / name).is_dir():
                (fresh / name).symlink_to(f"usr/{name}")
        for name in ("dev", "proc", "root", "run", "sys", "tmp", "var/tmp", "opt", "usr/local/bin", "etc"):
            (fresh / name).mkdir(parents=True, exist_ok=True)
        _accounts(fresh)
        says["wheels"] = {"base": self._wheels("base", fresh / machine.RUNTIMES)}
        # As if installed there by pip: a Python that is started without our variables finds them.
        packages = fresh / "usr/local/lib/python3.11/dist-packages"
        packages.mkdir(parents=True)
        (packages / "runtimes.pth").write_text(f"/{machine.RUNTIMES}\n", "utf-8")
        if "tflite-runtime" in extras:
            says["wheels"]["tflite-runtime"] = self._environment("tflite-runtime", fresh)
        self._compile(fresh)

    def board_files(self, fresh: Path, says: dict, extras: set[str]) -> None:
        """The board's own /proc and /sys, beside links to the shared system."""
        base = machine.base_of(self.board)
        for entry in sorted(base.iterdir()):
            # No folder in which programs work: what is in the emulator's root hides what is on this machine.
            if entry.name in (*deb.MERGED, "usr", "etc", "opt", "var"):
                (fresh / entry.name).symlink_to(f"../{base.name}/{entry.name}")
        boards.write(self.board, fresh)

    def _packages(
        self, names: Sequence[str], architecture: str, fresh: Path, keep: Callable[[str], bool], says: dict
    ) -> dict[str, dict[str, str]]:
        source = self.recipe["debian"]
        self.progress(f"read Debian's index for {architecture}", 0, None)
        self.downloads.mkdir(parents=True, exist_ok=True)
        if self.release is None:
            self.release = debian.release(source["url"], source["suite"], Path(source["keyring"]))
        says["debian"] = {"suite": source["suite"], "date": self.release.date, "vouched": self.release.vouched}
        index = debian.index(source["url"], source["suite"], self.release, architecture, self.downloads)
        chosen = debian.closure(index, names, source["ignore"])

        def told(done: int, total: int) -> None:
            self.progress(f"download Debian packages for {architecture}", done, total)

        for count, path in enumerate(debian.fetch_all(source["url"], chosen, self.downloads, told)):
            self.progress("unpack", count, len(chosen))
            deb.unpack(path, fresh, keep)
        return {package.name: {"version": package.version, "sha256": package.sha256} for package in chosen}

    def _wheels(self, which: str, into: Path) -> dict[str, dict[str, str]]:
        wanted = self.recipe["wheels"]
        self.progress(f"fetch {', '.join(wanted[which])}", 0, None)
        return wheels.install(wanted[which], into, self.board.machine, wanted["python"], wanted["platforms"])

    def _environment(self, name: str, fresh: Path) -> dict[str, dict[str, str]]:
        """A virtual environment as `python -m venv` makes it, in /opt."""
        place = fresh / "opt" / name
        found = self._wheels(name, place / "lib/python3.11/site-packages")
        (place / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n", "utf-8")
        (place / "bin").mkdir()
        for program in ("python", "python3", "python3.11"):
            (place / "bin" / program).symlink_to("../../../usr/bin/python3.11")
        return found

    def _compile(self, fresh: Path) -> None:
        """Compile all Python files, which halves every start; by hash, so that no time of a file matters."""
        self.progress("compile Python files", 0, None)
        options = (
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode",
            "unchecked-hash",
            "-s",
            str(fresh),
            "-x",
            UNCOMPILED,
        )
        folders = [str(fresh / name) for name in COMPILED]
        if sys.version_info[:2] == (3, 11) and sys.implementation.name == "cpython":
            command, environment = [sys.executable, *options, *folders], None
        else:
            # Compiled files belong to one version of Python, so the board's own one makes them: slower, emulated.
            manifest = store.manifest(self.folder / "qemu") or {}
            there = machine.Machine(self.board, fresh, self.folder / "qemu", manifest["version"], None, None)
            command, environment = there.command([machine.PYTHON, "-S", *options, *folders]), there.environment()
        # Its exit code tells of files that are no Python for this version, such as tests of old syntax: no matter.
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not any((fresh / machine.RUNTIMES / "numpy").glob("__pycache__/*.pyc")):
            raise TargetError(f"The board's Python files could not be compiled in {fresh}: is the disk full?")


def _accounts(root: Path) -> None:
    """Files without which a login has no user; packages leave them to scripts, which are not run."""
    python = root / "usr/bin/python3"
    if not python.exists():
        python.symlink_to("python3.11")
    shell = root / "usr/bin/sh"
    if (root / "usr/bin/dash").exists() and not shell.exists():
        shell.symlink_to("dash")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n", "utf-8")
    (root / "etc/group").write_text("root:x:0:\n", "utf-8")
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n", "utf-8")
