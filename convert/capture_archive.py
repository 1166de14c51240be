"""Read a `.pt2` from anybody: no byte of it is unpickled or evaluated.

`torch.export.load` unpickles whatever the archive asks it to, evaluates symbolic shapes through sympy's parser,
compiles guards as Python, resolves operators by attribute access on torch, and imports the modules that pytree specs
name. So the archive is rewritten first: raw tensors are copied, the program's JSON is copied without guards, metadata
and pytree specs, every operator and every expression in it is checked against what a model may hold, and everything
else stays behind. What torch then loads is the copy.
"""

import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from convert.capture_program import quiet
from convert.errors import TightfitError

ROOT = "model"
RAW_TENSOR = re.compile(r"(weight|tensor)_\d+")
# A shape is integers, symbols and the functions of torch.utils._sympy: no attributes, brackets, dunders, and quotes
# only around the names of symbols and the digits of floats, as sympy's srepr writes them.
QUOTED = re.compile(r"(Symbol|Float)\('(?:[suz]f?\d+|[-+]?\d[\d.]*(?:[eE][-+]?\d+)?)'")
EXPRESSION = re.compile(r"(?:[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*|\d+(?:\.\d+)?|[-+*/%(), <>=!&|~])*")
WORD = re.compile(
    "FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|Max|Min|Eq|Ne|Lt|Le|Gt|Ge"
    "|And|Or|Not|Abs|floor|ceiling|sqrt|oo|true|false|True|False|Symbol|Integer|Float|Rational|Half|One|Zero|NegativeOne"
    "|Add|Mul|Pow|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|positive|negative|nonnegative"
    r"|integer|real|finite|zero|precision|[suz]f?\d+"
)
SCALAR_OPERATOR = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_(int|float|max|min|not|ite|sum|sqrt|cos|sin)"
)
NESTED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "map_impl", "scan")
NAMESPACES = ("aten", "quantized_decomposed", "prims", "torchvision")
AGAIN = "Save it again with torch.export.save(torch.export.export(model.eval(), example_inputs), 'model.pt2')."


@dataclass(frozen=True)
class Names:
    """What the exported function calls its inputs (empty where torch does not say) and its outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def load_program(path: Path, work: Path) -> tuple[ExportedProgram, Names]:
    """The program in a .pt2 and its names. Writes a temporary copy to `work`.

    Raises TightfitError for a file that is missing, damaged, no export archive, or that asks for code to be run.
    """
    names = _names(path)
    work.mkdir(parents=True, exist_ok=True)
    copy = work / "checked.pt2"
    try:
        with zipfile.ZipFile(path) as archive:
            if "serialized_exported_program.json" in names:
                called = _copy_legacy(archive, copy, path)
            else:
                called = _copy(archive, names, copy, path)
        with quiet():
            return torch.export.load(copy), called
    except (zipfile.BadZipFile, EOFError) as error:
        raise TightfitError(f"{path} is damaged ({error}). {AGAIN}") from error
    except TightfitError:
        raise
    except Exception as error:  # torch's deserialiser has no error of its own; whatever it says is about this file
        raise TightfitError(
            f"{path} can't be read by torch {torch.__version__}: {_first_line(error)}. {AGAIN}"
        ) from error
    finally:
        copy.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _names(path: Path) -> list[str]:
    """The members of the archive. Raises TightfitError when `path` is none that torch.export.save writes."""
    if not path.is_file():
        raise TightfitError(f"there is no file {path}; check the path of the model.")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise TightfitError(_pickle(path))
    if not zipfile.is_zipfile(path):
        what = (
            "is truncated: its table of contents at the end is missing" if start == b"PK\3\4" else "is no .pt2 archive"
        )
        raise TightfitError(f"{path} {what}. {AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise TightfitError(f"{path} is damaged ({error}). {AGAIN}") from error
    if any(n.endswith("/data.pkl") for n in names):
        raise TightfitError(_pickle(path))
    if len(set(names)) != len(names):
        raise TightfitError(f"{path} holds two members of one name and is refused. {AGAIN}")
    if "serialized_exported_program.json" not in names and not any("/models/" in n for n in names):
        compiled = any("/aotinductor/" in n for n in names)
        what = "holds compiled code (AOTInductor), not a graph" if compiled else "holds no exported program"
        raise TightfitError(f"{path} {what}. {AGAIN}")
    return names


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle (torch.save of a whole module, TorchScript or weights): loading one can run any code, so "
        f"it was refused and nothing in it was run. {AGAIN} For plain weights, give the function that builds the "
        "model: MODULE:FUNCTION --weights FILE."
    )


def _copy(archive: zipfile.ZipFile, names: list[str], copy: Path, path: Path) -> Names:
    root = names[0].split("/")[0]
    program, called = _checked_program(_json(archive, _only(names, root, path)), path)
    stem = _only(names, root, path).rsplit("/", 1)[1].removesuffix(".json")
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as out:
        for name, text in (("archive_format", "pt2"), ("archive_version", "0"), ("byteorder", "little")):
            out.writestr(f"{ROOT}/{name}", text)
        out.writestr(f"{ROOT}/.data/version", "3\n")
        out.writestr(f"{ROOT}/models/model.json", json.dumps(program))
        out.writestr(f"{ROOT}/data/sample_inputs/model.pt", b"")
        for kind in ("weights", "constants"):
            config = _json(archive, f"{root}/data/{kind}/{stem}_{kind}_config.json")
            _refuse_pickled(config, path)
            out.writestr(f"{ROOT}/data/{kind}/model_{kind}_config.json", json.dumps(_on_cpu(config)))
            for member in sorted({entry["path_name"] for entry in config["config"].values()}):
                out.writestr(f"{ROOT}/data/{kind}/{member}", archive.read(f"{root}/data/{kind}/{member}"))
    return called


def _only(names: list[str], root: str, path: Path) -> str:
    found = [n for n in names if n.startswith(f"{root}/models/") and n.endswith(".json")]
    if len(found) != 1:
        raise TightfitError(f"{path} holds {len(found)} programs; save one alone. {AGAIN}")
    return found[0]


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    return json.loads(archive.read(name))


def _refuse_pickled(config: dict[str, Any], path: Path) -> None:
    for name, entry in config["config"].items():
        if entry["use_pickle"] or not RAW_TENSOR.fullmatch(entry["path_name"]):
            raise TightfitError(
                f"{path} is refused: it stores '{name}' as a pickle, which could run code when read; nothing in it was "
                "run. Export a module whose weights and constants are plain tensors."
            )


def _copy_legacy(archive: zipfile.ZipFile, copy: Path, path: Path) -> Names:
    """The layout of torch 2.6 and 2.7: tensors in state dicts, which hold only what weights_only accepts."""
    program, called = _checked_program(_json(archive, "serialized_exported_program.json"), path)
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as out:
        out.writestr("version", archive.read("version"))
        out.writestr("serialized_exported_program.json", json.dumps(program))
        out.writestr("serialized_example_inputs.pt", b"")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt"):
            buffer = io.BytesIO()
            torch.save(_tensors(archive.read(name), path), buffer)
            out.writestr(name, buffer.getvalue())
    return called


def _tensors(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if data else {}
    except Exception as error:
        raise TightfitError(
            f"{path} is refused: its constants are more than plain tensors, and reading them could run code; nothing "
            "in it was run. Export a module whose weights and constants are plain tensors."
        ) from error
    return {str(k): v for k, v in state.items()}


def _checked_program(program: Any, path: Path) -> tuple[dict[str, Any], Names]:
    """The program's JSON without anything that would be evaluated, and the names in it."""
    signature = program["graph_module"]["signature"]
    call = program["graph_module"]["module_call_graph"][0]["signature"]
    returned = [s["user_output"]["arg"] for s in signature["output_specs"] if "user_output" in s]
    outputs = list(_output_names(json.loads(call["out_spec"])[1], "")) if call else []
    if len(outputs) != len(returned):
        outputs = [f"output_{i}" if i else "output" for i in range(len(returned))]
    named = tuple(n for n, arg in zip(outputs, returned, strict=True) if "as_tensor" in arg)
    count = sum("user_input" in s or "constant_input" in s for s in signature["input_specs"])
    given = tuple(call.get("forward_arg_names") or ()) if call else ()
    checked: dict[str, Any] = _checked(_on_cpu(program), path)
    checked["guards_code"] = []
    for entry in checked["graph_module"]["module_call_graph"]:
        entry["signature"] = None if entry["fqn"] else entry["signature"]
    root = checked["graph_module"]["module_call_graph"][0]["signature"]
    if root is not None:
        root["in_spec"] = pytree.treespec_dumps(pytree.tree_structure((tuple(range(count)), {})))
        root["out_spec"] = pytree.treespec_dumps(pytree.tree_structure(tuple(range(len(returned)))))
        root["forward_arg_names"] = None
    for symbol in checked["range_constraints"]:
        _check_expression(symbol, path)
    return checked, Names(given if len(given) == count else (), named)


def _output_names(spec: dict[str, Any], name: str) -> list[str]:
    """Names of the leaves of a serialised pytree: keys of dicts, positions of tuples, "output" for a tensor alone."""
    children = spec["children_spec"]
    if spec["type"] is None:
        return [name or "output"]
    try:
        keys = json.loads(spec["context"]) if isinstance(spec["context"], str) else None
    except json.JSONDecodeError:
        keys = None
    if isinstance(keys, list) and len(keys) == len(children) and all(isinstance(k, str) for k in keys):
        labels = [f"{name}_{k}" if name else k for k in keys]
    else:
        labels = [(name or "output") + (f"_{i}" if i else "") for i in range(len(children))]
    return [leaf for label, child in zip(labels, children, strict=True) for leaf in _output_names(child, label)]


def _on_cpu(value: Any) -> Any:
    """The same JSON with every device replaced by the processor."""
    if isinstance(value, dict):
        if set(value) == {"type", "index"}:
            return {"type": "cpu", "index": None}
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value


def _checked(value: Any, path: Path) -> Any:
    """The same JSON; raises TightfitError for an operator or an expression that no model needs."""
    if isinstance(value, list):
        return [_checked(v, path) for v in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("target"), str) and "outputs" in value:
        _check_operator(value["target"], path)
    if isinstance(value.get("as_operator"), str):
        _check_operator(value["as_operator"], path)
    if isinstance(value.get("expr_str"), str):
        _check_expression(value["expr_str"], path)
    if "custom_obj" in value or "as_custom_obj" in value:
        raise TightfitError(f"{path} is refused: it holds a custom object, which could run code when read. {AGAIN}")
    result = {k: _checked(v, path) for k, v in value.items()}
    if isinstance(value.get("metadata"), dict):
        result["metadata"] = {k: v for k, v in value["metadata"].items() if k == "nn_module_stack"}
    return result


def _check_operator(target: str, path: Path) -> None:
    if SCALAR_OPERATOR.fullmatch(target):
        return
    parts = target.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"] and len(parts) == 4 and parts[3] in NESTED:
        return
    if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
        if isinstance(getattr(packet, parts[4], None), torch._ops.OpOverload):
            return
    raise TightfitError(
        f"{path} calls '{target}', which is no operator of torch {torch.__version__}: custom operators can't be "
        "lowered, and anything else is refused. Export a module made of torch operators."
    )


def _check_expression(text: str, path: Path) -> None:
    plain = QUOTED.sub(r"\1(0", text)
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_]*", plain)
    known = all(WORD.fullmatch(w) for w in words)
    if len(text) > 2000 or not EXPRESSION.fullmatch(plain) or not known:
        raise TightfitError(f"{path} is refused: '{text[:80]}' is no shape that torch.export writes. {AGAIN}")
