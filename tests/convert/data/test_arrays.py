"""Reading .npz and .npy: what is yielded, what is cast, and what is refused."""

import os
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.samples import InputSpec
from convert.data import SampleSet, open_data, peek
from convert.data.source import CHUNK_BYTES, pieces, runs
from convert.errors import TightfitError

IMAGE = InputSpec("image", (1, 3, 4, 5), "float32")
TOKENS = InputSpec("input_ids", (1, 6), "int64")


def images(count: int = 40, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 4, 5)).astype(dtype)


def saved(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def opened(folder: Path, inputs: tuple[InputSpec, ...] = (IMAGE,), **arrays: np.ndarray) -> SampleSet:
    return open_data(saved(folder, **arrays), inputs, work=folder)


def refused(folder: Path, inputs: tuple[InputSpec, ...] = (IMAGE,), **arrays: np.ndarray) -> str:
    with pytest.raises(TightfitError) as caught:
        opened(folder, inputs, **arrays)
    return str(caught.value)


def whole(data: SampleSet, size: int = 7) -> dict[str, np.ndarray]:
    batches = list(data.batches(size))
    assert all(len(next(iter(b.values()))) == size for b in batches[:-1])
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def test_every_sample_comes_back_in_order_and_again(tmp_path: Path) -> None:
    array = images()
    data = opened(tmp_path, image=array)
    assert np.array_equal(whole(data)["image"], array)
    assert np.array_equal(whole(data, 40)["image"], array)
    assert data.notes == ()
    assert not data.synthetic
    assert data.preprocessing is None


def test_a_compressed_archive_reads_like_a_plain_one(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "packed.npz", image=images())
    packed = open_data(str(tmp_path / "packed.npz"), (IMAGE,), work=tmp_path)
    assert np.array_equal(whole(packed)["image"], images())
    assert packed.fingerprint == opened(tmp_path, image=images()).fingerprint


def test_the_fingerprint_knows_the_numbers_and_not_the_container(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", images())
    mapped = open_data(str(tmp_path / "data.npy"), (IMAGE,), work=tmp_path)
    archived = opened(tmp_path, image=images())
    assert mapped.fingerprint == archived.fingerprint
    changed = images()
    changed[-1, -1, -1, -1] += 1
    assert opened(tmp_path, image=changed).fingerprint != archived.fingerprint
    assert opened(tmp_path, image=images()[::-1]).fingerprint != archived.fingerprint


def test_the_fingerprint_knows_names_and_shapes(tmp_path: Path) -> None:
    flat = InputSpec("image", (1, 60), "float32")
    other = InputSpec("picture", (1, 3, 4, 5), "float32")
    prints = {
        opened(tmp_path, (IMAGE,), image=images()).fingerprint,
        opened(tmp_path, (flat,), image=images().reshape(-1, 60)).fingerprint,
        opened(tmp_path, (other,), picture=images()).fingerprint,
    }
    assert len(prints) == 3


def test_a_selection_has_the_fingerprint_of_its_own_samples(tmp_path: Path) -> None:
    chosen = np.array([0, 3, 4, 5, 39])
    part = opened(tmp_path, image=images(), y=np.arange(40)).select(chosen)
    assert np.array_equal(whole(part, 2)["image"], images()[chosen])
    assert part.labels is not None
    assert part.labels.tolist() == chosen.tolist()
    assert np.array_equal(whole(part.select(np.array([1, 4])))["image"], images()[[3, 39]])
    expected = part.fingerprint
    assert expected == opened(tmp_path, image=images()[chosen]).fingerprint


@pytest.mark.parametrize("bad", [[3, 1], [1, 1], [-1, 0], [0, 40]])
def test_a_selection_is_sorted_unique_and_within_the_set(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(ValueError, match="sorted, unique"):
        opened(tmp_path, image=images()).select(np.array(bad))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_runs_and_pieces_cover_exactly_the_indices(chosen: set[int], size: int) -> None:
    indices = np.array(sorted(chosen), np.int64)
    assert [i for piece in pieces(indices, size) for i in piece] == sorted(chosen)
    ranges = list(runs(indices))
    assert [i for start, stop in ranges for i in range(start, stop)] == sorted(chosen)
    assert all(later[0] > earlier[1] for earlier, later in pairwise(ranges))


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path, kind: str) -> None:
    """10 and 80 MB of zeros; what is allowed between them is one chunk, a twentieth of what holding them all takes."""
    spec = InputSpec("image", (1, 64, 64), "float32")
    few = peak_bytes(zeros(tmp_path, kind, 640), spec)
    many = peak_bytes(zeros(tmp_path, kind, 5_120), spec)
    assert abs(many - few) < CHUNK_BYTES


def test_the_measure_of_memory_sees_a_reader_that_keeps_everything(tmp_path: Path) -> None:
    spec = InputSpec("image", (1, 64, 64), "float32")
    source = zeros(tmp_path, "npy", 5_120)
    assert peak_bytes(source, spec, keep=True) - peak_bytes(source, spec) > 15 * CHUNK_BYTES


def zeros(folder: Path, kind: str, count: int) -> str:
    """A file of `count` samples [64, 64] float32, written sparsely (.npy) or compressed (.npz)."""
    path = folder / f"{count}.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (count, 64, 64)).flush()
    if kind == "npz":
        with zipfile.ZipFile(folder / f"{count}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(path, "image.npy")
        return str(folder / f"{count}.npz")
    return str(path)


def peak_bytes(source: str, spec: InputSpec, keep: bool = False) -> int:
    """The most memory that opening and reading once took at any time."""
    kept = []
    tracemalloc.start()
    try:
        data = open_data(source, (spec,), work=Path(source).parent)
        for batch in data.batches(8):
            kept = [*kept, batch] if keep else []
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_floats_are_cast_with_a_note(tmp_path: Path) -> None:
    data = opened(tmp_path, image=images(dtype="float64"))
    assert whole(data)["image"].dtype == np.float32
    assert data.notes == ("'image' is cast from float64 to float32",)
    assert opened(tmp_path, image=images(dtype="float16")).notes == ("'image' is cast from float16 to float32",)


def test_the_byte_order_of_a_file_changes_nothing(tmp_path: Path) -> None:
    little = opened(tmp_path, image=images()).fingerprint
    big = opened(tmp_path, image=images().astype(">f4"))
    assert whole(big)["image"].dtype == np.float32
    assert big.fingerprint == little


def test_integers_are_cast_with_a_note_and_only_where_they_fit(tmp_path: Path) -> None:
    tokens = np.arange(240).reshape(40, 6)
    data = opened(tmp_path, (TOKENS,), input_ids=tokens.astype(np.int32))
    assert whole(data)["input_ids"].dtype == np.int64
    assert data.notes == ("'input_ids' is cast from int32 to int64",)
    narrow = InputSpec("input_ids", (1, 6), "int32")
    assert np.array_equal(whole(opened(tmp_path, (narrow,), input_ids=tokens))["input_ids"], tokens)
    assert "do not fit int32" in refused(tmp_path, (narrow,), input_ids=tokens + 2**40)


def test_several_inputs_are_paired_by_name(tmp_path: Path) -> None:
    tokens = np.arange(240).reshape(40, 6)
    batch = next(opened(tmp_path, (IMAGE, TOKENS), input_ids=tokens, image=images()).batches(3))
    assert list(batch) == ["image", "input_ids"]
    assert np.array_equal(batch["input_ids"], tokens[:3])


@pytest.mark.parametrize("name", ["labels", "label", "y"])
def test_labels_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    data = opened(tmp_path, image=images(), **{name: np.arange(40, dtype=np.uint8)})
    assert data.labels is not None
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == list(range(40))


def test_an_input_called_y_is_no_label(tmp_path: Path) -> None:
    data = opened(tmp_path, (InputSpec("y", (1, 6), "int64"),), y=np.arange(240).reshape(40, 6))
    assert data.labels is None


def test_labels_can_be_named_or_lie_in_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, image=images(), species=np.arange(40))
    named = open_data(path, (IMAGE,), labels="species", work=tmp_path)
    np.save(tmp_path / "truth.npy", np.arange(40)[::-1])
    np.save(tmp_path / "data.npy", images())
    filed = open_data(str(tmp_path / "data.npy"), (IMAGE,), labels=str(tmp_path / "truth.npy"), work=tmp_path)
    assert named.labels is not None
    assert filed.labels is not None
    assert named.labels.tolist() == filed.labels.tolist()[::-1]
    with pytest.raises(TightfitError, match="no array of that name"):
        open_data(path, (IMAGE,), labels="breed", work=tmp_path)
    with pytest.raises(TightfitError, match=r"Did you mean .*truth\.npy"):
        open_data(path, (IMAGE,), labels=str(tmp_path / "truht.npy"), work=tmp_path)


def test_bad_labels_are_refused(tmp_path: Path) -> None:
    assert "'y' has 39" in refused(tmp_path, image=images(), y=np.arange(39))
    assert "float64" in refused(tmp_path, image=images(), y=np.arange(40.0))
    assert "samples of shape [10]" in refused(tmp_path, image=images(), y=np.zeros((40, 10), np.int64))
    assert "at sample 3" in refused(tmp_path, image=images(), y=np.array([0] * 3 + [-1] + [0] * 36))
    np.save(tmp_path / "short.npy", np.arange(7))
    with pytest.raises(TightfitError, match="are 7, the samples 40"):
        open_data(saved(tmp_path, image=images()), (IMAGE,), labels=str(tmp_path / "short.npy"), work=tmp_path)


def test_a_limit_spreads_over_the_whole_file(tmp_path: Path) -> None:
    path = saved(tmp_path, image=images(), y=np.repeat(np.arange(4), 10))
    data = open_data(path, (IMAGE,), limit=8, work=tmp_path)
    assert len(data) == 8
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_peek_gives_the_first_samples_by_the_names_of_the_data(tmp_path: Path) -> None:
    batch = peek(saved(tmp_path, picture=images(), y=np.arange(40)), work=tmp_path)
    assert list(batch) == ["picture"]
    assert np.array_equal(batch["picture"], images()[:4])
    np.save(tmp_path / "data.npy", images(1))
    assert peek(str(tmp_path / "data.npy"), work=tmp_path)[""].shape == (1, 3, 4, 5)


def test_without_a_model_the_names_and_dtypes_of_the_data_stand(tmp_path: Path) -> None:
    data = open_data(saved(tmp_path, picture=images(dtype="float64"), y=np.arange(40)), None, work=tmp_path)
    assert whole(data)["picture"].dtype == np.float64
    assert data.labels is not None


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    saved(tmp_path, image=images())
    with pytest.raises(TightfitError, match=r"Did you mean .*data\.npz"):
        open_data(str(tmp_path / "dta.npz"), (IMAGE,), work=tmp_path)
    with pytest.raises(TightfitError, match="nor does its folder"):
        open_data(str(tmp_path / "nowhere" / "data.npz"), (IMAGE,), work=tmp_path)
    with pytest.raises(TightfitError, match="--synthetic"):
        open_data("synthetic", (IMAGE,), work=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2\n")
    with pytest.raises(TightfitError, match="data is a"):
        open_data(str(tmp_path / "data.csv"), (IMAGE,), work=tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 60, 500, 5000])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, keep: int) -> None:
    np.save(tmp_path / "data.npy", images())
    path = Path(saved(tmp_path, image=images())) if kind == "npz" else tmp_path / "data.npy"
    os.truncate(path, keep)
    with pytest.raises(TightfitError, match=r"damaged|no \.npy file"):
        open_data(str(path), (IMAGE,), work=tmp_path)


@pytest.mark.parametrize("limit", [None, 2])
def test_a_flipped_byte_in_an_archive_is_noticed(tmp_path: Path, limit: int | None) -> None:
    path = Path(saved(tmp_path, image=images()))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(TightfitError, match="damaged"):
        open_data(str(path), (IMAGE,), limit=limit, work=tmp_path)


def test_a_header_that_promises_too_much_is_refused_before_any_memory_is_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", images())
    honest = (tmp_path / "data.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("image.npy", honest.replace(b"(40,", b"(99,"))
    with pytest.raises(TightfitError, match="should hold"):
        open_data(str(tmp_path / "data.npz"), (IMAGE,), work=tmp_path)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    objects = np.array([Bomb(str(tmp_path / "executed"))] * 2, dtype=object)
    np.save(tmp_path / "data.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "data.npz", allow_pickle=True, image=objects)
    with pytest.raises(TightfitError, match="Python objects"):
        open_data(str(tmp_path / f"data.{kind}"), (IMAGE,), work=tmp_path)
    assert not (tmp_path / "executed").exists()


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_an_archive_renamed_to_npy_says_so(tmp_path: Path) -> None:
    Path(saved(tmp_path, image=images())).rename(tmp_path / "data.npy")
    with pytest.raises(TightfitError, match=r"rename it to data\.npz"):
        open_data(str(tmp_path / "data.npy"), (IMAGE,), work=tmp_path)


def test_an_archive_with_other_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(TightfitError, match="which is no array"):
        open_data(str(tmp_path / "data.npz"), (IMAGE,), work=tmp_path)


def test_a_column_major_array_is_refused_with_the_way_out(tmp_path: Path) -> None:
    spec = InputSpec("x", (1, 3), "float32")
    array = np.asfortranarray(np.ones((40, 3), np.float32))
    assert "ascontiguousarray" in refused(tmp_path, (spec,), x=array)
    np.save(tmp_path / "data.npy", array)
    assert len(open_data(str(tmp_path / "data.npy"), (spec,), work=tmp_path)) == 40


def test_a_wrong_name_shows_both_sides_and_a_suggestion(tmp_path: Path) -> None:
    message = refused(tmp_path, imaeg=images(), y=np.arange(40))
    assert "The model's inputs are 'image'; the data has 'imaeg'." in message
    assert "Did you mean 'imaeg'?" in message


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    assert "no array for the input 'input_ids'" in refused(tmp_path, (IMAGE, TOKENS), image=images())


def test_an_array_that_feeds_nothing_is_refused(tmp_path: Path) -> None:
    assert "'extra', which feeds no input" in refused(tmp_path, image=images(), extra=images())


def test_an_unnamed_array_feeds_only_a_model_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", images())
    with pytest.raises(TightfitError, match="the model has 2 inputs"):
        open_data(str(tmp_path / "data.npy"), (IMAGE, TOKENS), work=tmp_path)


def test_a_wrong_shape_shows_both_and_guesses_the_layout(tmp_path: Path) -> None:
    message = refused(tmp_path, image=np.ascontiguousarray(images().transpose(0, 2, 3, 1)))
    assert "samples of shape [4, 5, 3]" in message
    assert "takes [3, 4, 5]" in message
    assert "transpose(0, 3, 1, 2)" in message
    last = InputSpec("image", (1, 4, 5, 3), "float32")
    assert "transpose(0, 2, 3, 1)" in refused(tmp_path, (last,), image=images())
    assert "guess" not in refused(tmp_path, image=np.ones((40, 7), np.float32))
    grey = InputSpec("image", (1, 1, 4, 5), "float32")
    assert "reshape(-1, 1, 4, 5)" in refused(tmp_path, (grey,), image=images()[:, 0])


def test_integers_for_a_float_input_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, image=np.zeros((40, 3, 4, 5), np.uint8))
    assert "is uint8" in message
    assert "normalise the data as in training" in message


def test_floats_for_an_integer_input_are_refused(tmp_path: Path) -> None:
    assert "astype('int64')" in refused(tmp_path, (TOKENS,), input_ids=np.ones((40, 6)))


def test_text_is_refused(tmp_path: Path) -> None:
    assert "Save it as float32" in refused(tmp_path, image=np.full((40, 3, 4, 5), "a"))


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    tokens = np.ones((39, 6), np.int64)
    assert "'image' has 40, 'input_ids' has 39" in refused(tmp_path, (IMAGE, TOKENS), image=images(), input_ids=tokens)


def test_an_empty_set_and_a_single_sample_are_refused(tmp_path: Path) -> None:
    assert "no samples" in refused(tmp_path, image=images(0))
    assert "one sample" in refused(tmp_path, image=images(1))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(TightfitError, match="the data has no arrays"):
        open_data(str(tmp_path / "none.npz"), (IMAGE,), work=tmp_path)


def test_a_small_set_carries_a_note(tmp_path: Path) -> None:
    assert "only 31 samples" in opened(tmp_path, image=images(31)).notes[0]
    assert opened(tmp_path, image=images(32)).notes == ()


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_a_number_that_is_none_is_named_with_its_sample(tmp_path: Path, value: float, word: str) -> None:
    array = images()
    array[17, 1, 2, 3] = value
    message = refused(tmp_path, image=array)
    assert f"the array 'image' holds {word}, first in sample 17" in message


def test_a_float64_beyond_float32_is_found(tmp_path: Path) -> None:
    array = images(dtype="float64")
    array[5] = 1e300
    assert "Inf, first in sample 5" in refused(tmp_path, image=array)


def test_negative_token_ids_are_refused(tmp_path: Path) -> None:
    tokens = np.ones((40, 6), np.int64)
    tokens[8, 2] = -100
    assert "negative numbers, first in sample 8" in refused(tmp_path, (TOKENS,), input_ids=tokens)
