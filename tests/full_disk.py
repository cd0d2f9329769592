"""Commands of `dit-trt` on a full disk; run as a script in a process of its own, it prints what happened as JSON.

The disk is a small tmpfs in a mount namespace of the process's own where the system lets it have one, else a limit on
the size of files: a write beyond it fails in the same place with EFBIG.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MEGABYTES = 80
_MOUNT = 'mount -t tmpfs -o size={0}m none "$1" && exec "$2" "$3" "$1" tmpfs "$4"'


def on_full_disk(folder: Path, checkpoint: Path, home: Path, limited: bool) -> dict:
    """All scenarios, in a fresh process; `limited` asks for the file limit even where a tmpfs can be had."""
    folder.mkdir()
    sources = json.dumps([str(checkpoint), str(home)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    mounted = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        _MOUNT.format(MEGABYTES),
        "sh",
        str(folder),
        sys.executable,
        __file__,
        sources,
    ]
    plain = [sys.executable, __file__, str(folder), "limit", sources]
    done = subprocess.run(plain if limited else mounted, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def can_mount(folder: Path) -> bool:
    folder.mkdir()
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


class Disk:
    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    @contextlib.contextmanager
    def full(self, free: int) -> Iterator[None]:
        """Only `free` bytes can still be written (to any one file, where only the limit can be had)."""
        if self.kind == "limit":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return
        ballast = self.folder / "ballast"
        left = shutil.disk_usage(self.folder).free - free
        assert left >= 0
        ballast.write_bytes(bytes(left))
        try:
            yield
        finally:
            ballast.unlink()

    def files(self) -> list[str]:
        ours = (path for path in self.folder.rglob("*") if "locks" not in path.parts and path.name != "ballast")
        return sorted(str(path.relative_to(self.folder)) for path in ours)


def _scenarios(disk: Disk, checkpoint: str, home: Path) -> Iterator[dict]:
    from click.testing import CliRunner

    from dit_trt.tooling.cli import main

    own = disk.folder / "home"
    for name in ("graphs", "reference"):
        shutil.copytree(home / name, own / name)
    os.environ["DIT_TRT_HOME"] = str(own)
    target = disk.folder / "bundle"
    build = ["build", "--model", checkpoint, "--num-prompts", "2", "--calib-steps", "6", "--output", str(target)]

    def outcome(name: str, free: int, arguments: list[str]) -> dict:
        before = disk.files()
        with disk.full(free):
            result = CliRunner().invoke(main, arguments)
        fault = result.exception if not isinstance(result.exception, SystemExit) else None
        return {
            "name": f"{name}, {free} bytes free",
            "code": result.exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr.splitlines(),
            "traceback": repr(fault) if fault else None,
            "new": sorted(set(disk.files()) - set(before)),
            "gone": sorted(set(before) - set(disk.files())),
        }

    for free in (0, 60_000, 1_000_000, 2_000_000 if disk.kind == "limit" else 4_500_000):  # the last: on the way
        yield outcome("calibrate", free, build)
    yield outcome("later", 40_000_000, build)
    for free in (0, 4_096, 100_000, 400_000, 800_000):
        yield outcome("build again", free, [*build, "--alpha", "0.5"])
    run = ["run", "rain", "--steps", "2", "--bundle", str(target), "--output", str(disk.folder / "clip.wav")]
    for free in (0, 4_096):
        yield outcome("run", free, run)
    yield outcome("later run", 4_000_000, run)
    yield outcome("run again", 4_096, run)
    yield outcome("diff", 0, ["diff", str(target), "--steps", "2", "--num-prompts", "1"])


if __name__ == "__main__":
    folder, kind, sources = sys.argv[1:]
    print(json.dumps(list(_scenarios(Disk(Path(folder), kind), json.loads(sources)[0], Path(json.loads(sources)[1])))))
