"""Fresh Python processes, as a user starts them; packages can be taken away from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_BLOCK = """
import sys
class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, _Blocked())
"""
COMMAND = "from dit_trt.tooling.cli import main; main(prog_name='dit-trt')"


def python(
    code: str, arguments: Sequence[str] = (), without: Sequence[str] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` with `arguments` where the packages `without` are not installed."""
    block = _BLOCK.format(blocked=tuple(without)) if without else ""
    return subprocess.run(
        [sys.executable, "-c", block + code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def dit_trt(*arguments: str, without: Sequence[str] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The `dit-trt` command."""
    return python(COMMAND, arguments, without, cwd)
