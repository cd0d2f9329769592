"""Calibration tables on disk: what a table says of a model, where it comes from, and the small form that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..engines.errors import UserError
from ..engines.home import sha256
from ..exporters.checkpoint import Checkpoint
from .journal import slot_steps

Float = NDArray[np.float32]
SHIPPED = "calibration.safetensors"
SLIM_STEPS = 2  # steps that share a row of the shipped table


def load_absmax(path: Path, checkpoint: Checkpoint) -> dict[str, Float]:
    """The table at `path` as absmax of every Linear's input channels, [steps, in] (one row where it never changes).

    Raises UserError when it is unreadable or belongs to another checkpoint.
    """
    metadata, tensors = _read(path)
    if metadata.get("checkpoint") != checkpoint.digest:
        raise UserError(f"the calibration table {path} belongs to another checkpoint; use --recalibrate")
    widths = {linear.name: linear.in_features for linear in checkpoint.linears}
    absmax = {}
    try:
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "absmax":
                steps = json.loads(metadata["settings"])["steps"] if len(value) > 1 else 1
                absmax[name] = np.repeat(value.astype(np.float32), SLIM_STEPS, axis=0)[:steps]
            elif kind == "max":
                absmax[name] = np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"]))
            else:
                continue
            if absmax[name].shape[1:] != (widths[name],) or not np.isfinite(absmax[name]).all():
                raise ValueError(f"{key} of shape {value.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the calibration table {path} is damaged ({error}); use --recalibrate") from None
    return absmax


def load_rows(path: Path, checkpoint: Checkpoint) -> dict[str, tuple[Float, NDArray[np.int64]]]:
    """The reservoir of the table at `path`: by Linear name, token rows [n, in] and the step each comes from, [n].

    Rows of the conditioning graph, which runs once a prompt, are all of step 0.
    Raises UserError as load_absmax, and for a table without rows (a shipped one).
    """
    load_absmax(path, checkpoint)
    metadata, tensors = _read(path)
    linears = {f"rows/{linear.name}": linear for linear in checkpoint.linears}
    kept = {key: value for key, value in tensors.items() if key in linears and len(value)}
    if not kept:
        raise UserError(f"the calibration table {path} keeps no token rows; use --recalibrate")
    steps = json.loads(metadata["settings"])["steps"]
    rows = {}
    for key, value in kept.items():
        linear = linears[key]
        if value.shape[1:] != (linear.in_features,) or not np.isfinite(value).all():
            raise UserError(f"the calibration table {path} is damaged ({key}); use --recalibrate")
        step = slot_steps(steps, len(value)) if linear.graph == "step" else np.zeros(len(value), np.int64)
        rows[linear.name] = (value.astype(np.float32), step)
    return rows


def table_facts(path: Path) -> dict:
    """Where a table comes from, for the manifest: prompts, settings and its sha256. Raises UserError as load_absmax."""
    metadata, _ = _read(path)
    try:
        facts = {name: json.loads(metadata[name]) for name in ("prompts", "settings")}
    except (KeyError, ValueError) as error:
        raise UserError(f"the calibration table {path} is damaged ({error}); use --recalibrate") from None
    return {**facts, "sha256": sha256(path)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray]]:
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}, load_file(path)
    except Exception as error:  # what safetensors raises for a damaged file is its own, numpy's or the system's
        raise UserError(f"the calibration table {path} cannot be read ({error}); use --recalibrate") from None


def shipped_table(checkpoint: Checkpoint) -> Path | None:
    """The table that came with a checkpoint, if it belongs to these very weights."""
    path = checkpoint.folder / SHIPPED
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return path if (file.metadata() or {}).get("checkpoint") == checkpoint.digest else None
    except Exception:  # a damaged shipped table is the same as none: calibration makes a new one
        return None


def slim_table(table: Path, target: Path) -> None:
    """A table small enough to ship: absmax only, the larger of every two steps, in fp16 rounded up.

    No range is understated by it, and the largest over all steps, which SQS uses, changes by fp16's rounding alone.
    """
    with safe_open(table, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(table)
    slim = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "max":
            absmax = np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"]))
            absmax = np.maximum.reduceat(absmax, np.arange(0, len(absmax), SLIM_STEPS), axis=0)
            if absmax.max() > 65504:
                raise UserError(f"{name} reaches {absmax.max():.0f}, more than a slim table's fp16 holds")
            half = absmax.astype(np.float16)
            slim[f"absmax/{name}"] = np.where(half < absmax, np.nextafter(half, np.float16(np.inf)), half)
    save_file(slim, target, metadata)
    target.chmod(0o644)
