"""The error of this room."""


class ProfileError(ValueError):
    """There is no such device profile, or a file is wrong: names file, line, field and the next step."""
