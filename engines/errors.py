"""The two ways a command ends badly: the user can mend it (one line, no traceback), or it is our bug."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the fix; the command exits with 1."""


def last_line(error: Exception) -> str:
    """The last line of what a backend says, where the reason stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
