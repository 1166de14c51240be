"""A built board: how a program is started on its emulated processor, and how one logs in to it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from targets.emulator import board as boards
from targets.emulator import counting, store
from targets.errors import MissingRuntime, TargetError

LOGIN = Path(__file__).parent / "login.sh"
# Where a board's Python packages are, below its root.
RUNTIMES = "opt/runtimes/lib/python3.11/site-packages"
TFLITE_RUNTIME = "opt/tflite-runtime"
PYTHON = "/usr/bin/python3.11"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # of machines that can emulate: the kernel's, Debian's


@dataclass(frozen=True)
class Machine:
    """A board that is built: `root` is its file system, `emulator` the folder of QEMU; `plugin` counts instructions.

    `uncounted`: why there is no plugin, else None. `extras`: what `build` was asked for beyond the usual.
    """

    board: boards.Board
    root: Path
    emulator: Path
    version: str
    plugin: Path | None
    uncounted: str | None
    extras: frozenset[str] = frozenset()

    def command(self, program: Sequence[str], count_into: str | None = None) -> list[str]:
        """The command that runs a program of the board; `program[0]` is its path there.

        `count_into`: the file for a line of counts at every getppid() of the program. Raises MissingRuntime where
        nothing can count.
        """
        library = self.emulator / "usr/lib"
        # The emulator comes with its own C library, so the host's need not suit it.
        loader = next(path for path in sorted(self.emulator.glob("usr/lib*/**/ld-linux-*.so.*")) if path.exists())
        folders = [str(library / f"{_host_machine()}-linux-gnu"), str(library)]
        command = [
            str(loader),
            "--library-path",
            ":".join(folders),
            str(self.emulator / "usr/bin" / self.board.program),
        ]
        if count_into is not None:
            if self.plugin is None:
                raise MissingRuntime(
                    f"Instructions cannot be counted on {self.board.name}: {self.uncounted}. Install one "
                    f"(Debian: apt-get install gcc), then `{remedy(self.board.name)}`."
                )
            command += ["-plugin", f"{self.plugin},out={count_into}"]
        # A seed of its own makes what the kernel would draw by chance the same in every run.
        command += ["-cpu", self.board.cpu, "-r", self.board.kernel, "-seed", "1", "-L", str(self.root)]
        return [*command, "-0", program[0], str(self.root / program[0].lstrip("/")), *program[1:]]

    def environment(self, site: str = RUNTIMES) -> dict[str, str]:
        """All variables that a program of the board sees: none of the host's, so that counts repeat.

        `site`: the folder of Python packages, below the root.
        """
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": "/opt",  # of the board: nothing in it of the user of this machine
            "LANG": "C.UTF-8",
            "PYTHONHOME": "/usr",
            "PYTHONPATH": f"/{site}",
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TIGHTFIT_EMULATED": "1",
        }


def find(name: str) -> Machine:
    """A board that is built. Raises TargetError where there is no such board, MissingRuntime where it is not built."""
    board = boards.load(name)
    refuse_host()
    part, folder = store.folder() / name, store.folder()
    for place, current in ((part, of_board(name)), (base_of(board), of_base()), (folder / "qemu", of_emulator())):
        manifest = store.manifest(place)
        if manifest is None:
            raise MissingRuntime(f"The emulated {board.title} is not built yet: `{remedy(name)}` does that, once.")
        if manifest["identity"] != current:
            raise MissingRuntime(
                f"The emulated {board.title} in {folder} was built by another version of Tightfit: `{remedy(name)}` "
                "builds it again."
            )
    says = store.manifest(folder / "qemu") or {}
    extras = frozenset((store.manifest(base_of(board)) or {}).get("extras", ()))
    uncounted = says.get("uncounted")
    plugin = None if uncounted else folder / "qemu" / "libcost.so"
    return Machine(board, part, folder / "qemu", says["version"], plugin, uncounted, extras)


def is_built(name: str) -> bool:
    """Whether a board can be used now. Raises TargetError where there is no such board."""
    boards.load(name)
    try:
        find(name)
    except MissingRuntime:
        return False
    return True


def login_command(name: str, home: Path) -> list[str]:
    """What lets a shell command run as if logged in on the board; the command line is to be appended as last argument.

    All programs that it starts are the board's. `home`, a folder here, holds the board's /root and /tmp, which outlast
    the login; the rest of the board cannot be written. Processes are this login's own: they end with it. For tests of
    what talks to boards: it needs Linux' user namespaces with a binfmt_misc of their own (Linux 6.7 or newer).
    Raises MissingRuntime where the board was built without what a login needs, or this machine lacks it.
    """
    machine = find(name)
    board = machine.board
    if "login" not in machine.extras:
        raise MissingRuntime(f"{name} was built without a shell: `{remedy(f'{name}/login')}` adds it.")
    if board.machine == os.uname().machine:
        raise TargetError(
            f"Nobody can log in to {name}: its programs are this machine's own, and would not be emulated."
        )
    if shutil.which("unshare") is None:
        raise MissingRuntime("A login to an emulated board needs `unshare` (Debian: apt-get install util-linux).")
    for folder in (home / "root", home / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    static = machine.emulator / "usr/bin" / f"{board.program}-static"
    return [
        *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--"),
        *("/bin/sh", str(LOGIN), str(base_of(board)), str(machine.root), str(home.absolute()), str(static)),
        *(board.machine, board.cpu, board.kernel, name),
    ]


def refuse_host() -> None:
    """Raise MissingRuntime where this machine cannot emulate."""
    system, machine = _host()
    if system != "Linux" or machine not in ARCHITECTURES:
        raise MissingRuntime(
            f"Emulated boards need Linux on x86_64 or aarch64, and this is {system} on {machine}. A virtual machine or "
            "a container with Linux does; so does a real board, with --on ssh://…"
        )


def remedy(name: str) -> str:
    """The command that builds a board."""
    return f"tightfit emulator build {name}"


def base_of(board: boards.Board) -> Path:
    """Where the system is that a board shares with others of its architecture."""
    return store.folder() / f"debian-{board.architecture}"


def of_board(name: str) -> str:
    """The identity of a board's own part."""
    return store.identity(boards.path_of(name), Path(boards.__file__))


def of_base() -> str:
    """The identity of a shared system."""
    return store.identity(store.RECIPE)


def of_emulator() -> str:
    """The identity of the emulator and its plugin."""
    return store.identity(store.RECIPE, counting.SOURCE, Path(counting.__file__))


def _host() -> tuple[str, str]:
    if not hasattr(os, "uname"):
        return "Windows", "this processor"
    return os.uname().sysname, os.uname().machine


def _host_machine() -> str:
    return _host()[1]
