"""The ablation's results as the tables that docs/results.md shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .ablation_rows import Row
from .fidelity import IDENTICAL_DB, MEL_BANDS, Trial, deterministic_sampler
from .intervals import median_interval

_COLUMNS = (
    *("", "smoothing", "range", "worst-step cosine", "mean cosine", "relative error", "final latents, SNR"),
    *("log-mel distance", "bundle", "step graph", "Linears in int8", "step, x SQS (95 %)"),
)


def markdown(
    rows: Sequence[Row],
    results: Mapping[str, Mapping],
    trial: Trial,
    command: str,
    machine: str,
    left_out: Mapping[str, str],
) -> str:
    """One table a backend, of every row that has results, in the order of `rows`; then why others are left out."""
    settings = trial.settings
    lines = [
        machine,
        "",
        f"    {command}",
        "",
        f"{len(trial.prompts)} prompts x {len(trial.seeds)} seeds (from {trial.seeds[0]}) that no calibration saw, "
        f"{settings.steps} steps, cfg {settings.cfg_scale:g}. Cosine and relative error are those of the CFG-combined "
        f"velocity, teacher forced on FP32's trajectory ({settings.sampler}); worst-step is the lowest mean over clips "
        f"of any step, in brackets which. SNR (median over clips) and log-mel distance ({MEL_BANDS} bands, mean "
        f"absolute difference) are those of own rollouts under {deterministic_sampler(settings)}, against FP32's. "
        "Latency: median of the ratios to SQS on the same backend within interleaved rounds, and its bootstrap "
        "interval.",
    ]
    for backend in dict.fromkeys(row.backend for row in rows):
        mine = [row for row in rows if row.backend == backend and row.name in results]
        if mine:
            lines += ["", f"**{backend}**", "", _line(_COLUMNS), "|---" * len(_COLUMNS) + "|"]
            lines += [_line(_cells(row, results[row.name])) for row in mine]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items())]
    return "\n".join(lines) + "\n"


def _cells(row: Row, result: Mapping) -> list[str]:
    ratio = "{:.2f} ({:.2f}-{:.2f})".format(*median_interval(result["ratios"])) if "ratios" in result else ""
    identical = result["snr_db"] >= IDENTICAL_DB
    return [
        row.label,
        result["smoothing"],
        result["range"],
        f"{result['worst_step_cosine']:.4f} ({result['worst_step']})",
        f"{result['mean_cosine']:.4f}",
        f"{result['mean_relative_error']:.3g}",
        "identical" if identical else f"{result['snr_db']:.1f} dB",
        f"{result['log_mel_db']:.2f} dB",
        f"{result['bundle_bytes'] / 1e6:.1f} MB",
        f"{result['step_bytes'] / 1e6:.1f} MB",
        f"{result['int8_linears']} of {result['linears']}",
        ratio,
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
