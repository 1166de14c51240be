"""What is sent: the same agent from the same sources, and the session options that this machine uses."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from agent_jobs import dense_onnx, samples

from targets._onnx_session import session_options
from targets.errands import Errand, pack


def test_the_agent_is_the_same_file_every_time() -> None:
    first = pack.agent()
    assert first == pack.agent()
    members = zipfile.ZipFile(io.BytesIO(first)).infolist()
    assert [m.filename for m in members] == sorted(m.filename for m in members)
    assert {m.date_time for m in members} == {(1980, 1, 1, 0, 0, 0)}
    assert members[0].filename == "__main__.py"


def test_the_agent_starts_with_nothing_of_ours_beside_it(tmp_path: Path) -> None:
    (tmp_path / "agent.pyz").write_bytes(pack.agent())
    (tmp_path / "job.json").write_text(json.dumps({"version": 99}))
    command = [sys.executable, "-I", "-S", "agent.pyz", "job.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    error = json.loads((tmp_path / "answer.json").read_text())["error"]
    assert error["text"] == "the agent understands jobs of version 1, not 99."


def test_a_job_that_is_none_is_an_error_in_the_answer(tmp_path: Path) -> None:
    (tmp_path / "agent.pyz").write_bytes(pack.agent())
    (tmp_path / "job.json").write_text('{"version": 1}')
    done = subprocess.run([sys.executable, "agent.pyz", "job.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "no job for the agent" in json.loads((tmp_path / "answer.json").read_text())["error"]["text"]


def test_onnx_files_run_there_with_the_options_of_this_machine(tmp_path: Path) -> None:
    path = dense_onnx(tmp_path / "model.onnx")
    pack.packed(Errand(path, None, samples(), 2), tmp_path, count=False)
    (entry,) = json.loads((tmp_path / "job.json").read_text())["artifacts"]
    options = session_options()
    spinning = entry["config"].pop("session.intra_op.allow_spinning")
    assert spinning == "0"
    assert entry["config"]
    for key, value in entry["config"].items():
        assert options.get_session_config_entry(key) == value
    assert entry["disabled"] == []


def test_counting_is_asked_for_only_where_the_transport_can(tmp_path: Path) -> None:
    path = dense_onnx(tmp_path / "model.onnx")
    for count in (True, False):
        pack.packed(Errand(path, None, samples(), 2, count=3), tmp_path, count=count)
        assert json.loads((tmp_path / "job.json").read_text())["count"] == (3 if count else 0)


def test_inputs_may_have_any_names(tmp_path: Path) -> None:
    inputs = {"file": np.ones((2, 1)), "a/b:0": np.zeros((2, 1), np.int64)}
    pack.packed(Errand(dense_onnx(tmp_path / "m.onnx"), None, inputs, 1), tmp_path, count=False)
    with np.load(tmp_path / "inputs.npz") as stored:
        assert sorted(stored.files) == sorted(inputs)
        np.testing.assert_array_equal(stored["a/b:0"], inputs["a/b:0"])
