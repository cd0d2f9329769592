"""Jobs of `dit-trt` in processes that die by SIGKILL at a chosen point; run as a script, it is the fork server.

The server imports everything once and computes nothing; every job is a forked child, so that fifty of them cost no
fifty imports. A child kills itself right before its n-th change of the file system (Python's audit events), or the
server kills it after a while.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}


class ForkServer:
    """`run` a job in a child; `with` ends the server."""

    def __enter__(self) -> ForkServer:
        path = os.pathsep.join(filter(None, sys.path))
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait(60)

    def run(
        self, job: str, arguments: Sequence[object], home: Path, change: int = 0, delay: float = 0.0
    ) -> tuple[bool, int, float]:
        """Run a job, killed before the `change`-th change or after `delay` seconds (0: not at all).

        -> whether it was killed, how many changes it made or was about to make, its seconds. Any other end than 0 or
        SIGKILL is a failure.
        """
        question = [job, [str(argument) for argument in arguments], str(home), change, delay]
        print(json.dumps(question), file=self._server.stdin, flush=True)
        line = self._server.stdout.readline()  # type: ignore[union-attr]
        code, changes, seconds = json.loads(line)
        assert code in (0, -signal.SIGKILL), f"{job} ended with {code}"
        return code != 0, changes, seconds


def _build(arguments: list[str]) -> None:
    from dit_trt.tooling.cli import main

    main(["build", *arguments], standalone_mode=False)


def _calibrate(arguments: list[str]) -> None:
    from dit_trt.exporters.checkpoint import Checkpoint
    from dit_trt.tooling.workflow import CalibrationOptions, calibration_table

    model, prompts, steps = arguments
    options = CalibrationOptions(num_prompts=int(prompts), steps=int(steps))
    calibration_table(Checkpoint.open(model), "openvino", options)


def _evaluate(arguments: list[str]) -> None:
    from dit_trt.tooling.cli import main

    main(["evaluate", *arguments], standalone_mode=False)


def _batch(arguments: list[str]) -> None:
    from dit_trt.tooling.cli import main

    main(["batch", *arguments], standalone_mode=False)


def _child(question: list, report: int) -> None:
    job, arguments, home, change, _ = question
    os.environ["DIT_TRT_HOME"] = home
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    seen = 0

    def watch(event: str, values: tuple) -> None:
        nonlocal seen
        if event in _CHANGES or (event == "open" and isinstance(values[2], int) and values[2] & os.O_CREAT):
            seen += 1
            os.pwrite(report, seen.to_bytes(8, "little"), 0)
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    {"build": _build, "calibrate": _calibrate, "evaluate": _evaluate, "batch": _batch}[job](arguments)


def _serve() -> None:
    import onnx  # noqa: F401
    import openvino  # noqa: F401
    import torch  # noqa: F401

    import dit_trt.tooling.cli.build
    import dit_trt.tooling.workflow  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        report = os.memfd_create("changes")
        os.pwrite(report, bytes(8), 0)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(question, report)
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        if question[4]:
            time.sleep(question[4])
            os.kill(child, signal.SIGKILL)  # a zombie takes it too
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - start
        changes = int.from_bytes(os.pread(report, 8, 0), "little")
        os.close(report)
        print(json.dumps([os.waitstatus_to_exitcode(status), changes, seconds]), flush=True)


if __name__ == "__main__":
    _serve()
