"""The project's own exceptions: each carries the message for the user and an exit code.

They are raised where the fault is found and turned into an exit code only by ``command.run``.
A message says what is wrong and where; a hint says what to do next.
"""

from typing import Any


class SFTError(Exception):
    """Something the user must be told, in one clear message and without a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker's error comes to its parent whole; Exception's own way would drop the hint."""
        return type(self), (self.message, self.hint), {"exit_code": self.exit_code}


class UserError(SFTError):
    """The user's config, data or arguments (exit 2)."""

    exit_code = 2


class RefusedError(SFTError):
    """Refused for safety: resume protection, a lock, damaged or unsafe files (exit 3)."""

    exit_code = 3


class MachineError(SFTError):
    """This machine cannot do it: GPU, package, disk space, model, network (exit 4)."""

    exit_code = 4


class DivergedError(SFTError):
    """Training diverged: the loss is no longer a finite number (exit 5)."""

    exit_code = 5


class Interrupted(SFTError):
    """Stopped by a signal after the state was saved (exit 130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
