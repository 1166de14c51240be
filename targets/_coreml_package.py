"""Write a .mlpackage so that the same program gives the same bytes.

coremltools names the items of Manifest.json by random UUIDs, dates the model, orders protobuf maps by chance, and may
add a debugging file with source locations; none of that reaches the disk here.
"""

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

MODEL = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
_NAMES = "tightfit.names"
_VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def feature_names(wanted: list[str]) -> list[str]:
    """Names that Core ML takes for features: letters, digits and underscores, no digit first, all different."""
    names: list[str] = []
    for name in wanted:
        plain = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
        plain = f"_{plain}" if plain[0].isdigit() else plain
        while plain in names:
            plain += "_"
        names.append(plain)
    return names


def write(model: Any, path: Path, names: dict[str, str]) -> None:
    """Write coremltools' MLModel as a package beside `path`, then put it in its place.

    `names` (feature -> the job's name) is stored with the model where the two differ. A package that stands at
    `path` is replaced; a failure leaves it as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        _fill(model, partial, names)
        if path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(model: Any, folder: Path, names: dict[str, str]) -> None:
    data = folder / "Data"
    (data / MODEL).parent.mkdir(parents=True)
    spec = model.get_spec()
    _settle_metadata(spec, names)
    (data / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    source = Path(model.weights_dir) if model.weights_dir else None
    files = sorted(source.iterdir()) if source and source.is_dir() else []
    if files:
        (data / WEIGHTS).mkdir()
    for file in files:
        shutil.copyfile(file, data / WEIGHTS / file.name)
    (folder / "Manifest.json").write_text(_manifest(weights=bool(files)), encoding="utf-8")


def _settle_metadata(spec: Any, names: dict[str, str]) -> None:
    defined = spec.description.metadata.userDefined
    for key in _VOLATILE:
        defined.pop(key, None)
    changed = {feature: name for feature, name in names.items() if feature != name}
    if changed:
        defined[_NAMES] = json.dumps(changed, sort_keys=True)


def stored_names(spec: Any) -> dict[str, str]:
    """feature -> the job's name, of the features that could not bear it; read from the model's metadata."""
    return dict(json.loads(spec.description.metadata.userDefined.get(_NAMES, "{}")))


def _manifest(*, weights: bool) -> str:
    """Manifest.json with item identifiers that follow from their paths."""
    items = [(MODEL, "model.mlmodel", "CoreML Model Specification")]
    if weights:
        items.append((WEIGHTS, "weights", "CoreML Model Weights"))
    entries = {
        _identifier(path): {"author": "com.apple.CoreML", "description": text, "name": name, "path": path}
        for path, name, text in items
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": _identifier(MODEL)}
    return json.dumps(manifest, indent=4, sort_keys=True) + "\n"


def _identifier(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()
