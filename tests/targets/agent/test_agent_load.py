"""What other processes took of the cores: counted from /proc/stat, less what is this process's own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from targets.agent.load import Others

pytestmark = pytest.mark.skipif(
    not Path("/proc/stat").exists(), reason="no /proc/stat on this system: others' work was not counted"
)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def stat(root: Path, busy: int) -> Path:
    rows = "\n".join(f"cpu{core} {busy} 0 0 5 9 0 0 0 0 0" for core in sorted(os.sched_getaffinity(0)))
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu 1 2 3 4 5 6 7 8 9 10\n{rows}\nintr 1 2\n")
    return root


def test_what_others_did_is_a_share_of_all_cores(tmp_path: Path) -> None:
    others = Others(stat(tmp_path, 1000))
    start = time.monotonic()
    time.sleep(0.5)
    stat(tmp_path, 1000 + round(0.25 * os.sysconf("SC_CLK_TCK")))
    share = others.share()
    assert share is not None
    # Half of half a second on every core; what has passed since may be more, never less.
    assert 0.25 / (time.monotonic() - start) - 0.1 < share <= 0.5


def test_nothing_done_is_a_share_of_nothing(tmp_path: Path) -> None:
    others = Others(stat(tmp_path, 1000))
    time.sleep(0.1)
    assert others.share() == 0


def test_a_system_that_does_not_say_is_not_known(tmp_path: Path) -> None:
    assert Others(tmp_path).share() is None


def test_a_process_beside_this_one_is_seen_and_this_ones_own_work_is_not() -> None:
    program = "import time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    beside = subprocess.Popen([sys.executable, "-c", program])
    try:
        others = Others()
        spin(1.0)
        share = others.share()
    finally:
        beside.kill()
        beside.wait()
    assert share is not None
    cores = len(os.sched_getaffinity(0))
    # Two that work share the cores fairly; ticks of 10 ms and the rest of the machine leave a margin.
    assert share > 0.5 * min(1.0, cores / 2) / cores
    assert share <= 1.0
