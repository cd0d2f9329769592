"""TensorRT-RTX compiles a plan's kernels where it runs: they are kept beside the plan for the next process."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from .home import keep

_SUFFIX = ".kernels"


class KernelCache:
    """The runtime cache of one execution context. folder: where it is kept; None: nowhere.

    TensorRT-RTX itself refuses what another version, GPU or driver compiled; such a file is replaced.
    """

    def __init__(self, config: Any, folder: Path | None):
        self._folder = folder
        self._cache = config.create_runtime_cache()
        self.loaded = any(self._cache.deserialize(file.read_bytes()) for file in self._files())
        config.set_runtime_cache(self._cache)

    def _files(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(f"*{_SUFFIX}"))

    @property
    def wanted(self) -> bool:
        """Whether there is a place for it and nothing in it yet."""
        return self._folder is not None and not self.loaded

    def keep(self) -> None:
        """Write what is compiled by now; a full disk costs the next process its time."""
        assert self._folder is not None
        content = bytes(self._cache.serialize())
        file = self._folder / f"{hashlib.sha256(content).hexdigest()[:16]}{_SUFFIX}"  # a new name gets a new checksum
        with contextlib.suppress(OSError):
            for other in self._files():
                other.unlink()
        keep(file, content)
