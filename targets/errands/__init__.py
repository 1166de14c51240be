"""What is asked of the agent on a device, and what comes back: the host's side."""

from .carry import carry_out
from .nouns import Answer, Errand, FileAnswer, Timing

__all__ = ["Answer", "Errand", "FileAnswer", "Timing", "carry_out"]
