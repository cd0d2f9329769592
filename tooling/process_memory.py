"""What a command takes: its time, and its memory by the phases that it tells of on stderr. From Linux's /proc.

Memory of two kinds is told apart: RssAnon is what a process allocated, RssFile pages of files that it has mapped, such
as weights, which the system takes back when memory is short. Peaks by phase are samples, some 20 a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines.errors import UserError

INTERVAL = 0.05  # seconds between two samples
PROGRAM = [sys.executable, "-c", "from dit_trt.tooling.cli import main; main(prog_name='dit-trt')"]
START = "start"  # the phase before the first that is told
_PROGRESS = re.compile(r"(.+?) \d+/\d+($|, )")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: allocated now, mapped files now, and the most of both together so far (VmHWM)."""

    rss_anon: int
    rss_file: int
    peak_rss: int


@dataclass
class Phase:
    """Between two lines on stderr, or of one progress: seconds, and the highest samples in bytes, each by itself.

    rss: of both kinds together, which need not be highest at once.
    """

    name: str
    seconds: float = 0.0
    rss: int = 0
    rss_anon: int = 0
    rss_file: int = 0

    def saw(self, memory: Memory) -> None:
        self.rss = max(self.rss, memory.rss_anon + memory.rss_file)
        self.rss_anon = max(self.rss_anon, memory.rss_anon)
        self.rss_file = max(self.rss_file, memory.rss_file)


@dataclass(frozen=True)
class Measured:
    """A command that ended well. Seconds; peak_rss in bytes is what `/usr/bin/time -v` prints as maximum resident."""

    command: tuple[str, ...]
    seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss: int
    phases: tuple[Phase, ...]


def memory_of(process: int | str = "self") -> Memory | None:
    """The memory of a process by its id; None when it has ended. Raises UserError where there is no /proc."""
    if not Path("/proc/self/status").is_file():
        raise UserError("memory is read from /proc, which this system does not have; measure on Linux")
    try:
        text = Path(f"/proc/{process}/status").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.partition(":")[::2] for line in text.splitlines())
    if "VmHWM" not in fields:  # ended, and not yet waited for
        return None
    anon, file, peak = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM"))
    return Memory(anon, file, peak)


def measure(
    command: Sequence[str],
    say: Callable[[str], object] = lambda line: None,
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """Run a command (`dit-trt` is this package's, wherever it is installed) and measure it.

    say: given its lines on stderr, each of which begins a phase; its stdout goes to our stderr. environment: changes to
    ours. Raises UserError when it cannot be started or fails, with its last line.
    """
    program = [*PROGRAM, *command[1:]] if command[0] == "dit-trt" else list(command)
    memory_of()
    phases, begun = [Phase(START)], [time.perf_counter()]
    last, highest = "it said nothing", 0
    try:
        process = subprocess.Popen(
            program,
            stdin=subprocess.DEVNULL,
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None

    def sample() -> None:
        nonlocal highest
        if (now := memory_of(process.pid)) is not None:
            phases[-1].saw(now)
            highest = max(highest, now.peak_rss)

    def listen() -> None:
        nonlocal last
        for line in process.stderr or ():
            if text := line.strip():
                last = text
                say(text)
                name = found[1] if (found := _PROGRESS.match(text)) else text
                if name != phases[-1].name:
                    begun.append(time.perf_counter())
                    phases.append(Phase(name))
                    sample()  # the shortest phase has one

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while True:
            sample()
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            time.sleep(INTERVAL)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    end = time.perf_counter()
    listener.join()
    with contextlib.suppress(OSError):
        process.stderr.close()  # type: ignore[union-attr]
    if process.returncode != 0:
        raise UserError(f"{' '.join(command)} ended with {process.returncode}: {last}")
    for phase, start, stop in zip(phases, begun, [*begun[1:], end]):
        phase.seconds = stop - start
    return Measured(
        tuple(command), end - begun[0], used.ru_utime, used.ru_stime, _peak(used.ru_maxrss, highest), tuple(phases)
    )


def _peak(maxrss: int, highest: int) -> int:
    """Bytes. A child's ru_maxrss (KiB) begins with its parent's peak: one as small is known by its samples alone."""
    ours = memory_of()
    assert ours is not None
    return maxrss * 1024 if maxrss * 1024 > 1.05 * ours.peak_rss else highest
