"""Processes on the device: all that a session started can be found again and ended, whatever they did to hide.

Runs on the device: standard library, Python 3.9.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Make this process the parent of all orphans below it (Linux), so that a daemon cannot leave the session."""
    prctl = _prctl()
    if prctl is not None:
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def dies_with_parent() -> Callable[[], object] | None:
    """What a child calls before exec, so that it dies where this process is killed and can clean nothing."""
    prctl = _prctl()
    return None if prctl is None else lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_first(pid: int) -> None:
    """Let a process be the one that is killed when memory ends: not the keeper, nor the login."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("800")


def end_all(leader: int | None, seconds: float = 5.0) -> bool:
    """Kill all processes below this one, and the group of `leader`; False where some do not die.

    `leader` is not reaped: whoever waits for it is told how it ended.
    """
    deadline = time.monotonic() + seconds
    while True:
        if leader is not None:
            with contextlib.suppress(OSError):
                os.killpg(leader, signal.SIGKILL)
        alive = [pid for pid, state in _below(os.getpid()).items() if not _is_over(pid, state, leader)]
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _prctl() -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return found


def _is_over(pid: int, state: str, leader: int | None) -> bool:
    if state != "Z":
        return False
    if pid != leader:
        with contextlib.suppress(OSError):
            os.waitpid(pid, os.WNOHANG)
    return True


def _below(root: int) -> dict[int, str]:
    """The states of all processes below one, from /proc; none where there is no such thing."""
    parents: dict[int, int] = {}
    states: dict[int, str] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name, in parentheses, may hold anything; what follows its last one is in columns.
                columns = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                states[int(entry)], parents[int(entry)] = columns[0].decode(), int(columns[1])
    found: dict[int, str] = {}
    fresh = {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh and pid not in found}
        found.update({pid: states[pid] for pid in fresh})
    return found
