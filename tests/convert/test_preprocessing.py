"""From an image to an array: each rule against plain arithmetic, and each bad field."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convert.errors import TightfitError
from convert.preprocessing import EXAMPLE, Preprocessing

RULE: dict[str, Any] = {"version": 1, "size": [4, 6], "resize": "none", "mean": [0.0] * 3, "std": [1.0] * 3}


def rule(**changes: Any) -> Preprocessing:
    return Preprocessing.from_dict(RULE | changes)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_scale_mean_and_std_apply_in_that_order() -> None:
    image = picture(4, 6)
    made = rule(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0]).apply(image)
    expected = (np.asarray(image) / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    # One rounding to float32 (6e-8), and another last bit of the float64 arithmetic before it.
    np.testing.assert_allclose(made, expected.transpose(2, 0, 1), rtol=1e-7, atol=1e-12)
    unscaled = rule(scale=1.0).apply(image)
    assert np.array_equal(unscaled, np.asarray(image).transpose(2, 0, 1))


def test_channels_and_layout() -> None:
    image = picture(4, 6)
    raw = np.asarray(image).astype(np.float32)
    assert np.array_equal(rule(scale=1.0, layout="NHWC").apply(image), raw)
    assert np.array_equal(rule(scale=1.0, layout="NHWC", channels="BGR").apply(image), raw[:, :, ::-1])
    grey = rule(scale=1.0, channels="L", mean=[0.0], std=[1.0])
    assert np.array_equal(grey.apply(image)[0], np.asarray(image.convert("L")))
    assert grey.shape == grey.apply(image).shape == (1, 4, 6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_eight_bit_image_becomes_rgb(mode: str) -> None:
    assert rule().apply(picture(4, 6).convert(mode)).shape == (3, 4, 6)


def test_sixteen_bit_images_are_refused_rather_than_clipped() -> None:
    deep = Image.fromarray(np.full((4, 6), 40_000, np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        rule().apply(deep)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["stretch", "shorter-side-crop", "letterbox"]),
    st.sampled_from(["bilinear", "bicubic", "nearest", "lanczos"]),
)
def test_every_image_gets_the_size_asked_for(height: int, width: int, resize: str, interpolation: str) -> None:
    made = rule(resize=resize, interpolation=interpolation).apply(picture(height, width))
    assert made.shape == (3, 4, 6)
    assert np.isfinite(made).all()


def test_the_crop_is_the_centre() -> None:
    image = picture(4, 12)
    made = rule(resize="shorter-side-crop", scale=1.0, layout="NHWC").apply(image)
    assert np.array_equal(made, np.asarray(image)[:, 3:9])


def test_the_shorter_side_is_resized_before_the_crop() -> None:
    image = picture(16, 32)
    made = rule(resize="shorter-side-crop", shorter_side=8, scale=1.0, layout="NHWC").apply(image)
    small = np.asarray(image.resize((16, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(made, small[2:6, 5:11])


def test_a_letterbox_keeps_proportions_and_pads() -> None:
    image = picture(4, 4)
    made = rule(resize="letterbox", scale=1.0, layout="NHWC", pad=114).apply(image)
    assert np.array_equal(made[:, 1:5], np.asarray(image))
    assert (made[:, [0, 5]] == 114).all()


def test_stretch_is_pillows_resize() -> None:
    image = picture(9, 7)
    made = rule(resize="stretch", scale=1.0, layout="NHWC", interpolation="bicubic").apply(image)
    assert np.array_equal(made, np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC)))


def test_it_survives_the_way_through_json() -> None:
    made = rule(resize="letterbox", pad=3)
    assert Preprocessing.from_dict(made.to_dict()) == made
    assert Preprocessing.from_dict(made.to_dict()).fingerprint == made.fingerprint


@pytest.mark.parametrize("change", [{"size": [6, 4]}, {"std": [1.0, 1.0, 2.0]}, {"channels": "BGR"}, {"scale": 1.0}])
def test_the_fingerprint_knows_every_field(change: dict[str, Any]) -> None:
    assert rule(**change).fingerprint != rule().fingerprint


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        rule().pad = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resize": "crop"}, "field 'resize'"),
        ({"size": [0, 6]}, "field 'size.0'"),
        ({"size": [4]}, "field 'size.1'"),
        ({"std": [1.0, 1.0, 0.0]}, "field 'std': must be above zero"),
        ({"std": [1.0]}, "field 'std': needs 3 numbers"),
        ({"mean": [0.0, 0.0, float("nan")]}, "field 'mean': must be finite"),
        ({"channels": "L"}, "field 'mean': needs 1 numbers for channels = L, has 3"),
        ({"scale": -1.0}, "field 'scale'"),
        ({"version": 2}, "field 'version'"),
        ({"shorter_side": 8}, "field 'shorter_side': has no meaning"),
        ({"resize": "shorter-side-crop", "shorter_side": 5}, "does not cover size"),
        ({"interplation": "nearest"}, "did you mean 'interpolation'?"),
        ({"flavour": "sweet"}, "field 'flavour': is unknown; there are version"),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(TightfitError) as caught:
        Preprocessing.from_dict(RULE | change, "mine.toml")
    assert str(caught.value).startswith("mine.toml: field ")
    assert words in str(caught.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TightfitError, match="field 'mean'"):
        Preprocessing.from_dict({key: value for key, value in RULE.items() if key != "mean"})


def test_files_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.toml"
    with pytest.raises(TightfitError, match="is missing"):
        Preprocessing.load(path)
    path.write_text("size = [")
    with pytest.raises(TightfitError, match=r"preprocessing\.toml: this is no TOML"):
        Preprocessing.load(path)
    path.write_text(EXAMPLE)
    assert Preprocessing.load(path).shorter_side == 256
