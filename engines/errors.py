"""The two ways a command ends badly: the user can mend it (one line, no traceback), or it is our bug."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the fix; the command exits with 1."""
