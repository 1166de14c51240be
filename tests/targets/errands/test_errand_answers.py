"""What comes back is data that nobody vouches for: whatever is out of place is an error, and nothing is unpickled."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets.agent.timing import ROUNDS
from targets.errands import Answer, Errand, Timing, answers
from targets.errors import TargetError

INPUTS = {"x": np.zeros((4, 2), np.float32)}
GOOD: dict[str, Any] = {
    "version": 1,
    "identity": "this job",
    "facts": {"python": "3.11"},
    "artifacts": {
        "artifact": {"executor": "LiteRT", "load_ms": 1.0, "first_ms": 2.0, "counted": 2, "first_mark": 0},
        "float": {"executor": "LiteRT", "load_ms": 1.0, "first_ms": 2.0, "counted": 2, "first_mark": 3},
    },
    "board": [],
    "sustained": [],
    "peak_rss_mib": 80.5,
    "energy_mj": None,
    "void": None,
    "others": 0.01,
    "warnings": [],
    "error": None,
}
OUTPUTS = {"artifact/y": np.ones((4, 3), np.float32), "float/y": np.ones((4, 3), np.float32)}
TIMES = {f"{name}/{i}": np.full(2, 0.001) for name in ("artifact", "float") for i in range(ROUNDS)}
COUNTS = [{"all": 900 + i, "simd": i} for i in range(6)]


class Back:
    """A folder of what came back, good until it is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer = json.loads(json.dumps(GOOD))
        self.outputs: dict[str, Any] = dict(OUTPUTS)
        self.times: dict[str, Any] = dict(TIMES)
        self.counts: list[Any] = list(COUNTS)

    def read(self, timed: bool = True) -> Answer:
        (self.folder / "answer.json").write_text(json.dumps(self.answer))
        np.savez(self.folder / "outputs.npz", **self.outputs)
        np.savez(self.folder / "times.npz", **self.times)
        (self.folder / "instructions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.counts))
        return self.parse(timed)

    def parse(self, timed: bool = True) -> Answer:
        timing = Timing(min_runs=2 * ROUNDS) if timed else None
        return answers.whole(
            answers.read(self.folder / "answer.json", "this job", "ssh://pi"),
            Errand(Path("a.tflite"), Path("b.tflite"), INPUTS, 2, timing=timing),
            outputs=self.folder / "outputs.npz",
            times=self.folder / "times.npz" if timed else None,
            counts=self.folder / "instructions.jsonl",
            address="ssh://pi",
            emulated=False,
        )


@pytest.fixture
def back(tmp_path: Path) -> Back:
    return Back(tmp_path)


def test_a_good_answer_is_read(back: Back) -> None:
    answer = back.read()
    assert answer.twin is not None
    assert answer.artifact.outputs["y"].shape == (4, 3)
    assert len(answer.artifact.blocks) == ROUNDS
    assert (answer.peak_rss_mib, answer.others) == (80.5, 0.01)


def test_counts_go_to_the_inferences_between_the_marks_that_are_theirs(back: Back) -> None:
    answer = back.read()
    assert answer.twin is not None
    # Marks 0 and 3 are made before each one's first inference: what ended there was no inference.
    assert [line["all"] for line in answer.artifact.counts] == [901, 902]
    assert [line["all"] for line in answer.twin.counts] == [904, 905]


WRONG: list[tuple[Callable[[Back], Any], str]] = [
    (lambda b: b.answer.update(version=2), "version"),
    (lambda b: b.answer.update(identity="another"), "another job"),
    (lambda b: b.answer.update(extra=1), "extra"),
    (lambda b: b.answer.pop("board"), "board"),
    (lambda b: b.answer.update(facts={"python": ["3"]}), "facts"),
    (lambda b: b.answer.update(void="x" * 5000), "void"),
    (lambda b: b.answer.update(energy_mj=-1), "energy_mj"),
    (lambda b: b.answer["artifacts"]["float"].update(load_ms="soon"), "load_ms"),
    (lambda b: b.answer["artifacts"].pop("float"), "is about artifact, not"),
    (lambda b: b.outputs.pop("float/y"), "no output of float came back"),
    (lambda b: b.outputs.update({"artifact/y": np.ones((3, 3), np.float32)}), r"\(3, 3\); there were 4 samples"),
    (lambda b: b.outputs.update({"artifact/y": np.array(["a"] * 4)}), "came back as <U1"),
    (lambda b: b.outputs.update({"artifact/y": np.float32(1)}), "came back as float32"),
    (lambda b: b.outputs.update({"other/y": np.ones(4)}), "'other/y', which is no output"),
    (lambda b: b.outputs.update({"artifact/y": np.array([{}] * 4, object)}), "is damaged"),
    (lambda b: b.times.pop("float/0"), f"does not hold {ROUNDS} rounds"),
    (lambda b: b.times.update({"more/0": np.ones(2)}), f"does not hold {ROUNDS} rounds"),
    (lambda b: b.times.update({"float/0": np.full(2, -0.001)}), "times that are none"),
    (lambda b: b.times.update({"float/0": np.full(2, np.nan)}), "times that are none"),
    (lambda b: b.times.update({"float/0": np.ones(2, np.float32)}), "came back as float32"),
    (lambda b: b.times.update({"float/0": np.ones(0)}), "came back as float64"),
    (lambda b: b.times.update({"float/0": np.full(1, 0.001)}), f"timed {2 * ROUNDS - 1} times only"),
    (lambda b: b.counts.pop(), "between 5 marks, and the agent made 6"),
    (lambda b: b.counts.append(COUNTS[0]), "between 7 marks, and the agent made 6"),
    (lambda b: b.counts.__setitem__(1, {"all": -3}), "a count that is none"),
    (lambda b: b.counts.__setitem__(1, {"simd": 3}), "a count that is none"),
    (lambda b: b.counts.__setitem__(1, {"all": "many"}), "not what the emulator writes"),
    (lambda b: b.counts.__setitem__(1, 7), "not what the emulator writes"),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG)
def test_whatever_is_out_of_place_is_an_error_in_words(back: Back, spoil: Callable[[Back], Any], words: str) -> None:
    spoil(back)
    with pytest.raises(TargetError, match=words) as caught:
        back.read()
    assert str(caught.value).startswith("ssh://pi: what came back cannot be used")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(back: Back, tmp_path: Path) -> None:
    left = tmp_path / "left"
    pickle.loads(pickle.dumps(Bomb(left)))
    assert left.exists()  # the bomb works
    left.unlink()
    back.outputs["artifact/y"] = np.array([Bomb(left)] * 4, object)
    with pytest.raises(TargetError, match="damaged"):
        back.read()
    assert not left.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x80\x04."])
def test_a_damaged_archive_is_an_error(back: Back, content: bytes) -> None:
    back.read()
    (back.folder / "outputs.npz").write_bytes(content)
    with pytest.raises(TargetError, match=r"outputs\.npz is damaged"):
        back.parse()


def test_an_archive_that_unpacks_to_too_much_is_refused_unread(back: Back, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LARGEST", 10)
    with pytest.raises(TargetError, match="unpacks to"):
        back.read()


def test_an_answer_that_is_no_json_is_an_error(back: Back) -> None:
    back.read()
    (back.folder / "answer.json").write_bytes(b"\xff{")
    with pytest.raises(TargetError, match=r"answer\.json is not what the agent writes"):
        back.parse()
