"""How wrong the latency estimate is on every public measurement: `python benchmarks/estimate.py`.

Each pair is predicted by a fit that has seen neither it nor the same network on that device, nor, in the second table
of errors, anything of the device. Writes estimate_results.md beside this file. `--nets` first writes down again what
the networks of estimate_nets.py compute (device_profiles/measured/nets.toml).
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from convert import estimate_fit as fits
from convert.estimate import interval_factor, number_class
from convert.estimate_data import FOLDER, Pair, pairs
from convert.estimate_work import Work, work

RESULTS = Path(__file__).parent / "estimate_results.md"
UNSEEN = {
    "network": "the network on this device",
    "device": "the device",
    "runtime": "the runtime",
}

HEAD = """\
# How wrong the latency estimate is

`python benchmarks/estimate.py` writes this page. Estimates are for devices that are not at hand; nothing here was
measured by Tightfit. Each row is a public figure (sources: `device_profiles/measured/pairs.toml`) and what a fit says
that has not seen this network on this device. Low to high is the 90 % interval that a report would give.

| device | runtime | numbers | threads | network | low | estimate | high | measured, ms | estimate / measured |
|---|---|---|---|---|---|---|---|---|---|
"""
ERRORS = """\
What the fit had not seen, and by which factor it was off: typically (root mean square of the logarithm), and at most.

| fitted together | not seen | pairs | typical | worst |
|---|---|---|---|---|
"""


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", action="store_true", help="write device_profiles/measured/nets.toml first")
    if parser.parse_args().nets:
        (FOLDER / "nets.toml").write_text(nets_toml())
    text = page()
    print(text)
    RESULTS.write_text(text)


def nets_toml() -> str:
    """What every network computes, as TOML; torch builds them, without a trained weight."""
    import torch
    from estimate_nets import NETS

    from convert.capture_program import input_specs, unlift
    from convert.normal_form import normalise

    lines = ["# Written by benchmarks/estimate.py --nets from estimate_nets.py: operators of each network, as"]
    lines += ["# [how many alike, multiply-accumulates, weights, numbers in and out, which form of convolution].", ""]
    for name, (make, side) in NETS.items():
        with torch.no_grad():
            program = torch.export.export(make().eval(), (torch.zeros(1, 3, side, side),))
        graph = unlift(program)
        found = work(normalise(graph), input_specs(graph))
        lines += [f"{name} = [", *(f"  {row}," for row in rows(found)), "]", ""]
    return "\n".join(lines)


def rows(found: Iterable[Work]) -> Iterator[str]:
    """Alike operators in one row, in the order they first appear."""
    for one, count in Counter(found).items():
        form = "depthwise" if one.depthwise else "square" if one.square else ""
        yield f'[{count}, {one.macs}, {round(one.weight_bytes / 4)}, {one.numbers}, "{form}"]'


def page() -> str:
    """The Markdown page."""
    lines = [HEAD.rstrip()]
    inside = Counter[bool]()
    for name in dict.fromkeys(fits.family(p) for p in pairs()):
        held = fits.held_out(name, "network")
        for pair, guess in held:
            spread = interval_factor(_alike(held, pair), 0.0)
            inside[guess / spread <= pair.ms <= guess * spread] += 1
            lines.append(_row(pair, guess, spread))
    lines += ["", f"Inside the interval: {inside[True]} of {inside.total()}.", "", *errors()]
    return "\n".join(lines) + "\n"


def _alike(held: Iterable[tuple[Pair, float]], pair: Pair) -> list[float]:
    """The errors on all other pairs of the same class of numbers: an interval must not know its own error."""
    return [math.log(g / p.ms) for p, g in held if number_class(p) == number_class(pair) and p is not pair]


def _row(pair: Pair, guess: float, spread: float) -> str:
    threads = str(pair.threads) if pair.processor else "–"
    times = [guess / spread, guess, guess * spread, pair.ms]
    cells = [pair.device, pair.runtime, number_class(pair), threads, pair.net, *(f"{t:.3g}" for t in times)]
    return f"| {' | '.join(cells)} | {guess / pair.ms:.2f} |"


def errors() -> Iterator[str]:
    """By what has been left out of the fit: the root mean square of log(estimate / measured), as a factor."""
    yield ERRORS.rstrip()
    for name in dict.fromkeys(fits.family(p) for p in pairs()):
        for unseen in ("network", "device", "runtime") if name == "processors" else ("network",):
            off = [math.log(guess / p.ms) for p, guess in fits.held_out(name, unseen)]
            typical = math.exp(math.sqrt(sum(e * e for e in off) / len(off)))
            worst = math.exp(max(map(abs, off)))
            yield f"| {name} | {UNSEEN[unseen]} | {len(off)} | {typical:.2f} | {worst:.2f} |"


if __name__ == "__main__":
    main()
