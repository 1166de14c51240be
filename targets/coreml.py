"""Core ML, for iPhones, iPads and Macs; checked elsewhere by a reference executor of its programs."""

from pathlib import Path

from . import Job, Placement, Session


class CoreMLTarget:
    """A .mlpackage holding an ML program. See `targets.Target`.

    Interface: float32 and int32 only, so integer and bool inputs and outputs of other types become int32 (bool: 0 is
    false, all else true) and other floats float32.
    Weights: int8 codes per channel; 1 to 7 bits, groups and palettes where the system reads them, which raises the
    file's deployment target above the profile's where needed (`_coreml_weights.system_of`) and is named in the
    placement. 8-bit floats, 16-bit and dynamically quantized activations are refused.
    Numbers: `quantize` saturates at the ends of its type, so activations whose codes use less are refused; with
    float16 compute its scales are float16 too, and numbers below -65504 become -3e4 (see `finite_masks`).
    """

    suffix = ".mlpackage"

    def missing(self) -> str | None:
        """The pip command that brings coremltools, or None."""
        from importlib.util import find_spec

        return None if find_spec("coremltools") else "pip install 'tightfit[coreml]'"

    def lower(self, job: Job, path: Path) -> None:
        """Write the package. Raises TargetError where Core ML has no form, MissingRuntime without coremltools."""
        from ._coreml_convert import convert
        from ._coreml_package import feature_names, write

        wanted = [spec.name for spec in job.inputs] + list(job.outputs)
        features = feature_names(wanted)
        count = len(job.inputs)
        write(convert(job, features[:count], features[count:]), path, dict(zip(features, wanted, strict=True)))

    def placement(self, path: Path, job: Job) -> Placement:
        """Read the program back from disk and count what computes in int8 and what in float."""
        from ._coreml_placement import placement

        return placement(path, job)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """Core ML on a Mac; anywhere else the MIL reference executor, whose times say nothing about a device."""
        from ._coreml_session import open_session

        return open_session(path, threads)


TARGET = CoreMLTarget()
