"""What calibration and graph work raise when the user's model or data is at fault."""


class CalibrationError(ValueError):
    """The model or the samples do not allow what was asked; the message names the cause and the next step."""
