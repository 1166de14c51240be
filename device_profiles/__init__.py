"""Facts about devices, one TOML file each: what a device computes fast, and how to prepare a graph for it.

`names` and `title` read nothing but file names and one line, so that listing devices costs no start-up time;
`DeviceProfile` and `TargetRules` bring pydantic in when they are first asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ProfileError

if TYPE_CHECKING:
    from .schema import DeviceProfile, TargetRules

__all__ = ["DeviceProfile", "ProfileError", "TargetRules", "load", "names", "title"]

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the profiles that come with the package, sorted; reads no file."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def title(name: str) -> str:
    """The first line of a built-in profile, a comment that says in a few words what the device is."""
    with (_FOLDER / f"{_known(name)}.toml").open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def load(name_or_path: str) -> "DeviceProfile":
    """The profile called `name_or_path`, or the one in that file when it ends in ".toml".

    Raises ProfileError: for an unknown name with the nearest names, for a bad file with file, line and field.
    """
    from .loading import read_profile

    if name_or_path.endswith(".toml"):
        return read_profile(Path(name_or_path))
    return read_profile(_FOLDER / f"{_known(name_or_path)}.toml")


def _known(name: str) -> str:
    """`name` itself when there is a built-in profile of that name; raises ProfileError when there is none."""
    if name in names():
        return name
    import difflib

    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names())}."
    raise ProfileError(
        f"there is no device '{name}'; {hint} `tightfit devices` lists them, "
        "and a path ending in .toml loads a profile of your own."
    )


def __getattr__(name: str) -> object:
    if name in ("DeviceProfile", "TargetRules"):
        from . import schema

        return getattr(schema, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
