"""A board's data, from `boards/<name>.toml`, and the files by which programs on it know where they are."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from targets.errors import TargetError

BOARDS = Path(__file__).parent / "boards"
# Debian's name of an architecture -> (the kernel's, the emulator's program). Wheels use the kernel's.
ARCHITECTURES = {"arm64": ("aarch64", "qemu-aarch64"), "amd64": ("x86_64", "qemu-x86_64")}
CPUS = "sys/devices/system/cpu"
LINE_BYTES = 64


@dataclass(frozen=True)
class Cache:
    """One cache of every core; `shared` by all of them, else each has its own. `size` as in /sys: "32K"."""

    level: int
    type: str
    size: str
    sets: int
    ways: int
    shared: bool = False


@dataclass(frozen=True)
class Board:
    """One board. `cpu` is the emulator's name for its processor; `files` and `core_files` are path -> text.

    In `cpuinfo_of_core` and `core_files`, "{core}" stands for the number of the core; `core_files` are below
    /sys/devices/system/cpu/cpu<core>.
    """

    name: str
    title: str
    architecture: str
    cpu: str
    kernel: str
    cores: int
    cpuinfo_of_core: str
    cpuinfo_of_board: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    core_files: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[Cache, ...] = ()

    @property
    def machine(self) -> str:
        """The architecture as `uname -m` says it."""
        return ARCHITECTURES[self.architecture][0]

    @property
    def program(self) -> str:
        """The emulator's program for it."""
        return ARCHITECTURES[self.architecture][1]


def boards() -> list[str]:
    """The names of all boards; reads the folder."""
    return sorted(path.stem for path in BOARDS.glob("*.toml"))


def load(name: str) -> Board:
    """The data of one board. Raises TargetError with the nearest name for one that there is not."""
    if name not in boards():
        near = difflib.get_close_matches(name, boards(), 1, 0.4)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise TargetError(f"There is no board '{name}' to emulate. {hint}There are {', '.join(boards())}.")
    data = tomllib.loads(path_of(name).read_text("utf-8"))
    data["caches"] = tuple(Cache(**cache) for cache in data.get("caches", ()))
    return Board(name=name, **data)


def path_of(name: str) -> Path:
    """Where a board's data is."""
    return BOARDS / f"{name}.toml"


def files(board: Board) -> dict[str, str]:
    """All files of the board, path below its root -> text: /proc/cpuinfo, the device tree, /sys's processors."""
    found = dict(board.files)
    for name, text in board.files.items():
        # The kernel's own place of it, which /proc/device-tree is a link to. A login sees this one only.
        if name.startswith("proc/device-tree/"):
            found[name.replace("proc/device-tree", "sys/firmware/devicetree/base")] = text
    found["proc/cpuinfo"] = (
        "".join(board.cpuinfo_of_core.replace("{core}", str(core)) for core in range(board.cores))
        + board.cpuinfo_of_board
    )
    for name in ("possible", "present", "online"):
        found[f"{CPUS}/{name}"] = f"0-{board.cores - 1}\n"
    found[f"{CPUS}/kernel_max"] = "255\n"
    for core in range(board.cores):
        here = f"{CPUS}/cpu{core}"
        for name, text in (_topology(board, core) | _caches(board, core)).items():
            found[f"{here}/{name}"] = f"{text}\n"
        found.update({f"{here}/{name}": text.replace("{core}", str(core)) for name, text in board.core_files.items()})
    return found


def write(board: Board, root: Path) -> None:
    """Write the board's files below `root`."""
    for name, text in files(board).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _topology(board: Board, core: int) -> dict[str, str]:
    everyone, mask = f"0-{board.cores - 1}", f"{(1 << board.cores) - 1:x}"
    alone = dict.fromkeys(("thread_siblings_list", "core_cpus_list"), str(core))
    alone |= dict.fromkeys(("thread_siblings", "core_cpus"), f"{1 << core:x}")
    together = dict.fromkeys(("core_siblings_list", "cluster_cpus_list", "package_cpus_list"), everyone)
    together |= dict.fromkeys(("core_siblings", "cluster_cpus", "package_cpus"), mask)
    numbers = {"physical_package_id": "0", "cluster_id": "0", "core_id": str(core)}
    return {f"topology/{name}": text for name, text in (alone | together | numbers).items()}


def _caches(board: Board, core: int) -> dict[str, str]:
    found = {}
    for index, cache in enumerate(board.caches):
        of = f"0-{board.cores - 1}", f"{(1 << board.cores) - 1:x}"
        cores, mask = of if cache.shared else (str(core), f"{1 << core:x}")
        rows = {
            "level": cache.level,
            "type": cache.type,
            "size": cache.size,
            "coherency_line_size": LINE_BYTES,
            "number_of_sets": cache.sets,
            "ways_of_associativity": cache.ways,
            "shared_cpu_list": cores,
            "shared_cpu_map": mask,
        }
        found.update({f"cache/index{index}/{name}": str(value) for name, value in rows.items()})
    return found
