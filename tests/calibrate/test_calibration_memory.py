"""Finding ranges takes memory that does not depend on how many samples there are."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import sys
import torch
from torch import nn
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from small_graphs import ISLANDS, capture, images
from calibrate import steps

count, keep = int(sys.argv[1]), sys.argv[2] == "keep"
torch.manual_seed(0)
layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(25088, 10)
model = nn.Sequential(*layers)
graph = capture(model, images(size=32))
held = []

def batches(limit=count):
    for start in range(0, min(count, limit), 16):
        batch = images(16, size=32, seed=start)
        if keep:
            held.append(graph(batch)[0].new_zeros(16, 32, 32, 32) + 1)
        yield [batch]

context = steps.Context(plan=ISLANDS, batches=batches, few_batches=lambda: batches(64))
steps.apply("quantize_static", graph, context)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]))
"""


def peak(count: int, keep: str = "forget") -> int:
    """Peak memory [KiB] of a child that calibrates on `count` images; with "keep" it keeps a tensor of every batch too.

    Not ru_maxrss: that is never below what the parent held when it started the child.
    """
    here = Path(__file__).parent
    code = CHILD.format(paths=[str(here), str(here.parents[1])])
    command = [sys.executable, "-c", code, str(count), keep]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_sixteen_times_the_samples_take_no_more_memory() -> None:
    few = peak(64)
    assert peak(1024) < 1.1 * few
    assert peak(1024, "keep") > 1.1 * few  # the control: 128 KiB for every sample show
