"""What the tests of networks that hear share: noise, and peers that are here or not."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
from numpy.typing import NDArray

RATE = 44100


def noise(seed: int = 0, seconds: float = 3.0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal((2, round(RATE * seconds)))).astype(np.float32)


def installed(package: str, install: str) -> None:
    """Missing, it skips at home and fails in CI."""
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is not here: {install}")
