"""What `tightfit demo` works on: two small trained models and scikit-learn's handwritten digits.

`benchmarks/train_demo.py` wrote every file here but the code. `accuracy.json` holds what it measured.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
DIGITS = FOLDER / "digits.npz"
ACCURACY = FOLDER / "accuracy.json"
MODELS = ("digits_cnn", "digits_vit")
SIDE = 32


def factory(model: str) -> str:
    """The `module:function` of one of `MODELS`; importable where `FOLDER` is on the child's PYTHONPATH."""
    return f"demo_models:{model}"


def weights(model: str) -> Path:
    """The safetensors file of one of `MODELS`."""
    return FOLDER / f"{model}.safetensors"


def digits_arrays(kind: Literal["train", "test"]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (images [N, 1, 32, 32] float32 in [-1, 1], labels [N] int64) of one part of the digits.

    "train" is what the models were trained on, and calibration data; "test" they never saw.
    """
    with np.load(DIGITS, allow_pickle=False) as arrays:
        return to_input(arrays[f"{kind}_images"]), arrays[f"{kind}_labels"].astype(np.int64)


def to_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale images [N, 8, 8] with values 0..16 to [-1, 1] and enlarge them to [N, 1, 32, 32], bilinear.

    Exact in float32 on every machine: all weights are multiples of 1/8 and all pixels multiples of 1/8.
    """
    rows = _upsampling(images.shape[-1], SIDE)
    large = rows @ (images.astype(np.float64) / 8.0 - 1.0) @ rows.T
    return large.astype(np.float32)[:, None]


def _upsampling(small: int, large: int) -> NDArray[np.float64]:
    """The matrix [large, small] of bilinear interpolation with half-pixel centres, edges repeated."""
    centres = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    return np.asarray(np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(small)[None, :])))
