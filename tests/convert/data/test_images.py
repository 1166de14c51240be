"""Reading folders of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibrate.samples import InputSpec
from convert.data import open_data, peek
from convert.errors import TightfitError
from convert.preprocessing import Preprocessing

SPEC = InputSpec("pixels", (1, 3, 8, 6), "float32")
RULE = {"version": 1, "size": [8, 6], "resize": "none", "mean": [0.5] * 3, "std": [0.25] * 3}
TOML = 'version = 1\nsize = [8, 6]\nresize = "none"\nmean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\n'


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 6, 3), np.uint8)


def drawn(folder: Path, count: int = 3, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(pixels(number)).save(folder / f"{number}.{suffix}", lossless=True)
    return folder


def test_images_come_sorted_and_preprocessed(tmp_path: Path) -> None:
    drawn(tmp_path)
    (tmp_path / "preprocessing.toml").write_text(TOML)
    data = open_data(str(tmp_path), (SPEC,), work=tmp_path)
    batch = next(data.batches(3))["pixels"]
    expected = (np.stack([pixels(i) for i in range(3)]).transpose(0, 3, 1, 2) / 255.0 - 0.5) / 0.25
    np.testing.assert_allclose(batch, expected, rtol=1e-6, atol=1e-6)  # one float32 rounding
    assert data.labels is None
    assert data.preprocessing == Preprocessing.from_dict(RULE)


def test_the_fingerprint_is_that_of_the_arrays_the_images_become(tmp_path: Path) -> None:
    rule = Preprocessing.from_dict(RULE)
    data = open_data(str(drawn(tmp_path / "images")), (SPEC,), work=tmp_path, preprocessing=rule)
    np.save(tmp_path / "same.npy", next(data.batches(3))["pixels"])
    assert open_data(str(tmp_path / "same.npy"), (SPEC,), work=tmp_path).fingerprint == data.fingerprint


@pytest.mark.parametrize("suffix", ["bmp", "webp", "PNG", "jpg"])
def test_the_usual_formats_are_read(tmp_path: Path, suffix: str) -> None:
    rule = Preprocessing.from_dict(RULE)
    data = open_data(str(drawn(tmp_path / "images", suffix=suffix)), (SPEC,), work=tmp_path, preprocessing=rule)
    assert len(data) == 3


def test_sub_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("ant", 3), ("bee", 1)):
        drawn(tmp_path / name, count)
    (tmp_path / "preprocessing.toml").write_text(TOML)
    (tmp_path / ".hidden").mkdir()
    data = open_data(str(tmp_path), (SPEC,), work=tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 2, 2]


def test_a_mixture_of_loose_and_sorted_images_is_refused(tmp_path: Path) -> None:
    drawn(drawn(tmp_path) / "cat")
    (tmp_path / "preprocessing.toml").write_text(TOML)
    with pytest.raises(TightfitError, match="Folders are classes"):
        open_data(str(tmp_path), (SPEC,), work=tmp_path)


def test_a_missing_preprocessing_file_is_answered_with_a_complete_one(tmp_path: Path) -> None:
    drawn(tmp_path)
    with pytest.raises(TightfitError) as caught:
        open_data(str(tmp_path), (SPEC,), work=tmp_path)
    example = str(caught.value).partition("\n\n")[2]
    (tmp_path / "preprocessing.toml").write_text(example)
    assert Preprocessing.load(tmp_path / "preprocessing.toml").size == (224, 224)


def test_a_preprocessing_file_can_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TOML)
    folder = str(drawn(tmp_path / "images"))
    assert peek(folder, work=tmp_path, preprocessing=tmp_path / "mine.toml")[""].shape == (3, 3, 8, 6)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    drawn(tmp_path)
    (tmp_path / "preprocessing.toml").write_text(TOML)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TightfitError, match=r"the image .*1\.png cannot be read"):
        open_data(str(tmp_path), (SPEC,), work=tmp_path)
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(TightfitError, match=r"the image .*1\.png cannot be read"):
        open_data(str(tmp_path), (SPEC,), work=tmp_path)


def test_an_image_of_another_size_is_named_when_nothing_may_resize_it(tmp_path: Path) -> None:
    drawn(tmp_path)
    (tmp_path / "preprocessing.toml").write_text(TOML.replace("[8, 6]", "[6, 8]"))
    spec = InputSpec("pixels", (1, 3, 6, 8), "float32")
    with pytest.raises(TightfitError, match=r"0\.png is 8x6, and resize = \"none\" wants 6x8"):
        open_data(str(tmp_path), (spec,), work=tmp_path)


def test_a_layout_the_model_does_not_take_is_mended_in_the_preprocessing_file(tmp_path: Path) -> None:
    drawn(tmp_path)
    (tmp_path / "preprocessing.toml").write_text(TOML + 'layout = "NHWC"\n')
    with pytest.raises(TightfitError, match='write layout = "NCHW" in the preprocessing file'):
        open_data(str(tmp_path), (SPEC,), work=tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessing.toml").write_text(TOML)
    with pytest.raises(TightfitError, match="no samples"):
        open_data(str(tmp_path), (SPEC,), work=tmp_path)
