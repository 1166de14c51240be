"""`.pt2`: a program that torch.export wrote, read without running anything in it."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram

from calibrate.graph import run
from calibrate.samples import Batch, InputSpec
from convert.capture_archive import load_program
from convert.capture_program import functional, input_specs, quiet, unlift
from convert.capture_raw import Raw, Reference, fed, random_batch
from convert.errors import TightfitError

MOST_SAMPLES = 8
RANDOM_SAMPLES = 3


def capture_pt2(path: Path, *, inputs: Sequence[InputSpec], examples: Batch | None, work: Path) -> Raw:
    """Load, fix every dynamic axis but the batch, and let the program itself answer a few samples."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pt2-", dir=work) as folder:
        program, names = load_program(path, Path(folder))
    _refuse_half(program, path)
    specs = resolved(_named(input_specs(unlift(program)), names.inputs), inputs, examples, str(path))
    batch = samples(specs, examples, str(path))
    count = len(next(iter(batch.values())))
    original = unlift(program)
    if any(-1 in s.shape for s in input_specs(original)):
        program = with_fixed_axes(program, specs, batch, path)
    references = [_answered(original, specs, b, path) for b in batches(specs, batch)]
    return Raw(
        graph=unlift(functional(program)),
        inputs=specs,
        outputs=names.outputs,
        references=tuple(references),
        against="the exported program itself",
        samples=count,
        synthetic=examples is None,
        notes=tuple(_fixed_batch_note(specs)),
    )


def _named(specs: Sequence[InputSpec], names: Sequence[str]) -> tuple[InputSpec, ...]:
    """The inputs under the names of forward's parameters; torch's own are those, with a number where it must."""
    if len(names) != len(specs):
        return tuple(specs)
    return tuple(replace(s, name=n) for s, n in zip(specs, names, strict=True))


def _fixed_batch_note(specs: Sequence[InputSpec]) -> list[str]:
    if all(s.dynamic_batch for s in specs):
        return []
    return [f"the batch is fixed at {specs[0].shape[0]}: the program was exported that way"]


def _refuse_half(program: ExportedProgram, path: Path) -> None:
    half = [n for n, t in program.state_dict.items() if t.is_floating_point() and t.dtype != torch.float32]
    if half:
        dtype = str(program.state_dict[half[0]].dtype).removeprefix("torch.")
        raise TightfitError(
            f"'{half[0]}' in {path} is {dtype}; capture starts from float32 and lowers precision itself. Export "
            "model.float() instead."
        )


def resolved(
    found: Sequence[InputSpec], asked: Sequence[InputSpec], examples: Batch | None, source: str
) -> tuple[InputSpec, ...]:
    """The model's own inputs, every dynamic axis but the batch fixed by --input or else by the examples.

    Raises TightfitError where the two contradict the model, or leave an axis open.
    """
    by_name = {s.name: s for s in asked}
    unknown = [n for n in by_name if n not in {s.name for s in found}]
    if unknown:
        names = ", ".join(f"'{s.name}'" for s in found)
        raise TightfitError(f"--input names '{unknown[0]}', but the inputs of {source} are {names}.")
    return tuple(_resolved(s, by_name.get(s.name), examples, len(found) == 1, source) for s in found)


def _resolved(spec: InputSpec, asked: InputSpec | None, examples: Batch | None, alone: bool, source: str) -> InputSpec:
    wanted = None if asked is None else asked.sample_shape
    if wanted is None and examples is not None and -1 in spec.shape:
        array = examples.get(spec.name, examples.get("") if alone else None)
        wanted = None if array is None else array.shape[1:]
    if wanted is None:
        wanted = spec.sample_shape
    if -1 in wanted:
        shape = "x".join("N" if d == -1 else str(d) for d in spec.shape)
        raise TightfitError(
            f"the input '{spec.name}' of {source} has axes of any length ({shape}): fix them with "
            f"--input {spec.name}:{spec.dtype}:{shape} (numbers for N), or give calibration data of the right shape."
        )
    fits = len(wanted) == len(spec.sample_shape) and all(
        s in (-1, w) for s, w in zip(spec.sample_shape, wanted, strict=True)
    )
    if not fits or (asked is not None and asked.dtype != spec.dtype):
        given = spec.dtype if asked is None else asked.dtype
        raise TightfitError(
            f"the input '{spec.name}' of {source} is {spec.dtype} {list(spec.sample_shape)} per sample (-1: any), not "
            f"{given} {list(wanted)}."
        )
    return replace(spec, shape=(spec.shape[0], *wanted))


def samples(specs: Sequence[InputSpec], examples: Batch | None, source: str) -> Batch:
    """At most MOST_SAMPLES real samples; random ones where there are none."""
    fixed = not all(s.dynamic_batch for s in specs)
    if examples is None:
        return random_batch(specs, specs[0].shape[0] if fixed else RANDOM_SAMPLES)
    most = max(MOST_SAMPLES, specs[0].shape[0]) if fixed else MOST_SAMPLES
    return fed(specs, {n: a[:most] for n, a in examples.items()}, "the data")


def batches(specs: Sequence[InputSpec], batch: Batch) -> list[Batch]:
    """A dynamic batch is tried at 1 and at all samples; a fixed one in slices, the last filled up with the first."""
    count = len(next(iter(batch.values())))
    if all(s.dynamic_batch for s in specs):
        return [{n: a[:1] for n, a in batch.items()}, *([batch] if count > 1 else [])]
    size = specs[0].shape[0]
    starts = range(0, count, size)
    return [{n: a[[(i + k) % count for k in range(size)]] for n, a in batch.items()} for i in starts]


def with_fixed_axes(program: ExportedProgram, specs: Sequence[InputSpec], batch: Batch, path: Path) -> ExportedProgram:
    """Export the program again with every axis fixed but the batch."""
    two = {n: a if len(a) > 1 else a.repeat(2, 0) for n, a in batch.items()}
    dynamic = all(s.dynamic_batch for s in specs)
    axis = torch.export.Dim("batch")
    arguments = tuple(torch.from_numpy(two[s.name]) for s in specs)
    shapes = tuple({0: axis} for _ in specs) if dynamic else None
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(unlift(program), arguments, dynamic_shapes=shapes)
    except Exception as error:  # whatever torch says is about this program
        reason = str(error).strip().splitlines()[0]
        raise TightfitError(
            f"{path} can't be fixed to the shapes {[list(s.shape) for s in specs]}: {reason}. "
            "Export it with these shapes."
        ) from error


def _answered(graph: torch.fx.GraphModule, specs: Sequence[InputSpec], batch: Batch, path: Path) -> Reference:
    try:
        # in-place operators of the program must not write into the samples
        values = run(graph, [torch.from_numpy(batch[s.name].copy()) for s in specs])
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{s.name} {s.dtype} {list(batch[s.name].shape)}" for s in specs)
        raise TightfitError(f"{path} does not run on {shapes}: {str(error).strip().splitlines()[0]}") from error
    return Reference(batch, tuple(v.detach().numpy() for v in values))
