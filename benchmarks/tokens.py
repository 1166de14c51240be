"""Fewer tokens, in answers and in milliseconds: `python benchmarks/tokens.py --help`.

`pareto`: the zoo's ViT with every method and several shares of tokens; how often the artifact still gives the float
model's answer, against its time beside the float artifact's, as a table and a picture. `speed`: DeiT-tiny and
DeiT-small shapes (224 pixels, 197 tokens, random weights) with 40 % fewer multiply-accumulates, float and int8, and
whether the two gains multiply. `text`: MiniLM on padded sentences. Times are CPU time of one thread at batch 1, every
artifact of a case in one process, in turns, medians of rounds.
"""

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from ptq import cpu_ratios, device, prepare
from torch.fx import GraphModule

import targets
from calibrate.samples import CalibrationSet, InputSpec
from calibrate.tokens.schedule import Schedule, geometric
from convert import recipes, schedules
from convert.capture import Captured, capture
from convert.compress import Builder, Judge
from convert.data import open_data
from convert.drift import Drift, classifies
from convert.evaluation import evaluation_batches, float_runner, session_runner
from convert.host import cpu_name, system, versions
from convert.planning import decide
from convert.pruning import Pruner
from device_profiles import DeviceProfile, load

HERE = Path(__file__).resolve().parent
SHARES = (0.8, 0.6)
# As published: ToMe merges as many tokens in every block, EViT cuts at three blocks to the same fraction.
PLAIN_EVIT = (3 / 12, 6 / 12, 9 / 12)
METHODS: dict[str, tuple[str, dict]] = {
    "random": ("random", {}),
    "even": ("even", {}),
    "EViT as published": ("evit", {}),
    "ToMe as published": ("tome", {}),
    "evit": ("evit", {}),
    "zero_tprune": ("zero_tprune", {}),
    "tome": ("tome", {}),
    "mctf": ("mctf", {}),
    "cluster": ("cluster", {}),
}
FEWER = 0.6
SPEED = ("evit", "tome", "zero_tprune")
THIRDS = (3, 6, 9)


@dataclass
class Row:
    """One artifact: what was cut, how often it agrees with float (or the mean cosine), its time over float's."""

    case: str
    how: str
    cuts: str
    share: float
    quality: float | None
    ratio: float | None


@dataclass
class Bench:
    """One model in one runtime: its float twin, and artifacts to be timed with it."""

    captured: Captured
    target: str
    folder: Path

    def __post_init__(self) -> None:
        self.rules = load(device_name()).rules(self.target)
        self.twin = self.lowered(lambda: self.captured.graph, "float")

    def lowered(self, make: Callable[[], GraphModule], name: str) -> targets.Session:
        target = targets.find(self.target)
        path = self.folder / f"{self.captured.name}-{name}{target.suffix}".replace(" ", "-")
        inputs = tuple(InputSpec(i.name, (1, *i.sample_shape), i.dtype, False) for i in self.captured.inputs)
        if not path.exists():
            job = targets.Job(self.captured.name, make(), inputs, self.captured.outputs, self.rules, "float32")
            target.lower(job, path)
        return target.open(path)


def device_name() -> str:
    from ptq_cases import CASES

    return device(CASES[0])


def main() -> None:
    """Measure what was asked for, print and write the page."""
    import torch

    torch.set_num_threads(1)
    options = _options()
    parts: dict[str, Callable[[argparse.Namespace, Path], Iterator[Row]]] = {
        "pareto": pareto,
        "speed": speed,
        "text": text,
    }
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="tokens-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.parts or parts:
            for row in parts[name](options, folder):
                rows.setdefault(name, []).append(row)
                print(_line(row), flush=True)
    if "pareto" in rows:
        plot(rows["pareto"], options.out.with_name("tokens_pareto.png"))
    options.out.write_text(page(rows, options))


def opened(model: str, folder: Path, options: argparse.Namespace) -> tuple[Captured, CalibrationSet, CalibrationSet]:
    """The model captured, its calibration and its evaluation samples."""
    calibration, evaluation = prepare(model.replace("_small", ""), folder, options)
    with np.load(calibration) as arrays:
        examples = {name: array[:2] for name, array in arrays.items()}
    captured = capture(f"models:{model}", examples=examples, work=folder, search_path=HERE)
    keywords = {"python": None, "work": folder, "preprocessing": None}
    data = open_data(str(calibration), captured.inputs, **keywords)
    return captured, data, open_data(str(evaluation), captured.inputs, **keywords)


def as_published(name: str, pruner: Pruner, share: float) -> Schedule | None:
    """The schedule of a method's own paper for a mean share of tokens."""
    if name.startswith("ToMe"):
        found = [(abs(s.share - share), s) for r in range(1, pruner.tokens) if (s := constant(pruner, r)) is not None]
        return min(found, key=lambda f: f[0])[1] if found else None
    places = tuple(dict.fromkeys(int(p * pruner.blocks) for p in PLAIN_EVIT))
    return geometric(pruner.blocks, pruner.tokens, places, share, pruner.protected)


def constant(pruner: Pruner, gone: int) -> Schedule | None:
    """`gone` tokens fewer in every block; None where a block has too few."""
    cuts, now = [], pruner.tokens
    for block in range(pruner.blocks):
        if gone > (now - pruner.protected) // 2:
            return None
        now -= gone
        cuts.append((block, now))
    return Schedule(pruner.blocks, pruner.tokens, tuple(cuts))


def pareto(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Every method and share on the zoo's ViT, in each runtime."""
    captured, data, held = opened("vit", folder, options)
    judge = Judge(captured, data.select(np.arange(128)))
    for target in options.targets:
        bench = Bench(captured, target, folder)
        made: list[tuple[str, float, Schedule, targets.Session]] = []
        for label, (method, chosen) in METHODS.items():
            pruner = Pruner(captured, judge, recipes.Tokens(method, 0.7, chosen), data)
            for share in SHARES:
                if "published" in label:
                    schedule = as_published(label, pruner, share)
                else:
                    schedule = schedules.choose(pruner, share, lambda *_: None)[0].schedule
                if schedule is not None:
                    graph = partial(pruner.graph, schedule, bench.rules.token_form)
                    made.append((label, share, schedule, bench.lowered(graph, f"{label}-{share}")))
        yield from _judged(f"ViT, {target}", bench, made, held)


def _judged(
    case: str, bench: Bench, made: list[tuple[str, float, Schedule, targets.Session]], held: CalibrationSet
) -> Iterator[Row]:
    captured = bench.captured
    sample = next(iter(held.batches(1)))
    ratios = cpu_ratios(bench.twin.bind(sample), [session.bind(sample) for *_, session in made])
    reference = float_runner(captured)
    drifts: list[Drift] = []
    for batch, _ in evaluation_batches(captured, held, 1):
        wanted = reference(batch)
        for index, (*_, session) in enumerate(made):
            if len(drifts) <= index:
                drifts.append(Drift(classifies(wanted, None)))
            drifts[index].add(wanted, session_runner(session, 1)(batch))
    for (label, _, schedule, _), ratio, drift in zip(made, ratios, drifts, strict=True):
        quality = drift.top1_agreement if drift.top1_agreement is not None else drift.cosine
        yield Row(case, label, _cuts(schedule), schedule.share, quality, ratio)


def speed(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """DeiT shapes at 40 % fewer multiply-accumulates, float and int8."""
    for model in ("deit", "deit_small"):
        captured, data, held = opened(model, folder, options)
        judge = Judge(captured, data.select(np.arange(4)))
        for target in options.targets:
            bench = Bench(captured, target, folder)
            profile = load(device_name())
            made: list[tuple[str, Schedule, targets.Session]] = []
            int8 = partial(quantized, data=data, profile=profile, target=target)
            whole = Schedule(12, 197)
            made.append(("int8-dynamic", whole, bench.lowered(lambda: int8(captured), f"{model}-int8")))  # noqa: B023
            for method in SPEED:
                pruner = Pruner(captured, judge, recipes.Tokens(method), data)
                schedule = fewer(pruner, 192 if model == "deit" else 384)
                cut = partial(pruner.graph, schedule, bench.rules.token_form)
                both = lambda: int8(replace(captured, graph=cut()))  # noqa: B023, E731
                made.append((method, schedule, bench.lowered(cut, f"{model}-{method}")))
                made.append((f"{method}+int8-dynamic", schedule, bench.lowered(both, f"{model}-{method}-int8")))
            sample = next(iter(held.batches(1)))
            ratios = cpu_ratios(bench.twin.bind(sample), [s.bind(sample) for *_, s in made])
            name = "DeiT-tiny" if model == "deit" else "DeiT-small"
            for (how, schedule, _), ratio in zip(made, ratios, strict=True):
                yield Row(f"{name}, {target}", how, _cuts(schedule), schedule.share, None, ratio)


def quantized(captured: Captured, data: CalibrationSet, profile: DeviceProfile, target: str) -> GraphModule:
    """The model with int8 weights and activations quantized at run time."""
    return Builder(captured, data).build(decide(captured.graph, profile, target, "int8-dynamic")).graph


def fewer(pruner: Pruner, width: int) -> Schedule:
    """Three cuts at a quarter, half and three quarters of the depth, to FEWER of the blocks' multiply-accumulates."""
    found = (
        geometric(pruner.blocks, pruner.tokens, THIRDS, percent / 100, pruner.protected, pruner.halves)
        for percent in range(95, 40, -1)
    )
    whole = work(Schedule(pruner.blocks, pruner.tokens), width)
    return min((s for s in found if s), key=lambda s: abs(work(s, width) / whole - FEWER))


def work(schedule: Schedule, width: int) -> float:
    """Multiply-accumulates of the blocks: 4 n C² + 2 n² C of an attention, 8 n C² of an MLP of four times the width."""
    total = 0.0
    for entering, leaving in zip(schedule.entering, schedule.leaving, strict=True):
        total += 4 * entering * width**2 + 2 * entering**2 * width + 8 * leaving * width**2
    return total


def text(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """MiniLM with 30 % fewer tokens on padded sentences: mean cosine and time."""
    captured, data, held = opened("minilm", folder, options)
    judge = Judge(captured, data)
    for target in options.targets:
        bench = Bench(captured, target, folder)
        made = []
        for method in ("importance", "random", "even"):
            pruner = Pruner(captured, judge, recipes.Tokens(method), data)
            for share in (0.7, 0.5):
                schedule = schedules.choose(pruner, share, lambda *_: None)[0].schedule
                graph = partial(pruner.graph, schedule, bench.rules.token_form)
                made.append((method, share, schedule, bench.lowered(graph, f"{method}-{share}")))
        yield from _judged(f"MiniLM, {target}", bench, made, held)


def _cuts(schedule: Schedule) -> str:
    if not schedule.cuts:
        return "none"
    counts = "→".join(str(n) for n in (schedule.tokens, *(k for _, k in schedule.cuts)))
    blocks = "all" if len(schedule.cuts) == schedule.blocks else ", ".join(str(b + 1) for b, _ in schedule.cuts)
    return f"{counts} behind {blocks}"


def _line(row: Row) -> str:
    quality = "" if row.quality is None else f"{row.quality:.4f}"
    ratio = "" if row.ratio is None else f"{1 / row.ratio:.2f}x"
    return f"| {row.case} | {row.how} | {row.cuts} | {row.share:.2f} | {quality} | {ratio} |"


def multiplied(rows: list[Row]) -> Iterator[str]:
    """For each case: the speed-up of both beside the product of the two alone."""
    found = {(r.case, r.how): 1 / r.ratio for r in rows if r.ratio}
    for (case, how), value in found.items():
        name, plus, other = how.partition("+")
        if plus and (case, name) in found and (case, other) in found:
            product = found[case, name] * found[case, other]
            yield f"- {case}, {how}: {value:.2f}x, {100 * value / product:.0f} % of the product {product:.2f}x"


def plot(rows: list[Row], path: Path) -> None:
    """Agreement against time over float's, one panel per runtime, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(r.case for r in rows))
    figure, panels = plt.subplots(1, len(cases), figsize=(6.4 * len(cases), 4.6), squeeze=False, sharey=True)
    for panel, case in zip(panels[0], cases, strict=True):
        for how in dict.fromkeys(r.how for r in rows):
            mine = sorted((r.ratio or 0, 100 * (r.quality or 0)) for r in rows if (r.case, r.how) == (case, how))
            style = "--" if how in ("random", "even") else ":" if "published" in how else "-"
            panel.plot([x for x, _ in mine], [y for _, y in mine], style, marker="o", markersize=4, label=how)
        panel.set_title(case)
        panel.set_xlabel("CPU time over float's, batch 1, one thread")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("same top-1 as float, %")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def page(rows: dict[str, list[Row]], options: argparse.Namespace) -> str:
    """The page in Markdown."""
    where = f"{datetime.date.today().isoformat()}, {cpu_name()}, {system()}; "
    where += ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["# Results of `tokens.py`", "", where, ""]
    heads = {
        "pareto": "The zoo's ViT: share of the test images with float's answer, and speed against the float artifact",
        "speed": "DeiT shapes at 40 % fewer multiply-accumulates, random weights: speed alone",
        "text": f"MiniLM, {options.sentences} padded sentences of 64 tokens: mean cosine with float",
    }
    for name, found in rows.items():
        lines += [f"## {heads[name]}", "", "| case | how | tokens | mean share | quality | speed-up |"]
        lines += ["|---|---|---|---:|---:|---:|", *(_line(r) for r in found), ""]
        if name == "speed":
            lines += ["Both gains together:", "", *multiplied(found), ""]
        if name == "pareto":
            lines += ["![agreement against time](tokens_pareto.png)", ""]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["pareto", "speed", "text"], help="all, if none is named")
    parser.add_argument("--targets", nargs="+", default=["onnx", "tflite"], help="(onnx tflite)")
    parser.add_argument("--images", type=int, default=2000, help="test images (%(default)s)")
    parser.add_argument("--sentences", type=int, default=500, help="test sentences (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and artifacts there")
    parser.add_argument("--out", type=Path, default=HERE / "tokens_results.md", help="(tokens_results.md beside this)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
