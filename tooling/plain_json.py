"""Values as JSON has them."""

from __future__ import annotations

import math


def plain(value: object) -> object:
    """JSON has no NaN and no infinity: they are null, and tuples are lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
