"""Makes the encoders of tests/calibrate importable in the tests of this folder, to be lowered."""

import sys
from pathlib import Path

CALIBRATE = Path(__file__).resolve().parents[1] / "calibrate"
sys.path += [str(CALIBRATE), str(CALIBRATE / "tokens")]
