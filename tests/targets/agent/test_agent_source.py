"""The agent's sources: what old Pythons understand, and nothing of ours beside them."""

import ast
import sys
from pathlib import Path

import pytest

import targets.agent

SOURCES = sorted(Path(targets.agent.__file__).parent.glob("*.py"))
RUNTIMES = {"numpy", "onnxruntime"}


def unfit(text: str) -> list[str]:
    """What keeps a source from running under Python 3.9, alone on a device."""
    try:
        tree = ast.parse(text, feature_version=(3, 9))
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    found = []
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    known = sys.stdlib_module_names | RUNTIMES
    found += [f"imports {name}" for name in sorted(map(str, names)) if name.partition(".")[0] not in known]
    lazy = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
    if not lazy and any(isinstance(n, ast.FunctionDef) for n in ast.walk(tree)) and " | " in text:
        found.append("evaluates annotations that 3.9 does not know")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(k.arg in ("strict", "slots", "kw_only") for k in node.keywords):
            found.append(f"line {node.lineno}: an argument that 3.9 does not know")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_source_of_the_agent_runs_under_python_3_9_on_its_own(path: Path) -> None:
    assert unfit(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "match 1:\n    case 1: pass\n",
        "from calibrate import samples\n",
        "import torch\n",
        "def f(x: int | None) -> None: ...\n",
        "zip([], [], strict=True)\n",
    ],
)
def test_what_does_not_run_there_would_be_noticed(text: str) -> None:
    assert unfit(text)
