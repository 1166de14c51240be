"""A folder of images with a preprocessing file; names of sub-folders, sorted, are the classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibrate.samples import Array, Batch
from convert.data.source import UNNAMED, Column, Indices, pieces
from convert.errors import TightfitError
from convert.preprocessing import FILE_NAME, Preprocessing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class ImageSource:
    """Images sorted by path, decoded when they are read. One unnamed column."""

    def __init__(self, folder: Path, preprocessing: Preprocessing) -> None:
        self.name = str(folder)
        self.preprocessing: Preprocessing | None = preprocessing
        self._rule = preprocessing
        self._files, self.labels = _listed(folder)
        column = Column(np.dtype("float32"), preprocessing.shape, len(self._files))
        self.columns = {UNNAMED: column}

    def read(self, names: Sequence[str], indices: Indices, size: int) -> Iterator[Batch]:
        for piece in pieces(indices, size):
            samples = [self._sample(self._files[i]) for i in piece]
            yield {name: np.stack(samples) for name in names}

    def _sample(self, path: Path) -> Array:
        from PIL import Image

        try:
            with Image.open(path) as image:
                image.load()
                return self._rule.apply(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise TightfitError(
                f"the image {path} {_reason(error)}. Replace it or take it out of the folder."
            ) from error


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"cannot be read: it is damaged or no image ({error})"


def _listed(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None]:
    """All images, and class indices when they lie in sub-folders."""
    loose = _images(folder.iterdir())
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = [_images(name.rglob("*")) for name in classes]
    if loose and any(by_class):
        raise TightfitError(
            f"{folder} holds images ({loose[0].name}, ...) beside folders of images ({classes[0].name}, ...). "
            "Folders are classes: put every image into one, or keep all images in one folder without classes."
        )
    if any(by_class):
        labels = np.repeat(np.arange(len(classes)), [len(files) for files in by_class]).astype(np.int64)
        return [path for files in by_class for path in files], labels
    return loose, None


def _images(paths: Iterator[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def open_images(folder: Path, preprocessing: Preprocessing | Path | None) -> ImageSource:
    """The images of `folder`; without `preprocessing`, `folder/preprocessing.toml` is read."""
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.load(preprocessing or folder / FILE_NAME)
    return ImageSource(folder, preprocessing)
