"""What the CPU can do, as far as Linux tells."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's flags, as /proc/cpuinfo has them; none where nothing tells."""
    try:
        return frozenset(_flags(CPUINFO.read_text("utf-8", "replace")) or ())
    except OSError:
        return frozenset()


def _flags(cpuinfo: str) -> list[str] | None:
    """Of the text of /proc/cpuinfo; None where it has no such line (not an x86 CPU)."""
    return next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), None)


def has_vnni() -> bool:
    """Whether the CPU says that it adds int8 products in 32 bits; False where nothing tells.

    Without VNNI, x86 adds pairs of uint8 x int8 products in 16 bits first, which overflow.
    """
    return _vnni() is True


def lacks_vnni() -> bool:
    """Whether it is an x86 CPU that says what it has, and has no VNNI; False where nothing tells."""
    return _vnni() is False


@cache
def _vnni() -> bool | None:
    try:
        return vnni_in(CPUINFO.read_text("utf-8", "replace"))
    except OSError:
        return None


def vnni_in(cpuinfo: str) -> bool | None:
    """Whether the text of /proc/cpuinfo names VNNI among the flags; None where it has none (not an x86 CPU)."""
    flags = _flags(cpuinfo)
    return None if flags is None else not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)
