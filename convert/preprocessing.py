"""From an image to the array a model was trained on: one object, used for calibration, evaluation and on the device."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from convert.errors import TightfitError

if TYPE_CHECKING:
    from PIL.Image import Image

FILE_NAME = "preprocessing.toml"

EXAMPLE = """\
version = 1
size = [224, 224]               # height, width of the model's input
resize = "shorter-side-crop"    # or "stretch", "letterbox", "none"
shorter_side = 256              # only for shorter-side-crop; without it the image just covers `size`
interpolation = "bilinear"      # or "bicubic", "nearest", "lanczos"
channels = "RGB"                # or "BGR", "L" (grey)
scale = 0.00392156862745098     # what 0..255 is multiplied with first; 1/255 when left out
mean = [0.485, 0.456, 0.406]    # subtracted after scaling, one per channel
std = [0.229, 0.224, 0.225]     # divided by last, one per channel
layout = "NCHW"                 # or "NHWC"
"""

Side = Annotated[int, Field(gt=0, le=16384)]


class Preprocessing(BaseModel):
    """How an image becomes an input: convert channels, resize, scale, (x - mean) / std, lay out.

    Resizing is Pillow's, which low-passes when it shrinks (torchvision's `antialias=True`). Orientation tags are not
    applied, as in torchvision. "shorter-side-crop" and "letterbox" keep the centre; `pad` (0..255) fills a letterbox.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    size: tuple[Side, Side]
    resize: Literal["none", "stretch", "shorter-side-crop", "letterbox"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter_side: Side | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    channels: Literal["RGB", "BGR", "L"] = "RGB"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0 / 255.0
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    pad: Annotated[int, Field(ge=0, le=255)] = 0

    @model_validator(mode="after")
    def _fits_channels(self) -> Self:
        count = 1 if self.channels == "L" else 3
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) != count:
                raise ValueError(f"'{field}': needs {count} numbers for channels = {self.channels}, has {len(values)}")
            if not np.isfinite(values).all():
                raise ValueError(f"'{field}': must be finite numbers")
        if min(self.std) <= 0:
            raise ValueError("'std': must be above zero")
        if self.shorter_side is not None and self.resize != "shorter-side-crop":
            raise ValueError(f"'shorter_side': has no meaning with resize = {self.resize}")
        if self.shorter_side is not None and self.shorter_side < max(self.size):
            raise ValueError(f"'shorter_side': {self.shorter_side} does not cover size {list(self.size)}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one sample."""
        channels = len(self.mean)
        return (channels, *self.size) if self.layout == "NCHW" else (*self.size, channels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON has it; `from_dict` takes it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "preprocessing") -> Self:
        """Check and build; `source` names the file in the TightfitError that a bad field raises."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise TightfitError(f"{source}: {_first_problem(error)}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file. Raises TightfitError naming file and field."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TightfitError(missing(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TightfitError(f"{path}: this is no TOML ({error}).") from error
        return cls.from_dict(values, str(path))

    def apply(self, image: "Image") -> NDArray[np.float32]:
        """Turn an opened image into one sample of `shape`. Raises ValueError when the image does not fit the rule."""
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"has {image.mode} pixels (more than 8 bits); convert it to 8 bits first")
        pixels = np.asarray(self._resized(image.convert("L" if self.channels == "L" else "RGB")))
        if self.channels == "L":
            pixels = pixels[:, :, None]
        elif self.channels == "BGR":
            pixels = pixels[:, :, ::-1]
        # float64 until the end: one rounding, so that the order of operations leaves no trace in the result.
        values = (pixels.astype(np.float64) * self.scale - np.asarray(self.mean)) / np.asarray(self.std)
        if self.layout == "NCHW":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values, dtype=np.float32)

    def _resized(self, image: "Image") -> "Image":
        height, width = self.size
        if self.resize == "none":
            if image.size != (width, height):
                raise ValueError(
                    f'is {image.height}x{image.width}, and resize = "none" wants {height}x{width} (height x width)'
                )
            return image
        if self.resize == "stretch":
            return self._scaled(image, height, width)
        if self.resize == "letterbox":
            return self._letterboxed(image)
        large = self._scaled(image, *self._covering(image))
        top, left = round((large.height - height) / 2.0), round((large.width - width) / 2.0)
        return large.crop((left, top, left + width, top + height))

    def _covering(self, image: "Image") -> tuple[int, int]:
        """(height, width) to resize to before the crop: torchvision's rule where `shorter_side` is given."""
        if self.shorter_side is None:
            factor = max(self.size[0] / image.height, self.size[1] / image.width)
            return max(self.size[0], round(image.height * factor)), max(self.size[1], round(image.width * factor))
        longer = int(self.shorter_side * max(image.size) / min(image.size))
        return (self.shorter_side, longer) if image.height <= image.width else (longer, self.shorter_side)

    def _letterboxed(self, image: "Image") -> "Image":
        from PIL import Image as images

        height, width = self.size
        factor = min(height / image.height, width / image.width)
        inner = self._scaled(image, max(1, round(image.height * factor)), max(1, round(image.width * factor)))
        fill: Any = self.pad if image.mode == "L" else (self.pad,) * 3
        canvas = images.new(image.mode, (width, height), fill)
        canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
        return canvas

    def _scaled(self, image: "Image", height: int, width: int) -> "Image":
        from PIL import Image as images

        return image.resize((width, height), images.Resampling[self.interpolation.upper()])


def missing(path: Path) -> str:
    """The paragraph for images without a preprocessing file; shows a complete one."""
    return (
        f"{path} is missing. Images need one: it says how they become the model's input, exactly as in training. "
        f"A complete file, here for the usual ImageNet models:\n\n{EXAMPLE}"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(field, Preprocessing.model_fields, 1, cutoff=0.7)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(Preprocessing.model_fields)}"
        return f"field '{field}': is unknown{hint}"
    return f"field '{field}': {message}" if field else f"field {message}"
