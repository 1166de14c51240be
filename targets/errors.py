"""What lowering and running raise."""


class TargetError(RuntimeError):
    """A graph cannot be lowered to, or an artifact run by, a target; the message says why and what to do."""


class MissingRuntime(TargetError):
    """A converter or runtime is not installed; the message names the command that brings it."""
