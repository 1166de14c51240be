"""Runs a user's `module:function`, exports the module it returns, and writes down what it computes. Stand-alone.

    python capture_child.py JOB.json

Run in a child interpreter (maybe the user's own, with torch 2.6 or newer), so it imports nothing of ours, and it is one
file, because modules beside it could shadow the user's. The job is
{"model", "weights", "examples", "inputs", "threads", "out"}; `out` is an existing folder that receives

    program.pt2                   the module, as torch.export sees it
    inputs_N.npz, outputs_N.npz   samples and what the module itself answers, one pair per batch size N
    result.json                   names, notes; or {"error": {"kind", "message"}} when the user's side is at fault
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 8
DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
BRANCH_ADVICE = (
    "The result depends on the values of a tensor, which a fixed graph cannot follow: compute both sides and choose "
    "with torch.where, or write the branch with torch.cond."
)
LINE_ADVICE = (
    "Rewrite that line with tensor operations only (no .numpy(), .item(), .tolist() or Python loops over values of a "
    "tensor), or take that part out of the module that is captured."
)


class Refused(Exception):
    """The user's side is at fault; `kind` is "model" or "environment"."""

    def __init__(self, message: str, kind: str = "model") -> None:
        super().__init__(message)
        self.kind = kind


# --- finding the user's module ----------------------------------------------------------------------------------


def build(reference: str) -> tuple[torch.nn.Module, Any]:
    """The module that `module:function` gives, and its example inputs (None when it gives none)."""
    import torch

    found = find(reference)
    made = found if isinstance(found, torch.nn.Module) else called(found, reference)
    examples = None
    if isinstance(made, tuple) and len(made) == 2:
        made, examples = made
    if not isinstance(made, torch.nn.Module):
        kind = type(made).__name__
        raise Refused(f"{reference} returned {kind}; it must return a torch.nn.Module, or (module, example inputs).")
    return made, examples


def find(reference: str) -> Any:
    """The object behind `module:function`, with the nearest name when there is none."""
    module_name, _, function_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            raise Refused(
                f"there is no module '{module_name}' (looked in {os.getcwd()}, PYTHONPATH and the packages of "
                f"{sys.executable}). Run from its folder, or put that folder on PYTHONPATH."
            ) from error
        raise Refused(
            f"importing '{module_name}' failed: {sys.executable} has no package '{error.name}'{where(error)}. Install "
            "it there, or name the interpreter that has it with --python.",
            "environment",
        ) from error
    except Exception as error:
        raise Refused(f"importing '{module_name}' failed with {told(error)}") from error
    if not hasattr(module, function_name):
        raise Refused(f"'{module_name}' ({module.__file__}) has no '{function_name}'{nearest(module, function_name)}")
    return getattr(module, function_name)


def nearest(module: Any, name: str) -> str:
    """The functions of the module that are most like `name`, as the rest of a sentence."""
    own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    close = difflib.get_close_matches(name, own, 1)
    return f"; did you mean '{close[0]}'?" if close else f"; its functions are {', '.join(sorted(own)) or 'none'}."


def called(function: Any, reference: str) -> Any:
    """What the user's function returns; its own error, with its line, when it raises."""
    try:
        return function()
    except SystemExit as error:
        raise Refused(
            f"{reference} ended the interpreter: it called sys.exit({error.code!r}). Let it return the model."
        ) from error
    except Exception as error:
        raise Refused(f"{reference} raised {told(error)}") from error


def load_weights(model: torch.nn.Module, path: str) -> None:
    """Load safetensors or a plain state dict into the model; nothing but tensors is ever unpickled."""
    state = read_weights(path)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        prefix = " (the file's names start with 'module.': it was saved from DataParallel; strip that prefix)"
        hint = prefix if extra and all(k.startswith("module.") for k in extra) else ""
        raise Refused(
            f"the weights in {path} are not this model's: missing {listed(missing)}; unexpected {listed(extra)}{hint}."
        )
    wrong = [k for k in own if tuple(own[k].shape) != tuple(state[k].shape)]
    if wrong:
        was, wanted = list(state[wrong[0]].shape), list(own[wrong[0]].shape)
        raise Refused(f"the weights in {path} are not this model's: '{wrong[0]}' is {was}, the model wants {wanted}.")
    model.load_state_dict(state)


def read_weights(path: str) -> dict[str, Any]:
    """{name: tensor} of a .safetensors or a state dict."""
    import torch

    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise Refused(
                f"reading {path} needs safetensors in {sys.executable}: {sys.executable} -m pip install safetensors",
                "environment",
            ) from error
        try:
            return dict(load_file(path))
        except Exception as error:
            raise Refused(f"{path} is not a readable safetensors file ({error}); save it again.") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(
            f"{path} is refused: it is damaged or holds more than plain weights, and reading more than weights could "
            f"run code ({unpickling_reason(error)}). Nothing in it was run. Save the weights alone: "
            "torch.save(model.state_dict(), ...) or safetensors."
        ) from error
    if isinstance(state, Mapping) and set(state) == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise Refused(f"{path} holds no plain state dict (names and tensors only); save model.state_dict() alone.")
    return dict(state)


def unpickling_reason(error: Exception) -> str:
    """What torch found in the file, without its advice on reading it unsafely."""
    text = str(error).strip() or type(error).__name__
    found = text.partition("WeightsUnpickler error:")[2].strip() or text
    return found.splitlines()[0].split(". ")[0][:200]


def listed(names: list[str], most: int = 4) -> str:
    """The first names in quotes, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{n}'" for n in names[:most]) + more


# --- its inputs -------------------------------------------------------------------------------------------------


def parameters_of(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names of forward's parameters, and of those that have no default."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in plain], [p.name for p in plain if p.default is p.empty]


def samples_of(job: dict[str, Any], model: torch.nn.Module, examples: Any) -> tuple[dict[str, torch.Tensor], bool, str]:
    """({input name: tensor [n, ...]}, whether they are random numbers, whence): the first that there is of
    calibration data, the specs of --input, and what the function returned."""
    names, required = parameters_of(model)
    if job["examples"]:
        batch, synthetic, source = from_data(job, names, required), False, "the data"
    elif job["inputs"]:
        batch, synthetic, source = {i["name"]: random_input(i) for i in job["inputs"]}, True, "--input"
    elif examples is not None:
        batch, synthetic, source = from_function(examples, names), False, "the function"
    else:
        wanted = ", ".join(f"'{n}'" for n in required) or "the input"
        raise Refused(
            f"the shape of {wanted} is unknown: give data with --calibration (`convert`), name it with "
            f"--input NAME:DTYPE:SHAPE (as in --input {(required or ['x'])[0]}:float32:1x3x224x224), or let the "
            "function return (module, example inputs)."
        )
    absent = [n for n in required if n not in batch]
    unknown = [n for n in batch if n not in names]
    # One input, or inputs that --input lists in order, may have names of their own.
    if len(unknown) == len(batch) == max(1, len(required)) and (len(batch) == 1 or job["inputs"]):
        return batch, synthetic, source
    if absent or (unknown and names):
        raise Refused(
            f"{source} gives {listed(list(batch))}, but forward takes {listed(names)}: "
            + (f"'{absent[0]}' is missing." if absent else f"'{unknown[0]}' is no parameter of it.")
        )
    return {n: batch[n] for n in names if n in batch} or batch, synthetic, source


def from_data(job: dict[str, Any], names: list[str], required: list[str]) -> dict[str, torch.Tensor]:
    """The first samples of the calibration data; a single array without a name feeds the single input."""
    import numpy
    import torch

    with numpy.load(job["examples"], allow_pickle=False) as archive:
        arrays = {name.partition("/")[2]: archive[name][:MOST_SAMPLES] for name in archive.files}
    specs = {i["name"]: i for i in job["inputs"]}
    if list(arrays) == [""]:
        wanted = list(specs) or required or names[:1] or ["input"]
        if len(wanted) != 1:
            raise Refused(f"the data has one array without a name, but forward takes {listed(wanted)}; give a .npz.")
        arrays = {wanted[0]: arrays[""]}
    if specs:
        arrays = {n: a for n, a in arrays.items() if n in specs}
    for name, array in arrays.items():
        if name in specs and tuple(specs[name]["shape"][1:]) != array.shape[1:]:
            raise Refused(
                f"--input says that '{name}' is {list(specs[name]['shape'])}, the data has {list(array.shape)} "
                "(axis 0 counts samples); make them agree."
            )
    dtypes = {n: specs[n]["dtype"] if n in specs else float_or_same(a.dtype.name) for n, a in arrays.items()}
    return {n: torch.from_numpy(numpy.ascontiguousarray(a.astype(dtypes[n]))) for n, a in arrays.items()}


def float_or_same(dtype: str) -> str:
    """Every float is float32, which is what the captured model computes in."""
    return "float32" if dtype.startswith("float") else dtype


def random_input(spec: dict[str, Any]) -> torch.Tensor:
    """Standard-normal floats; integers and booleans 0 or 1, which every vocabulary and every mask has."""
    import numpy

    return _tensor_of(numpy.random.default_rng(0), spec)


def _tensor_of(generator: Any, spec: dict[str, Any]) -> torch.Tensor:
    import torch

    floating = spec["dtype"].startswith("float")
    values = generator.standard_normal(spec["shape"]) if floating else generator.integers(0, 2, spec["shape"])
    return torch.from_numpy(values.astype(spec["dtype"]))


def from_function(examples: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Example inputs as the function gave them: a tensor, a tuple in the order of forward, or a dict by name."""
    import torch

    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not isinstance(examples, Mapping):
        free = names or [f"input_{i}" for i in range(len(examples))]
        examples = dict(zip(free, examples))  # noqa: B905
    wrong = [n for n, v in examples.items() if not isinstance(v, torch.Tensor)]
    if wrong:
        raise Refused(f"the example input '{wrong[0]}' is {type(examples[wrong[0]]).__name__}, not a tensor.")
    return {n: v.detach().cpu() for n, v in examples.items()}


# --- running and exporting it -------------------------------------------------------------------------------------


def flatten(value: Any, name: str) -> list[tuple[str, Any]]:
    """The tensors in what a module returns, named: keys of dicts, positions of tuples; anything else is dropped."""
    import torch

    if isinstance(value, torch.Tensor):
        return [(name or "output", value)]
    if isinstance(value, Mapping):
        return [f for k, v in value.items() for f in flatten(v, f"{name}_{k}" if name else str(k))]
    if isinstance(value, (tuple, list)):
        parts = [v for v in value if v is not None]
        stem = name or "output"
        return [f for i, v in enumerate(parts) for f in flatten(v, stem if i == 0 else f"{stem}_{i}")]
    return []


def call(model: torch.nn.Module, names: list[str], tensors: Iterable[torch.Tensor]) -> Any:
    """Run the model on inputs by name, or by position where the names are not those of its parameters."""
    if all(n in parameters_of(model)[0] for n in names):
        return model(**dict(zip(names, tensors)))  # noqa: B905
    return model(*tensors)


def wrapped(model: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """The model as a function of positional tensors that returns a flat tuple of tensors."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = call(self.model, names, tensors)
            return tuple(t for _, t in flatten(result, ""))

    return Flat().eval()


def described(batch: dict[str, torch.Tensor]) -> str:
    """The inputs' names, dtypes and shapes, for messages."""
    return ", ".join(f"{n} {str(t.dtype).replace('torch.', '')} {list(t.shape)}" for n, t in batch.items())


def answers(flat: torch.nn.Module, batch: dict[str, torch.Tensor], source: str) -> tuple[torch.Tensor, ...]:
    """What the module itself computes; its own error with the shapes when it raises."""
    try:
        result: tuple[torch.Tensor, ...] = flat(*batch.values())
    except Exception as error:
        raise Refused(f"the model does not run on {source} ({described(batch)}): {told(error)}") from error
    if not result:
        raise Refused("the model returns no tensor.")
    return result


def export(flat: torch.nn.Module, batch: dict[str, torch.Tensor], dynamic: bool) -> Any:
    """torch.export, axis 0 of every input one dynamic dimension or all static."""
    import torch

    shapes = None
    if dynamic:
        axis = torch.export.Dim("batch")
        shapes = {"tensors": tuple({0: axis} for _ in batch)}
    return torch.export.export(flat, tuple(batch.values()), dynamic_shapes=shapes, strict=False)


def export_any(
    flat: torch.nn.Module, samples: dict[str, torch.Tensor], notes: list[str], source: str
) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The exported program and the batches to compare it on. The batch is dynamic where the model allows it."""
    lengths = {t.shape[0] for t in samples.values()}
    single = {n: t[:1] for n, t in samples.items()}
    fixed = samples
    if len(lengths) > 1:
        reason = "the inputs differ in axis 0"
    else:
        several = samples if lengths != {1} else {n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in samples.items()}
        program, reason = dynamic_export(flat, single, several)
        if program is not None:
            return program, [single, several]
        with contextlib.suppress(Refused):
            answers(flat, single, source)
            fixed = single
    answers(flat, fixed, source)
    try:
        program = export(flat, fixed, dynamic=False)
    except Exception as error:
        raise Refused(uncapturable(error)) from error
    notes.append(f"the batch is fixed at {sizes(fixed)}: {reason}")
    return program, [fixed]


def dynamic_export(
    flat: torch.nn.Module, single: dict[str, torch.Tensor], several: dict[str, torch.Tensor]
) -> tuple[Any, str]:
    """(program, "") with a dynamic batch, or (None, why there is none)."""
    try:
        expected = [flat(*b.values()) for b in (single, several)]
    except Exception as error:
        both = f"{sizes(single)} and {sizes(several)}"
        return None, f"the model does not run on batches of {both}: {first_line(error)}{where(error)}"
    try:
        program = export(flat, several, dynamic=True)
    except Exception as error:
        if type(error).__name__ in DATA_DEPENDENT:
            raise Refused(uncapturable(error)) from error
        return None, f"torch.export does not allow another: {first_line(error)}{where(error)}"
    module = program.module()
    for batch, wanted in zip((single, several), expected):  # noqa: B905
        try:
            got = module(*batch.values())
        except Exception as error:
            return None, f"the captured graph refuses a batch of {sizes(batch)}: {first_line(error)}"
        if any(g.shape != w.shape or not close(g, w) for g, w in zip(got, wanted)):  # noqa: B905
            return None, f"the captured graph computes something else at a batch of {sizes(batch)}"
    return program, ""


def sizes(batch: dict[str, torch.Tensor]) -> int:
    """The length of axis 0."""
    return int(next(iter(batch.values())).shape[0])


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to float32 rounding; only decides between a dynamic and a fixed batch, the parent measures exactly."""
    import torch

    if not wanted.is_floating_point():
        return bool(torch.equal(got, wanted))
    finite = wanted[torch.isfinite(wanted)]
    span = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(got, wanted, rtol=0.0, atol=1e-4 * span + 1e-12, equal_nan=True))


# --- errors, in the user's words ----------------------------------------------------------------------------------


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last line of the traceback (or its causes') that is neither torch's, nor Python's, nor ours."""
    import torch

    library = os.path.dirname(os.path.abspath(torch.__file__))
    standard = os.path.dirname(os.path.abspath(os.__file__))

    def own(name: str) -> bool:
        path = os.path.abspath(name)
        in_standard = path.startswith(standard + os.sep) and "site-packages" not in path
        return (
            name[:1] != "<" and path != os.path.abspath(__file__) and not path.startswith(library) and not in_standard
        )

    current: BaseException | None = error
    while current is not None:
        frames = [f for f in traceback.extract_tb(current.__traceback__) if own(f.filename)]
        if frames:
            return frames[-1]
        current = current.__cause__ or current.__context__
    return None


def where(error: BaseException) -> str:
    """' (file, line N: source)' of the user's line, or nothing."""
    frame = user_frame(error)
    return f" ({frame.filename}, line {frame.lineno}: {frame.line})" if frame else ""


def first_line(error: BaseException) -> str:
    """The first line of the message that says something; torch's hints about its own logs say nothing."""
    for line in str(error).splitlines():
        text = line.strip().removeprefix("- ")
        if text and not text.startswith("Constraints violated"):
            return text.split(" If you're using mark_dynamic")[0][:300].rstrip(".")
    return type(error).__name__


def told(error: BaseException) -> str:
    """Type, message and the user's line."""
    return f"{type(error).__name__}: {first_line(error)}{where(error)}"


def uncapturable(error: BaseException) -> str:
    """Why torch.export can't capture the model, on which line, and what to try."""
    advice = BRANCH_ADVICE if type(error).__name__ in DATA_DEPENDENT else LINE_ADVICE
    return f"torch.export cannot capture the model{where(error)}: {first_line(error)}. {advice}"


# --- main ---------------------------------------------------------------------------------------------------------


def capture(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job and return what result.json says."""
    try:
        import torch
    except ImportError as error:
        raise Refused(
            f"{sys.executable} cannot import torch ({error}): {sys.executable} -m pip install torch", "environment"
        ) from error
    torch.set_num_threads(job["threads"])
    # The fast path of nn.TransformerEncoder zeroes padded positions; neither training nor the exported graph does.
    torch.backends.mha.set_fastpath_enabled(False)
    model, examples = build(job["model"])
    notes: list[str] = []
    if job["weights"]:
        load_weights(model, job["weights"])
    if any(m.training for m in model.modules()):
        notes.append("the module was in training mode; it was captured in evaluation mode")
    if any(p.dtype not in (torch.float32,) and p.is_floating_point() for p in model.parameters()):
        notes.append("the weights were not float32; they were captured as float32")
        model = model.float()
    model = model.cpu().eval().requires_grad_(False)
    samples, synthetic, source = samples_of(job, model, examples)
    scalar = next((n for n, t in samples.items() if t.dim() == 0), None)
    if scalar is not None:
        raise Refused(f"the input '{scalar}' has no batch axis: every input needs samples along axis 0.")
    flat = wrapped(model, list(samples))
    program, batches = export_any(flat, samples, notes, source)
    for batch in batches:
        write(job["out"], batch, answers(flat, batch, source))
    torch.export.save(program, os.path.join(job["out"], "program.pt2"))
    distinct = len(next(iter(samples.values())))
    return {
        "inputs": list(samples),
        "outputs": unique([name for name, _ in flatten(call(model, list(samples), batches[0].values()), "")]),
        "notes": notes,
        "synthetic": synthetic,
        "samples": min(distinct, sizes(batches[-1])),
        "torch": torch.__version__,
    }


def unique(names: list[str]) -> list[str]:
    """The names, a repeated one with a number behind it."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        result.append(f"{name}_{count}" if count else name)
    return result


def write(folder: str, batch: dict[str, torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
    """One pair of archives; outputs by position."""
    import numpy

    size = sizes(batch)
    numpy.savez(os.path.join(folder, f"inputs_{size}.npz"), **{f"x/{n}": t.numpy() for n, t in batch.items()})
    values = {str(i): t.detach().numpy() for i, t in enumerate(outputs)}
    numpy.savez(os.path.join(folder, f"outputs_{size}.npz"), **values)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export explains itself at length on the console; the parent's message is short."""
    import logging

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(path: str) -> None:
    """Capture, and say in result.json how it went."""
    with open(path) as file:
        job = json.load(file)
    result: dict[str, Any]
    try:
        with quiet():
            try:
                import torch
            except ImportError:
                result = capture(job)  # refuses, and says so
            else:
                with torch.no_grad():
                    result = capture(job)
    except Refused as error:
        result = {"error": {"kind": error.kind, "message": str(error)}}
    with open(os.path.join(job["out"], "result.json"), "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    # The folder of this script is none of the user's business, and its files must not shadow the user's modules.
    own_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or os.getcwd()) != own_folder]
    sys.path.insert(0, os.getcwd())
    main(sys.argv[1])
