"""Compiles calibrate/hamming_search.c with this machine's C compiler and calls it from numpy."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from calibrate.packed_codes import KERNEL, inverse_norms

Found = tuple[np.ndarray, np.ndarray]
WORDS = {"__AVX512VPOPCNTDQ__": "AVX-512 VPOPCNTDQ", "__AVX2__": "AVX2", "__POPCNT__": "POPCNT", "__ARM_NEON": "NEON"}
FLAGS = ("-std=c99", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compiler() -> str | None:
    """CC, or the first of cc, gcc and clang that there is."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)


def compiled(folder: Path, *flags: str) -> tuple[Callable[..., Found], str]:
    """`kernel(queries, base, k, planes, norms)` like `packed_codes.search`, and the words for its instructions.

    `flags`: instead of -march=native. Raises FileNotFoundError where there is no compiler.
    """
    command = compiler()
    if command is None:
        raise FileNotFoundError("there is no C compiler: install one, or name it in CC")
    chosen = flags or ("-march=native",)
    library = folder / f"hamming_search_{'_'.join(chosen)}.so"
    subprocess.run([command, *FLAGS, *chosen, str(KERNEL), "-o", str(library)], check=True)
    macros = subprocess.run(
        [command, *chosen, "-dM", "-E", "-x", "c", os.devnull], check=True, capture_output=True, text=True
    ).stdout
    words = ", ".join(word for macro, word in WORDS.items() if f"#define {macro} " in macros) or "portable C"
    function = ctypes.CDLL(str(library)).hamming_search
    function.restype = None

    def kernel(
        queries: np.ndarray, base: np.ndarray, k: int, planes: int = 1, norms: np.ndarray | None = None
    ) -> Found:
        queries, base = np.ascontiguousarray(queries), np.ascontiguousarray(base)
        norms = inverse_norms(base, planes) if norms is None else norms
        index, score = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
        pointer, size = (lambda a: a.ctypes.data_as(ctypes.c_void_p)), ctypes.c_size_t
        function(
            *(pointer(queries), size(len(queries)), pointer(base), pointer(norms), size(len(base))),
            *(size(base.shape[1] // planes), ctypes.c_int(planes), size(k), pointer(index), pointer(score)),
        )
        return index, score

    return kernel, words
