"""What came back, read as what it is: data from a machine that nobody vouches for."""

import json
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from calibrate.samples import Batch
from targets.agent.timing import ROUNDS
from targets.errors import TargetError

from .nouns import Answer, Errand, FileAnswer

LARGEST = 4 * 2**30
Text = Annotated[str, Field(max_length=4000)]
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Part):
    """One file's entry: runtime, times in milliseconds, and which marks of the counter are its own."""

    executor: Text
    load_ms: Time
    first_ms: Time
    counted: int = Field(ge=0)
    first_mark: int = Field(default=0, ge=0)


class State(_Part):
    """The board at one moment."""

    moment: Text
    minute: FiniteFloat | None
    clock_mhz: FiniteFloat | None
    temperature_c: FiniteFloat | None
    governor: Text | None
    throttled: Text | None
    power_w: FiniteFloat | None


class Point(_Part):
    """One stretch of a sustained run."""

    minute: Time
    p50_ms: float = Field(gt=0, allow_inf_nan=False)
    temperature_c: FiniteFloat | None
    clock_mhz: FiniteFloat | None


class Failure(_Part):
    """Why there is no answer."""

    kind: Literal["missing_runtime", "refused", "failed"]
    text: Text


class AnswerFile(_Part):
    """The file answer.json."""

    version: Literal[1]
    identity: Text
    facts: dict[Text, Text]
    artifacts: dict[Text, File]
    board: tuple[State, ...]
    sustained: tuple[Point, ...]
    peak_rss_mib: Time | None
    energy_mj: Time | None
    void: Text | None
    others: float | None = Field(ge=0, le=1)
    warnings: tuple[Text, ...]
    error: Failure | None


def read(path: Path, identity: str, address: str) -> AnswerFile:
    """The answer to the job of this identity. Raises TargetError for anything else."""
    try:
        found = AnswerFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _wrong(address, f"answer.json is not what the agent writes: {where}: {first['msg']}") from error
    if found.identity != identity and (found.error is None or found.identity):
        raise _wrong(address, "the answer is that of another job")
    return found


def whole(
    found: AnswerFile,
    errand: Errand,
    *,
    outputs: Path,
    times: Path | None,
    counts: Path | None,
    address: str,
    emulated: bool,
) -> Answer:
    """All that came back for an errand, checked. Raises TargetError for what is missing, damaged or out of place."""
    names = ["artifact"] + (["float"] if errand.twin is not None else [])
    if sorted(found.artifacts) != sorted(names):
        raise _wrong(address, f"the answer is about {', '.join(found.artifacts) or 'nothing'}, not {', '.join(names)}")
    samples = len(next(iter(errand.inputs.values())))
    arrays = _outputs(outputs, names, samples, address)
    blocks = {name: [] for name in names} if times is None else _times(times, names, errand, address)
    lines = [] if counts is None else _lines(counts, found, address)
    files = {}
    for name in names:
        entry = found.artifacts[name]
        first = entry.first_mark + 1
        files[name] = FileAnswer(
            executor=entry.executor,
            outputs=arrays[name],
            load_ms=entry.load_ms,
            first_ms=entry.first_ms,
            blocks=blocks[name],
            counts=lines[first : first + entry.counted],
        )
    return Answer(
        artifact=files["artifact"],
        twin=files.get("float"),
        facts=found.facts,
        board=[state.model_dump() for state in found.board],
        sustained=[point.model_dump() for point in found.sustained],
        # An emulated process's memory is the emulator's.
        peak_rss_mib=None if emulated else found.peak_rss_mib,
        energy_mj=found.energy_mj,
        void=found.void,
        others=found.others,
        warnings=found.warnings,
    )


def _outputs(path: Path, names: list[str], samples: int, address: str) -> dict[str, Batch]:
    arrays: dict[str, Batch] = {name: {} for name in names}
    for key, array in _arrays(path, address).items():
        name, _, output = key.partition("/")
        if name not in arrays or not output:
            raise _wrong(address, f"outputs.npz holds '{key[:200]}', which is no output of {' or '.join(names)}")
        if array.dtype.kind not in "biuf" or array.ndim < 1 or len(array) != samples:
            raise _wrong(
                address,
                f"the output '{output[:200]}' came back as {array.dtype} {array.shape}; there were {samples} samples",
            )
        arrays[name][output] = array
    for name, found in arrays.items():
        if not found:
            raise _wrong(address, f"no output of {name} came back")
    return arrays


def _times(path: Path, names: list[str], errand: Errand, address: str) -> dict[str, list[NDArray[np.float64]]]:
    found = _arrays(path, address)
    expected = {name: [f"{name}/{index}" for index in range(ROUNDS)] for name in names}
    if sorted(found) != sorted(key for keys in expected.values() for key in keys):
        raise _wrong(address, f"times.npz does not hold {ROUNDS} rounds of {' and '.join(names)}")
    for key, array in found.items():
        if array.dtype != np.float64 or array.ndim != 1 or not array.size:
            raise _wrong(address, f"the times of round {key} came back as {array.dtype} {array.shape}")
        if not np.isfinite(array).all() or np.signbit(array.astype(np.float64)).any():
            raise _wrong(address, f"round {key} has times that are none")
    blocks = {name: [found[key].astype(np.float64) for key in keys] for name, keys in expected.items()}
    for name, rounds in blocks.items():
        runs = sum(block.size for block in rounds)
        if errand.timing is not None and runs < errand.timing.min_runs:
            raise _wrong(address, f"{name} was timed {runs} times only, of {errand.timing.min_runs}")
    return blocks


def _lines(path: Path, found: AnswerFile, address: str) -> list[dict[str, int]]:
    """The counter's lines, one per mark. A mark too many or too few would give counts to the wrong inferences."""
    marks = sum(entry.counted + 1 for entry in found.artifacts.values())
    try:
        raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [{str(name): int(value) for name, value in line.items()} for line in raw]
    except (ValueError, TypeError, AttributeError) as error:
        raise _wrong(address, f"{path.name} is not what the emulator writes: {error}") from error
    if len(lines) != marks:
        raise _wrong(address, f"the emulator counted between {len(lines)} marks, and the agent made {marks}")
    for line in lines:
        if line.get("all", 0) < 1 or min(line.values()) < 0:
            raise _wrong(address, f"{path.name} has a count that is none: {line}")
    return lines


def _arrays(path: Path, address: str) -> dict[str, NDArray[np.generic]]:
    """The arrays of an .npz file, which must be no larger than LARGEST when it is unpacked; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise _wrong(address, f"{path.name} unpacks to {size / 2**30:.1f} GiB")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise _wrong(address, f"{path.name} is damaged: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # bytes, where a member is no .npy file
            raise _wrong(address, f"{path.name} holds no array under {name[:200]}")
    return arrays


def _wrong(address: str, what: str) -> TargetError:
    return TargetError(f"{address}: what came back cannot be used: {what}. Run it again; if it stays so, report it.")
