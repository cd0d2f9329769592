"""The commands of README.md, taken from its text: the tests run them, and `.ci/run` (`python3 tests/readme.py WHICH`).

WHICH is `try` (the one command that sets up and makes a dog bark), `tests` (the one that sets up and passes the tests)
or `product` (the first screen's commands, one a line). Needs nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def blocks(text: str) -> list[list[str]]:
    """The code blocks of a Markdown text, fenced or indented by four, without their indentation."""
    found: list[list[str]] = []
    fenced = inside = False
    for line in text.splitlines():
        fence = line.startswith("```")
        code = not fence and (fenced or line.startswith("    ") or (inside and not line.strip()))
        if code and not inside:
            found.append([])
        if code:
            found[-1].append(line if fenced else line[4:])
        fenced, inside = fenced != fence, code
    return [lines for block in found if (lines := _trimmed(block))]


def _trimmed(lines: list[str]) -> list[str]:
    """Without blank lines at the end."""
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def spans(text: str) -> list[str]:
    """The inline code of a Markdown text outside its code blocks; `\\\\|`, which a table needs, is a bar."""
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [span.replace("\\|", "|").replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def is_python(block: list[str]) -> bool:
    return any(line.startswith(("import ", "from ")) for line in block)


def is_figure(block: list[str]) -> bool:
    return any("──►" in line for line in block)


def commands(text: str) -> list[str]:
    """Every command line of the code blocks, without its comment."""
    shell = [block for block in blocks(text) if not is_python(block) and not is_figure(block)]
    return [command for block in shell for line in block if (command := re.sub(r"\s+#\s.*", "", line).strip())]


def product() -> list[str]:
    """What the first screen shows: build, run, diff."""
    return commands("\n".join("    " + line for line in blocks(README.read_text("utf-8"))[0]))


def set_up(extra: str) -> str:
    """The one command line that sets up a clone with that extra."""
    lines = [line for line in commands(README.read_text("utf-8")) if f'-e ".[{extra}]"' in line]
    if len(lines) != 1:
        raise SystemExit(f"README.md has {len(lines)} commands that install .[{extra}], not one")
    return lines[0]


WHICH = {"try": lambda: [set_up("build")], "tests": lambda: [set_up("dev")], "product": product}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in WHICH:
        sys.exit(__doc__)
    print("\n".join(WHICH[sys.argv[1]]()))
