"""An `Analysis` becomes a folder: figures as PNG and SVG, the report, and the numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..plain_json import plain
from .analysis import Analysis
from .draw import draw_all
from .folder import INDEX, new_analysis
from .report import write_report

REPORT = "report.html"


def write_analysis(analysis: Analysis, target: Path, command: str) -> dict[str, Any]:
    """Write `target`, whole or not at all; the numbers, and `files`, the paths of all that was written."""
    numbers = analysis.to_dict()
    with new_analysis(target) as work:
        draw_all(analysis, work)
        write_report(analysis, work, REPORT, command)
        names = sorted(path.name for path in work.iterdir())
        text = json.dumps(plain({**numbers, "files": names}), indent=1)
        (work / INDEX).write_text(text + "\n", "utf-8")
    files = [str(target / name) for name in [*names, INDEX]]
    return {**numbers, "report": str(target / REPORT), "files": files}
