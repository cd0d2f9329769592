"""An evaluation as the paper's Table 1: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict

from ..intervals import Estimate
from .evaluate import Evaluation, Row, numbers
from .scores import flat

HEADS = {
    "log_mel_db": "log-mel to FP32, dB ↓",
    "multi_resolution_stft": "STFT to FP32 ↓",
    "rms_correlation": "loudness curve's correlation to FP32's ↑",
    "clipped_percent": "clipped, %",
    "lufs": "loudness, LUFS",
    "clap": "CLAP ↑",
    "clap_change": "CLAP less FP32's ↑",
}
KINDS = {"kl": "KL {} ↓", "fd": "FD {} ↓", "pca_fd": "PCA-FD {} ↓", "kid": "KID {} x1000 ↓"}
NAMES = {"openl3": "OpenL3", "passt": "PaSST", "birdnet": "BirdNET", "birdnet-embedding": "BirdNET", "aisfx": "aiSFX"}
_THOUSANDS = "kid_"


def head_of(key: str) -> str:
    """A metric's key as its column's head."""
    if key in HEADS:
        return HEADS[key]
    for kind in sorted(KINDS, key=len, reverse=True):
        if key.startswith(f"{kind}_"):
            network = key.removeprefix(f"{kind}_")
            return KINDS[kind].format(NAMES.get(network, network))
    return key


def markdown(evaluation: Evaluation, command: str, machine: str) -> str:
    """The table, each number with its 95 % interval, and what it was made of."""
    keys = [key for key in numbers(evaluation) if any(row.scores.get(key) is not None for row in evaluation.rows)]
    heads = ["", "bundle", "step graph", "sampling a clip, s", "times FP32's speed", "worst-step cosine ↑"]
    heads += [head_of(key) for key in keys]
    lines = [
        f"`{command}`",
        "",
        f"{evaluation.model}: {evaluation.clips} clips a row ({evaluation.captions} captions), "
        f"{evaluation.seconds:g} s, "
        f"{evaluation.settings.steps} steps, cfg {evaluation.settings.cfg_scale:g}, seed {evaluation.settings.seed}; "
        f"distances and divergences to {evaluation.reference}; means (95 % intervals). {machine}",
        *(f"Silent, and left out of every row: {name}'s {', '.join(ids)}." for name, ids in evaluation.silent.items()),
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in evaluation.rows:
        cells = [
            row.label,
            f"{row.bundle_bytes / 1e6:.1f} MB",
            f"{row.dit_bytes / 1e6:.1f} MB",
            _plain(row.clip_seconds, "{:.2f}"),
            _plain(row.faster, "{:.2f}"),
            _plain(row.worst_step_cosine, "{:.4f}"),
            *(_cell(row.scores.get(key), 1000 if key.startswith(_THOUSANDS) else 1) for key in keys),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _cell(estimate: Estimate | None, scale: float) -> str:
    if estimate is None:
        return ""
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    spread = high - low
    digits = 2 if not math.isfinite(spread) or spread <= 0 else max(0, min(4, 1 - math.floor(math.log10(spread))))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def records(evaluation: Evaluation) -> list[dict]:
    """A flat dict a row: name, label, backend, sizes, times, cosines; `key`, `key_low`, `key_high` of each metric."""
    keys = dict.fromkeys(numbers(evaluation))
    return [_record(row, keys) for row in evaluation.rows]


def _record(row: Row, keys: dict[str, None]) -> dict:
    facts = {name: value for name, value in asdict(row).items() if name != "scores"}
    clips = next((each.n for each in row.scores.values() if each is not None), None)
    return {**facts, "clips": clips, **flat({key: row.scores.get(key) for key in keys})}


def csv_text(evaluation: Evaluation) -> str:
    """The same as CSV; what a row has not is empty."""
    rows = records(evaluation)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
