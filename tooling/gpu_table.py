"""What a GPU report found, as the Markdown of docs/gpu-results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

HEAD = """# TensorRT on NVIDIA GPUs: results

Written by

    {command}

One step of the DiT (both guidance halves) as the sampling loop calls it, with the copies of its inputs and outputs;
*launch* is the same step with nothing copied. All rows take turns, medians over {rounds} rounds (p10-p90). *Cosine*
and *largest error* are those of the velocity against ONNX Runtime on the CPU, which computes the same graph from the
same inputs: the lowest of three steps, and the largest deviation in units of the velocity's root mean square. *Device*
is what opening and sampling once took of the GPU's memory.
"""
COLUMNS = (
    "",
    "int8 Linears",
    "attentions fused",
    "step, ms (p10-p90)",
    "launch, ms",
    "times FP32",
    "times FP16",
    "cosine",
    "largest error",
    "{steps} steps, s",
    "plan",
    "device",
    "host peak",
    "build, s",
    "open, s",
)


def markdown(reports: Sequence[dict], command: str) -> str:
    """The page. reports: of `measured`, a model each."""
    lines = [HEAD.format(command=command, rounds=reports[0]["rounds"])]
    for report in reports:
        today = datetime.now(UTC).date().isoformat()
        lines += [
            f"## {report['model']}",
            "",
            f"{today}. {report['gpu']}, compute capability {report['compute_capability']}, "
            f"{report['memory_bytes'] / 1e9:.0f} GB, a driver for CUDA {report['driver_cuda']}; {report['tensorrt']}",
            "",
            *_table(report),
            "",
        ]
    return "\n".join(lines)


def _table(report: dict) -> list[str]:
    columns = [column.format(steps=report["steps"]) for column in COLUMNS]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    bases = {name: report["rows"].get(name, {}).get("step_ms") for name in ("FP32", "FP16")}
    notes = []
    for name, row in report["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | " + " | ".join(["failed", *[""] * (len(columns) - 2)]) + " |")
            notes.append(f"{name} failed: {row['error']}")
            continue
        step = sorted(row["step_ms"])
        cells = (
            f"{row['int8_linears']} of {row['linears']}" if row["linears"] else "",
            f"{row['fused_attentions']} of {row['attentions']}" if row["attentions"] else "",
            f"**{statistics.median(step):.2f}** ({_quantile(step, 0.1):.2f}-{_quantile(step, 0.9):.2f})",
            f"{statistics.median(row['launch_ms']):.2f}",
            *(_ratio(row["step_ms"], base) for base in bases.values()),
            f"{row['cosine']:.5f}",
            f"{row['largest_error']:.3f}",
            f"{row['sampling_seconds']:.2f}",
            *(f"{row[key] / 1e6:,.0f} MB" for key in ("plan_bytes", "device_bytes", "host_peak_bytes")),
            f"{row['build_seconds']:.0f}",
            f"{row['open_seconds']:.1f}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, *(["", *notes] if notes else [])]


def _ratio(times: Sequence[float], base: Sequence[float] | None) -> str:
    """Median over the rounds of how many times faster than the base."""
    return "" if base is None else f"{statistics.median(b / t for b, t in zip(base, times)):.2f}"


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]
