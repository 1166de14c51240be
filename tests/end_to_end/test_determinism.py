"""The same model and samples in another process, with another hash seed: the same bytes."""

import shutil
from pathlib import Path

import pytest
from real_conversions import Made

from convert.output import read_json

pytestmark = pytest.mark.slow

# What names a run and not its result.
OWN_TO_A_RUN = {"command", "artifacts"}


def files(out: Path, subject: str) -> dict[str, bytes]:
    """Every file of one artifact and of its float twin."""
    device, target = subject.split("/")
    entry = read_json(out / device / "manifest.json")["artifacts"][target]
    return {name: (out / device / name).read_bytes() for name in hashed(entry)}


def hashed(entry: dict) -> list[str]:
    """The files of a manifest's entry, relative to the device's folder."""
    float_folder = Path(entry["float_file"]).parent
    return [*entry["sha256"], *((float_folder / name).as_posix() for name in entry["float_sha256"])]


def differences(one: Path, other: Path, subjects: list[str]) -> list[str]:
    """The files and manifest entries that two results do not share byte for byte."""
    found = []
    for subject in subjects:
        device, target = subject.split("/")
        ours, theirs = files(one, subject), files(other, subject)
        found += [f"{subject}: {n}" for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]
        manifests = [read_json(out / device / "manifest.json") for out in (one, other)]
        if manifests[0]["artifacts"][target] != manifests[1]["artifacts"][target]:
            found.append(f"{subject}: manifest entry")
        common = [{k: v for k, v in m.items() if k not in OWN_TO_A_RUN} for m in manifests]
        if common[0] != common[1]:
            found.append(f"{subject}: manifest")
    return found


@pytest.mark.parametrize(("made", "again"), [("resnet20", "resnet20-all-targets"), ("vit", "vit-again")], indirect=True)
def test_a_second_conversion_gives_the_same_bytes_in_every_format(made: Made, again: Made) -> None:
    subjects = [r.subject for r in made.report.results]
    assert {s.split("/")[1] for s in subjects} == {"onnx", "tflite", "coreml"}
    assert {r.subject for r in again.report.results} >= set(subjects)
    assert made.report.model.fingerprint == again.report.model.fingerprint
    assert differences(made.out, again.out, subjects) == []


@pytest.mark.parametrize("made", ["resnet20"], indirect=True)
def test_one_changed_byte_is_a_difference(made: Made, tmp_path: Path) -> None:
    subjects = [r.subject for r in made.report.results]
    copy = Path(shutil.copytree(made.out, tmp_path / "copy"))
    artifact = copy / made.report.results[0].artifact
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    assert differences(made.out, copy, subjects) == [f"{subjects[0]}: {artifact.name}"]
