"""What settings of a configuration must be, wherever they are read."""

from __future__ import annotations


def is_size(value: object) -> bool:
    """A whole number from 1 on, and no bool, which Python counts as one."""
    return type(value) is int and 0 < value < 2**31
