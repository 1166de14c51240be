"""Makes the small encoders with masks importable here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tokens"))
