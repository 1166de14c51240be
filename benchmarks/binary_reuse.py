"""When output reuse pays: instructions and CPU time of a binary linear layer by how alike its rows are.

    python benchmarks/binary_reuse.py [--board NAME]

A layer of 197 x 768 x 768 whose rows are one row with words of 64 signs drawn anew, so many that the tree of
`reuse_outputs` has a given share of the plain layer's words. Both ways are computed whatever the share; the outputs
must be equal. Instructions are those of the emulated board, times medians of this machine (read the ratio).
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "targets"), str(ROOT / "tests" / "calibrate")]

from binary_counts import counted  # noqa: E402
from binary_kernels import Linear, medians  # noqa: E402
from c_graphs import binary_graph, c_job, lowered, simulation  # noqa: E402
from tflite_graphs import batch  # noqa: E402

from targets import _c_reuse  # noqa: E402
from targets.c import TARGET  # noqa: E402

ROWS, SIZE = 197, 768


def alike(share: float) -> torch.Tensor:
    """Weights [SIZE, SIZE] of -1 and +1: a first row, and others with this share of its words drawn anew."""
    random = np.random.default_rng(0)
    words = np.broadcast_to(random.choice([-1.0, 1.0], (SIZE // 64, 64)), (SIZE, SIZE // 64, 64)).copy()
    new = random.random(words.shape[:2]) < share
    words[new] = random.choice([-1.0, 1.0], (int(new.sum()), 64))
    return torch.from_numpy(words.reshape(SIZE, SIZE)).float()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", default="raspberry-pi-4b")
    options = parser.parse_args()
    _c_reuse.WORTH = float("inf")  # to see what it costs where it does not pay, too
    x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))
    print(
        f"| entries per word | {options.board}, plain | with reuse | ratio | time here, ratio |\n|---|---|---|---|---|"
    )
    for share in (0.0, 0.02, 0.05, 0.1, 0.2):
        model = Linear(SIZE, SIZE, True).eval()
        with torch.no_grad():
            model.layer.weight.copy_(alike(share))
        plain = c_job(binary_graph(model, x, ("linear",)), x)
        jobs = {
            "plain": plain,
            "reuse": replace(plain, rules=plain.rules.model_copy(update={"reuse_outputs": True})),
        }
        wanted = simulation(plain)((x,))[0].numpy()
        counts, calls = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for name, case in jobs.items():
                (Path(folder) / name).mkdir()
                path = lowered(case, Path(folder) / name)
                session = TARGET.open(path)
                calls[name] = session.bind(batch(x))
                counts[name], equal = counted(options.board, path, x, wanted)
                if not equal or not np.array_equal(session.run(batch(x))["result0"], wanted):
                    sys.exit(f"{share}: {name} is not what the simulation computes")
            times = medians(calls, 15)
        words = model.layer.weight.detach().numpy() < 0
        rows = np.packbits(words, axis=1, bitorder="little").view("<u8")
        entries = len(_c_reuse.tree(rows, np.full(SIZE // 64, 2**64 - 1, np.uint64), SIZE).place) / rows.size
        a, b = counts["plain"]["all"], counts["reuse"]["all"]
        print(
            f"| {entries:.2f} | {a / 1e6:.2f} | {b / 1e6:.2f} | {b / a:.2f} | {times['reuse'] / times['plain']:.2f} |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
