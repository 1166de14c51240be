"""The repository keeps its own rules: sizes, docstrings, one direction of imports, light start-up, whole packages."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("convert", "calibrate", "targets", "device_profiles")
MOST_LINES = 600
HEAVY = ("torch", "onnx", "onnxruntime", "coremltools", "litert_torch", "tensorflow", "matplotlib", "jinja2", "numpy")


def sources() -> list[Path]:
    folders = (*PACKAGES, "benchmarks", "tests", "docs")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def too_long(paths: list[Path]) -> list[str]:
    return [str(p) for p in paths if len(p.read_text(encoding="utf-8").splitlines()) > MOST_LINES]


def undocumented(paths: list[Path]) -> list[str]:
    return [str(p) for p in paths if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]


def test_no_file_is_longer_than_a_reader_bears() -> None:
    assert too_long(sources()) == []


def test_every_module_of_ours_says_what_it_is_for() -> None:
    assert undocumented([p for p in sources() if p.relative_to(ROOT).parts[0] in PACKAGES]) == []


def test_files_that_break_the_rules_would_be_noticed(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * (MOST_LINES + 1))
    assert too_long([path]) == undocumented([path]) == [str(path)]


def test_imports_point_one_way() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed: the import contract was not checked")
    # `lint-imports` finds its configuration in the working directory.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_the_command_line_starts_without_heavy_libraries() -> None:
    program = f"import sys, convert.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_file_a_package_needs_is_shipped_with_it() -> None:
    """Of the files that git knows in our packages, all but Python and Markdown match a pattern of package-data."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout: there is no list of files to compare with")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    data = [Path(name) for name in listed.stdout.splitlines() if Path(name).suffix not in (".py", ".md")]
    assert len(data) > 30
    assert [str(p) for p in data if not any(p.match(pattern) for pattern in patterns)] == []


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").exists()] == []
