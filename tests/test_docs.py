"""The README and the manual say what the code does: commands, files, tables, versions."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.main import get_command

from convert import recipes
from convert.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"```(?P<language>[a-z]*)\n(?P<text>.*?)```", re.DOTALL)


def commands_in(page: str) -> list[list[str]]:
    """The arguments of every complete `tightfit ...` of a page, without those that only show the syntax."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for block in BLOCK.finditer(text) for line in block["text"].splitlines()]
    lines += re.findall(r"`(tightfit [^`]+)`", BLOCK.sub("", text))
    found = [line.split("tightfit ", 1)[1] for line in lines if re.match(r"(.* && \S*/?)?tightfit ", line.strip())]
    return [shlex.split(line) for line in found if "[" not in line and "…" not in line]


def refusal(arguments: list[str]) -> str | None:
    """Why the command line would refuse these arguments, None when it takes them. Nothing is run."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    if arguments == ["--help"]:
        return None
    if arguments[0] not in commands:
        return f"there is no command {arguments[0]}"
    if len(arguments) == 1:  # the text speaks of a command, it does not show its use
        return None
    try:
        commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
    except typer.Exit:  # --help
        return None
    except Exception as error:
        # Typer may bring a Click of its own: its usage errors are known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_page_is_taken(page: str) -> None:
    assert [(line, why) for line in commands_in(page) if (why := refusal(line))] == []


def test_the_readme_shows_the_main_commands() -> None:
    shown = {line[0] for line in commands_in("README.md")}
    assert shown >= {"demo", "convert", "check", "inspect", "devices", "doctor"}


@pytest.mark.parametrize(
    "wrong", ["convert a.onnx --devise x", "chek", "bench a.onnx --runs many", "check --self-test"]
)
def test_a_wrong_command_line_would_be_noticed(wrong: str) -> None:
    assert refusal(shlex.split(wrong)) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_ours_that_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    tops = "|".join(["convert", "calibrate", "targets", "device_profiles", "benchmarks", "docs", "tests", r"\.ci"])
    named = re.findall(rf"`((?:{tops})/[^`\s]*)`", text)
    concrete = [name for name in named if not re.search(r"[<>*{}]|\.\.\.|…", name)]
    assert [name for name in concrete if not (ROOT / name).exists()] == []


def test_the_tables_are_those_the_code_gives(tables: ModuleType) -> None:
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert tables.TABLE.search(text), f"{path.name} has lost its table"
        assert tables.renewed(text) == text, "run python docs/tables.py"


def test_a_table_that_is_out_of_date_would_be_noticed(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("raspberry-pi-4b`", "raspberry-pi-4c`")
    assert tables.renewed(text) != text


def test_the_recipes_of_the_manual_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = []
    for block in (b["text"] for b in BLOCK.finditer(text) if b["language"] == "toml"):
        path = tmp_path / "mine.toml"
        path.write_text(block)
        found.append(recipes.load(str(path)))
    assert found[0].compute == "float16"
    assert found[1].steps.count("finetune:signs") == 1
    assert found[1].parameters["binarize"]["source"] == "graph"


def test_the_preprocessing_of_the_manual_is_the_one_the_code_shows() -> None:
    from convert.preprocessing import EXAMPLE

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [b["text"] for b in BLOCK.finditer(text) if b["language"] == "toml"] == [EXAMPLE]


def test_the_budget_of_the_readme_can_be_read(tmp_path: Path) -> None:
    from convert.budget import read_budget

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b["text"] for b in BLOCK.finditer(text) if b["language"] == "toml"]
    path = tmp_path / "budget.toml"
    path.write_text(block)
    assert read_budget(path).limits("raspberry-pi-4b", "tflite")["max_bytes"] == 100_000


def test_the_changelog_is_at_the_version_that_is_built() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == project["version"]


def test_the_readme_runs_the_checks_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy", "lint-imports", "pytest"):
        assert re.search(rf"^{re.escape(command)}", script, re.MULTILINE), f".ci/run does not run {command}"
        assert f"&& {command}" in readme, f"the README's line does not run {command}"
