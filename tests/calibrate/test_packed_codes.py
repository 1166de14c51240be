"""Codes as bits: packing, exact search beside brute force, and the C kernel beside both."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calibrate.errors import CalibrationError
from calibrate.packed_codes import neighbours, pack, recall, search, unpack

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def codes(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (rows, columns)) * 2 - 1


def likeness(queries: np.ndarray, base: np.ndarray, planes: int) -> np.ndarray:
    """Cosines, times the queries' lengths, of the vectors that the planes stand for, by float products."""
    weights = 0.5 ** np.repeat(np.arange(planes), base.shape[1] // planes)
    folded = [(c * weights).reshape(len(c), planes, -1).sum(1) for c in (queries, base)]
    return folded[0] @ folded[1].T / np.linalg.norm(folded[1], axis=1)


@given(arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda n: 8 * n))))
@settings(deadline=None)
def test_what_is_packed_comes_back(bits: np.ndarray) -> None:
    wanted = bits.astype(np.int8) * 2 - 1
    packed = pack(wanted.astype(np.float32))
    assert packed.shape == (len(bits), bits.shape[1] // 8)
    assert np.array_equal(unpack(packed), wanted)


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=60)
def test_search_finds_what_brute_force_finds(seed: int, k: int, width: int, planes: int) -> None:
    base, queries = codes(40, 8 * width * planes, seed), codes(5, 8 * width * planes, seed + 1)
    base[20:30] = base[:10]  # ties
    found, scores = search(pack(queries), pack(base), k, planes)
    wanted = likeness(queries, base, planes)
    # Different codes may have scores that are equal but for the last bit of a square root: either may come first.
    assert np.allclose(np.take_along_axis(wanted, found, 1), -np.sort(-wanted, axis=1)[:, :k], rtol=0, atol=1e-9)
    assert all(len(set(row)) == k for row in found.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    for row in found.tolist():  # of codes that are the same, the lower index
        assert all(place - 20 in row[: row.index(place)] for place in row if 20 <= place < 30)


def test_a_score_of_one_plane_is_bits_less_twice_the_hamming_distance() -> None:
    base, queries = codes(9, 24), codes(2, 24, 1)
    found, scores = search(pack(queries), pack(base), 9)
    apart = (queries[:, None] != base[None]).sum(2)
    assert np.array_equal(scores, 24 - 2 * np.take_along_axis(apart, found, 1))


def test_a_search_in_blocks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pack(codes(50, 64))
    whole = search(base, base, 5)
    monkeypatch.setattr("calibrate.packed_codes.BLOCK_BYTES", 1)
    assert all(np.array_equal(a, b) for a, b in zip(whole, search(base, base, 5), strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable]:
    """The kernel by compiler flags, each compiled once; skips where it cannot be compiled or run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import packed_kernel
    if packed_kernel.compiler() is None:
        pytest.skip("there is no C compiler")
    folder, made = tmp_path_factory.mktemp("kernels"), dict[tuple[str, ...], Callable]()
    cpu = Path("/proc/cpuinfo")

    def kernel(flags: tuple[str, ...]) -> Callable:
        if any(f.startswith("-m") and f != "-march=native" for f in flags) and (
            not cpu.exists() or " avx2 " not in cpu.read_text()
        ):
            pytest.skip("this machine has no AVX2")
        if flags not in made:
            made[flags], _ = packed_kernel.compiled(folder, *flags)
        return made[flags]

    return kernel


@pytest.mark.parametrize("flags", [("-O1",), ("-mpopcnt",), ("-mavx2", "-mpopcnt"), ("-march=native",)], ids=str)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", [8, 96, 384, 1064])  # less than a word, words, and more than the vectors start from
def test_the_c_kernel_finds_the_same_as_numpy(
    compiled: Callable[..., Callable], flags: tuple[str, ...], planes: int, bits: int
) -> None:
    kernel = compiled(flags)
    base, queries = pack(codes(60, bits * planes)), pack(codes(7, bits * planes, 1))
    base[30:40] = base[:10]
    wanted = search(queries, base, 12, planes)
    assert all(np.array_equal(a, b) for a, b in zip(kernel(queries, base, 12, planes), wanted, strict=True))


def test_neighbours_and_recall_are_those_of_cosine() -> None:
    base = np.array([[1.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    found = neighbours(np.array([[2.0, 0.1]]), base, 2)
    assert found.tolist() == [[0, 2]]
    assert recall(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]])) == 0.75


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pack(np.ones((2, 12))), "multiple of 8"),
        (lambda: pack(np.zeros((2, 8))), r"\+1 and -1 alone"),
        (lambda: pack(np.full((2, 8), np.nan)), r"\+1 and -1 alone"),
        (lambda: search(pack(codes(1, 8)), pack(codes(3, 16)), 1), "cannot be searched among codes of 2 bytes"),
        (lambda: search(pack(codes(1, 24)), pack(codes(3, 24)), 1, 2), "in 2 planes"),
        (lambda: search(pack(codes(1, 8)), pack(codes(3, 8)), 4), "give 1 to 3"),
        (lambda: search(codes(1, 8), pack(codes(3, 8)), 1), "use pack"),
    ],
)
def test_what_cannot_be_is_refused(call, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        call()
