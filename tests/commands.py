"""`dit-trt` in memory: what a command says, and the promises that hold whatever it says."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from dit_trt.tooling.cli import main

QUICK_CALIBRATION = ("--num-prompts", "3", "--calib-steps", "8")  # that of the fixture tiny_table


def invoke(*arguments: object, code: int = 0) -> Result:
    """Run `dit-trt` in memory; whatever happens, nobody sees a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def one_object(stdout: str) -> dict:
    """stdout is one line that holds one JSON object (strict: no NaN)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert stdout.endswith("\n")
    assert stdout.count("\n") == 1
    value = json.loads(stdout, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def error_of(*arguments: object, code: int = 1) -> str:
    """The one line of a failing command; nothing is on stdout, so that a script does not read half an answer."""
    result = invoke(*arguments, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
