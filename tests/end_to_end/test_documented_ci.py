"""The documented CI steps in a throwaway git repository: sound commits pass, a regression of each kind does not."""

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documented_ci
import numpy as np
import pytest

from convert.demo_assets import digits_arrays
from targets import emulator

pytestmark = pytest.mark.slow
BOARD = "raspberry-pi-4b"
# What the sound artifact is held to. The limits are far from both sides: no machine's mood decides a verdict.
BUDGET = """
version = 1
[gates]
min_sqnr_db = 25
max_accuracy_drop = 0.02
max_class_drop = 0.1
max_size_ratio = 0.5
max_fallbacks = 0
min_speedup = 0.2
"""


def made_out() -> Any:
    """The helpers of tests/convert, which is no package."""
    path = Path(__file__).resolve().parents[1] / "convert" / "made_out.py"
    spec = importlib.util.spec_from_file_location("made_out", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model, its data and a budget, and the result of its last good build, not committed."""
    pytest.importorskip("litert_torch")
    repository = tmp_path_factory.mktemp("repository")
    made_out()._exported(repository / "model.pt2")
    images, _ = digits_arrays("train")
    test_images, labels = digits_arrays("test")
    np.savez(repository / "calibration.npz", x=images[:64])
    np.savez(repository / "test.npz", x=test_images[:200], labels=labels[:200])
    (repository / "budget.toml").write_text(BUDGET)
    (repository / "recipe.txt").write_text("int8")
    (repository / ".gitignore").write_text("out\nbaseline\nsummary.md\n")
    commit(repository, "A model")
    code, text = built(repository)
    assert code == 0, text
    shutil.copytree(repository / "out", repository / "baseline")
    return repository


@pytest.fixture
def repository(sound: Path, tmp_path: Path) -> Path:
    """A clone on a branch of its own, with the baseline beside it."""
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(sound), str(folder))
    git(folder, "switch", "-q", "-c", "change")
    shutil.copytree(sound / "baseline", folder / "baseline")
    return folder


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, message: str) -> None:
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", message)


def environment(folder: Path) -> dict[str, str]:
    here = str(Path(sys.executable).parent)
    return {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}


def built(folder: Path, **inputs: str) -> tuple[int, str]:
    """The action's steps on the commit that is checked out; the recipe is what the repository says."""
    given = {
        "model": "model.pt2",
        "device": BOARD,
        "calibration": "calibration.npz",
        "evaluation": "test.npz",
        "recipe": (folder / "recipe.txt").read_text(),
        "baseline": "baseline",
        "install": "",
        **inputs,
    }
    return documented_ci.run_action(folder, given, environment(folder))


def failed_gates(folder: Path) -> set[str]:
    import xml.etree.ElementTree as ET

    cases = ET.parse(folder / "out" / "check.xml").iter("testcase")
    return {case.get("name", "") for case in cases if case.find("failure") is not None}


def test_a_commit_that_changes_nothing_passes_and_its_verdicts_are_shown(repository: Path) -> None:
    commit(repository, "Nothing")
    code, text = built(repository)
    assert code == 0, text
    assert "min_sqnr_db" in (repository / "summary.md").read_text()


# The recipe that a commit switches to, and the gates that must fail for it.
REGRESSIONS = {
    # TFLite stores depthwise weights of 2 bits in 8: they fall back, besides being bad ones.
    "w2": {
        *("min_sqnr_db", "max_accuracy_drop", "max_class_drop", "max_fallbacks"),
        *("baseline_sqnr_db", "baseline_accuracy", "baseline_fallbacks"),
    },
    "float32": {"max_size_ratio", "baseline_bytes"},
    "w8a16": {"min_speedup"},
}


@pytest.mark.parametrize("recipe", REGRESSIONS)
def test_a_regression_fails_the_gates_of_its_kind(recipe: str, repository: Path) -> None:
    (repository / "recipe.txt").write_text(recipe)
    commit(repository, f"Switch to {recipe}")
    code, text = built(repository)
    assert code == 1, text
    assert failed_gates(repository) >= REGRESSIONS[recipe], text


def test_a_latency_on_a_named_device_is_a_gate(repository: Path) -> None:
    """The device is this machine. Limits far from any time: how busy it is decides no verdict."""
    (repository / "budget.toml").write_text(f"{BUDGET}\n[on.local]\nmax_p50_ms = 100_000\n")
    commit(repository, "A limit on a device")
    code, text = built(repository, places="local", baseline="")
    assert code == 0, text
    (repository / "budget.toml").write_text(f"{BUDGET}\n[on.local]\nmax_p50_ms = 0.000_1\n")
    commit(repository, "A limit that it misses")
    assert built(repository, places="local", baseline="")[0] == 1
    assert failed_gates(repository) == {"max_p50_ms"}


def test_more_instructions_are_a_failed_gate(repository: Path) -> None:
    if not emulator.is_built(BOARD):
        pytest.skip(f"the emulated board is not built: tightfit emulator build {BOARD}")
    place = f"emulated:{BOARD}"
    shutil.rmtree(repository / "baseline")
    code, text = built(repository, places=place)
    assert code == 0, text
    counted = json.loads((repository / "out" / "report.json").read_text())["results"][0]["instructions"]["all"]
    (repository / "out").rename(repository / "baseline")
    (repository / "budget.toml").write_text(f'{BUDGET}\n[on."{place}"]\nmax_instructions = {int(counted * 1.05)}\n')
    commit(repository, "A limit on instructions")
    code, text = built(repository, places=place)
    assert code == 0, text
    (repository / "recipe.txt").write_text("float32")
    commit(repository, "Float takes more")
    assert built(repository, places=place)[0] == 1
    assert failed_gates(repository) >= {"max_instructions", f"baseline_instructions on {place}"}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def api(repository: Path, tmp_path: Path) -> Iterator[str]:
    """A server that has the default branch's report where GitLab has it."""
    place = tmp_path / "api" / "projects" / "1" / "jobs" / "artifacts" / "main" / "raw" / "out"
    place.mkdir(parents=True)
    shutil.copy(repository / "baseline" / "report.json", place)

    def handler(*words: Any) -> _Quiet:
        return _Quiet(*words, directory=str(tmp_path / "api"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("recipe", "code"), [("int8", 0), ("float32", 1)])
def test_the_gitlab_job_does_the_same(recipe: str, code: int, repository: Path, api: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    variables = {
        "MODEL": "model.pt2",
        "DATA": "calibration.npz",
        "DEVICES": BOARD,
        "CI_API_V4_URL": api,
        "CI_PROJECT_ID": "1",
        "CI_DEFAULT_BRANCH": "main",
        "CI_JOB_TOKEN": "none",
    }
    (repository / "budget.toml").write_text("version = 1\n[gates]\nmin_sqnr_db = 20\nmax_size_ratio = 0.5\n")
    shim = repository / "bin"  # the job takes the default recipe, and a fifth of the calibration data
    shim.mkdir()
    (shim / "tightfit").write_text(
        f'#!/bin/sh\nif [ "$1" = convert ]; then set -- "$@" --recipe {recipe} --evaluation test.npz; fi\n'
        f'exec "{Path(sys.executable).parent / "tightfit"}" "$@"\n'
    )
    (shim / "tightfit").chmod(0o755)
    path = {"PATH": f"{shim}{os.pathsep}{environment(repository)['PATH']}"}
    found, text = documented_ci.run_gitlab(repository, variables, path)
    assert found == code, text
    assert (repository / "baseline.json").is_file()
    assert ("baseline_bytes" in failed_gates(repository)) == bool(code)
