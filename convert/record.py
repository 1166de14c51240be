"""What a conversion left in OUT for `check`: report, manifests and reference samples, read and cross-checked."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from calibrate.samples import Batch
from convert.errors import TightfitError
from convert.output import read_json
from convert.report.schema import Report, Result
from convert.report.store import read_report

MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
REPORT = "report.json"


class ManifestInput(BaseModel):
    """One input of an artifact; `shape` includes its batch."""

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    dtype: str


class ManifestArtifact(BaseModel):
    """One artifact: its files relative to the manifest, their SHA-256, and its interface."""

    file: str
    sha256: dict[str, str] = Field(min_length=1)
    float_file: str
    float_sha256: dict[str, str] = Field(min_length=1)
    inputs: tuple[ManifestInput, ...] = Field(min_length=1)
    outputs: tuple[str, ...] = Field(min_length=1)


class Manifest(BaseModel):
    """OUT/<device>/manifest.json, as far as it is read again."""

    version: Literal[1]
    artifacts: dict[str, ManifestArtifact] = Field(min_length=1)


@dataclass(frozen=True)
class Recorded:
    """One artifact with all that is known about it.

    `inputs` [samples, ...] by input, `expected` the float model's outputs and `outputs` the artifact's own when it
    was made, both [samples, ...] by output; samples is a multiple of `batch`. Hashes are SHA-256 by file name.
    """

    result: Result
    path: Path
    hashes: dict[str, str]
    twin: Path
    twin_hashes: dict[str, str]
    batch: int
    inputs: Batch
    expected: Batch
    outputs: Batch

    @property
    def samples(self) -> int:
        """How many reference samples there are."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Record:
    """The report in OUT and, in its order, the artifacts it is about."""

    report: Report
    artifacts: tuple[Recorded, ...]


def read_record(out: Path) -> Record:
    """Read OUT. Raises TightfitError when it is missing, not a conversion's, damaged, or at odds with itself.

    Whether the artifacts themselves are there and whole is not looked at: that is for gates to say.
    """
    _refuse_foreign(out)
    report = read_report(out / REPORT)
    arrays = _reference(out / REFERENCE)
    manifests = {device: read_manifest(out, device) for device in dict.fromkeys(r.device for r in report.results)}
    listed = {f"{device}/{target}" for device, manifest in manifests.items() for target in manifest.artifacts}
    strangers = listed ^ {r.subject for r in report.results}
    if strangers:
        raise TightfitError(
            f"{out / REPORT} and the manifests disagree about {', '.join(sorted(strangers))}: only one side has it. "
            "The folder is not as `tightfit convert` left it; convert again."
        )
    return Record(report, tuple(_recorded(out, r, manifests[r.device], arrays) for r in report.results))


def read_manifest(out: Path, device: str) -> Manifest:
    """The manifest of one device; raises TightfitError when it is missing or malformed."""
    path = _inside(out, Path(device)) / MANIFEST
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TightfitError(f"{path} is damaged: {where}: {first['msg']}. Convert again.") from error


def first_inputs(out: Path, entry: ManifestArtifact) -> Batch:
    """One batch of an artifact's stored inputs; raises TightfitError when they are missing or do not fit."""
    arrays = _reference(out / REFERENCE)
    batch = {i.name: _array(arrays, f"input/{i.name}")[: i.shape[0]] for i in entry.inputs}
    wrong = [i.name for i in entry.inputs if batch[i.name].shape != i.shape]
    if wrong:
        raise TightfitError(f"{out / REFERENCE} does not fit {entry.file}: input {wrong[0]} has another shape.")
    return batch


def samples_of(out: Path, entry: ManifestArtifact) -> tuple[Batch, Batch]:
    """All stored inputs of an artifact and the float model's outputs for them; raises TightfitError when damaged."""
    arrays = _reference(out / REFERENCE)
    inputs = {i.name: _array(arrays, f"input/{i.name}") for i in entry.inputs}
    return inputs, {name: _array(arrays, f"float/{name}") for name in entry.outputs}


def _refuse_foreign(out: Path) -> None:
    if (out / REPORT).is_file():
        return
    if not out.is_dir():
        raise TightfitError(f"there is no folder {out}. `tightfit convert ... -o {out}` makes one to check.")
    inner = sorted(p.parent.name for p in out.glob(f"*/{REPORT}"))
    hint = f"It holds several results: check {out / inner[0]}." if inner else "Name the folder given to -o."
    raise TightfitError(f"{out} was not made by `tightfit convert`: it has no {REPORT}. {hint}")


def _inside(folder: Path, relative: Path) -> Path:
    """`folder/relative`; raises TightfitError when that leads out of `folder`."""
    path = folder / relative
    if relative.is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise TightfitError(
            f"the record in {folder} points to {relative}, outside the folder; it is not to be trusted."
        )
    return path


def _reference(path: Path) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise TightfitError(
            f"{path} is missing: without reference samples nothing can be run again. Convert again."
        ) from error
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise TightfitError(f"{path} is damaged ({error}). Convert again.") from error


def _array(arrays: Batch, key: str) -> np.ndarray:
    if key not in arrays or not arrays[key].ndim:
        raise TightfitError(f"{REFERENCE} is damaged: it has no samples under '{key}'. Convert again.")
    return arrays[key]


def _recorded(out: Path, result: Result, manifest: Manifest, arrays: Batch) -> Recorded:
    entry = manifest.artifacts[result.target]
    home = _inside(out, Path(result.device))
    recorded = Recorded(
        result=result,
        path=_inside(home, Path(entry.file)),
        hashes=entry.sha256,
        twin=_inside(home, Path(entry.float_file)),
        twin_hashes=entry.float_sha256,
        batch=entry.inputs[0].shape[0],
        inputs={i.name: _array(arrays, f"input/{i.name}") for i in entry.inputs},
        expected={name: _array(arrays, f"float/{name}") for name in entry.outputs},
        outputs={name: _array(arrays, f"artifact/{result.subject}/{name}") for name in entry.outputs},
    )
    _demand_consistency(recorded, entry)
    return recorded


def _demand_consistency(recorded: Recorded, entry: ManifestArtifact) -> None:
    """Raise TightfitError unless samples, shapes and batch fit each other."""
    subject, samples = recorded.result.subject, recorded.samples
    wrong = [
        f"input {i.name} has the shape {recorded.inputs[i.name].shape[1:]}, the manifest {i.shape[1:]}"
        for i in entry.inputs
        if recorded.inputs[i.name].shape[1:] != i.shape[1:]
    ]
    groups = {"input": recorded.inputs, "float": recorded.expected, "artifact": recorded.outputs}
    wrong += [
        f"{what}/{name} holds {len(array)} samples, not {samples}"
        for what, arrays in groups.items()
        for name, array in arrays.items()
        if len(array) != samples
    ]
    wrong += [
        f"float and artifact outputs {name} differ in shape"
        for name, array in recorded.expected.items()
        if array.shape != recorded.outputs[name].shape
    ]
    if samples == 0 or samples % recorded.batch:
        wrong.append(f"{samples} samples are no multiple of the batch, {recorded.batch}")
    if wrong:
        raise TightfitError(f"{REFERENCE} does not fit {subject}: {wrong[0]}. Convert again.")
