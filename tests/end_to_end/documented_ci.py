"""Runs the steps of the documented CI files in a folder, as their servers would, as far as these files go."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import yaml

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ci"


def run_action(folder: Path, inputs: Mapping[str, str], environment: Mapping[str, str]) -> tuple[int, str]:
    """The composite action's steps in `folder`: the exit code of the first that failed, and all they printed."""
    action = yaml.safe_load((DOCS / "action" / "action.yml").read_text(encoding="utf-8"))
    unknown = set(inputs) - set(action["inputs"])
    assert not unknown, f"the action has no input {unknown}"
    given = {name: str(inputs.get(name, about.get("default", ""))) for name, about in action["inputs"].items()}
    assert not [n for n, about in action["inputs"].items() if about.get("required") and not given[n]]
    code, printed = 0, ""
    for step in action["runs"]["steps"]:
        if not _wanted(step.get("if"), given, code):
            continue
        own = {name: _substituted(str(text), given) for name, text in step.get("env", {}).items()}
        found, text = _bash(_substituted(step["run"], given), folder, {**environment, **own})
        printed += f"--- {step['name']}\n{text}"
        code = code or found
    return code, printed


def run_gitlab(folder: Path, variables: Mapping[str, str], environment: Mapping[str, str]) -> tuple[int, str]:
    """The job's script in `folder`, stopped at the first line that fails; `before_script` only installs."""
    job = yaml.safe_load((DOCS / "gitlab.yml").read_text(encoding="utf-8"))["tightfit"]
    assert all(line.startswith("pip install") for line in job["before_script"])
    declared = {name: str(value) for name, value in job["variables"].items()}
    given = {"CI_PROJECT_DIR": str(folder), **declared, **variables}
    expanded = {name: re.sub(r"\$(\w+)", lambda m: given.get(m[1], ""), value) for name, value in given.items()}
    return _bash("\n".join(job["script"]), folder, {**environment, **expanded})


def _wanted(condition: str | None, inputs: Mapping[str, str], failed: int) -> bool:
    """The few conditions that the action has; any other is an error, not a yes."""
    if condition == "always()":
        return True
    if failed:
        return False
    if condition is None:
        return True
    if found := re.fullmatch(r"inputs\.(\w+) != ''", condition):
        return bool(inputs[found[1]])
    if found := re.fullmatch(r"contains\(inputs\.(\w+), '([^']*)'\)", condition):
        return found[2] in inputs[found[1]]
    raise AssertionError(f"a condition that this runner does not know: {condition}")


def _substituted(text: str, inputs: Mapping[str, str]) -> str:
    done = re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: inputs[m[1]], text)
    assert "${{" not in done, done
    return done


def _bash(script: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
