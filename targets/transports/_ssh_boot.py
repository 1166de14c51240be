"""How the keeper comes onto a device that has nothing of ours: a line of shell, a line of Python, then its sources."""

import json
import shlex
from pathlib import Path
from typing import Any

from targets.transports._ssh_frames import NO_PYTHON, OLD_PYTHON

# In the order in which they import each other.
MODULES = ("_ssh_frames", "_ssh_processes", "_ssh_line", "_ssh_errands", "_ssh_keeper")
OLDEST = (3, 9)

# One line, and no "!": the login shell may be any, a C shell too.
SHELL = (
    'boot=$1; shift; for p do case $p in "~/"*) p=$HOME/${p#"~/"};; esac; '
    'if command -v "$p" >/dev/null 2>&1; then exec "$p" -E -s -S -c "$boot"; fi; done; '
    f"echo {NO_PYTHON.decode()}; exit 127"
)
# Understood by Python 2 as well, which shall say its version. The folder of the login is no place to import from.
PYTHON = (
    "import sys; sys.path = [p for p in sys.path if p]; "
    f'sys.version_info < {OLDEST} and (sys.stdout.write("{OLD_PYTHON.decode()} " + sys.version.split()[0] + "\\n"), '
    "sys.stdout.flush(), sys.exit(3)); import json; b = sys.stdin.buffer; "
    'd = json.loads(b.read(int(b.readline()))); exec(d["start"])'
)
START = """
import types
for name, source in d["modules"]:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
module.start(d["config"])
"""


def remote_command(python: str | None) -> str:
    """The command line for the login shell there."""
    return shlex.join(["/bin/sh", "-c", SHELL, "sh", PYTHON, python or "python3"])


def first_bytes(config: dict[str, Any]) -> bytes:
    """What the command reads before any frame: the keeper's modules, and what to do (see `_ssh_keeper.start`)."""
    folder = Path(__file__).parent
    modules = [(f"{__package__}.{name}", (folder / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES]
    sent = json.dumps({"start": START, "modules": modules, "config": config}).encode()
    return b"%d\n" % len(sent) + sent
