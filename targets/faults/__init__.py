"""Known faults, put into a copy of an artifact to see whether a check notices. One target per file.

A file holds `FAULTS`: {name: function that edits the artifact in place and says in a sentence what it did}. The
function raises TargetError when the artifact has nothing to inject that fault into.
"""

import importlib
import pkgutil

from ..errors import TargetError
from ._blocks import Fault

# The one fault that only hashes can be asked to notice: a low bit of one weight may change no output at all.
SEEN_BY_HASH_ONLY = frozenset({"flipped-bit"})


def find(target: str) -> dict[str, Fault]:
    """The faults of a target; imports that one file. Raises TargetError when there are none for it."""
    known = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    if target not in known:
        raise TargetError(f"there are no faults for the target '{target}'; there are for {', '.join(known)}")
    faults: dict[str, Fault] = importlib.import_module(f"{__name__}.{target}").FAULTS
    return faults
