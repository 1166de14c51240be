"""The one family of errors a user can cause; the CLI prints them as a paragraph and exits with `exit_code`."""

from collections.abc import Iterator
from contextlib import contextmanager


class TightfitError(Exception):
    """Bad input or usage: what failed, on what, and the next step. Exit code 2."""

    exit_code = 2


class MissingDependency(TightfitError):
    """The environment lacks something; the message names the command that brings it. Exit code 3."""

    exit_code = 3


@contextmanager
def user_errors(context: str = "") -> Iterator[None]:
    """Turn what the lower rooms raise into the family above, with `context` in front."""
    from calibrate.errors import CalibrationError
    from device_profiles import ProfileError
    from targets.errors import MissingRuntime, TargetError

    prefix = f"{context}: " if context else ""
    try:
        yield
    except MissingRuntime as error:
        raise MissingDependency(f"{prefix}{error}") from error
    except (CalibrationError, ProfileError, TargetError) as error:
        raise TightfitError(f"{prefix}{error}") from error
