"""Calibration tables on disk: what a table says of a model, where it comes from, and the small form that is shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..engines.errors import UserError
from ..engines.home import sha256
from ..exporters.checkpoint import Checkpoint
from ..exporters.linears import Linear
from ..runtime.pipeline import Settings
from .journal import slot_steps

Float = NDArray[np.float32]
SHIPPED = "calibration.safetensors"
SLIM_STEPS = 2  # steps that share a row of the shipped table


@dataclass(frozen=True)
class Calibration:
    """What was seen of every Linear's input, by Linear name.

    sigmas [steps], highest first; absmax [steps, in], one row where it never changes (the conditioning graph);
    difference: of the guidance pair's difference, first half less the second, absmax [steps, in], step graph only;
    rows: a sample of tokens [n, in] and the step of each [n], where they were asked for.
    """

    sigmas: NDArray[np.float64]
    absmax: Mapping[str, Float]
    difference: Mapping[str, Float]
    rows: Mapping[str, tuple[Float, NDArray[np.int64]]] = field(default_factory=dict)


def load_calibration(path: Path, checkpoint: Checkpoint, rows: bool = False) -> Calibration:
    """The table at `path`, with its token rows where `rows` asks for them.

    Raises UserError when it is unreadable, belongs to another checkpoint, or has no rows (a shipped one).
    """
    metadata, tensors = _read(path)
    if metadata.get("checkpoint") != checkpoint.digest:
        raise UserError(f"the calibration table {path} belongs to another checkpoint; use --recalibrate")
    graphs = {linear.name: linear for linear in checkpoint.linears}
    absmax: dict[str, Float] = {}
    difference: dict[str, Float] = {}
    try:
        settings = Settings(**json.loads(metadata["settings"]))
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            steps = 1 if kind == "rows" or graphs[name].graph == "conditioning" else settings.steps
            if kind == "max":
                absmax[name] = _checked(key, np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"])), graphs, steps)
            elif kind == "absmax":
                absmax[name] = _checked(key, value, graphs, steps)
            elif kind == "difference":
                difference[name] = _checked(key, value, graphs, steps)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"the calibration table {path} is damaged ({error}); use --recalibrate") from None
    sample = load_rows(path, checkpoint) if rows else {}
    return Calibration(settings.sigmas[:-1], absmax, difference, sample)


def _checked(key: str, value: NDArray, linears: Mapping[str, Linear], steps: int) -> Float:
    """A row for every step; a slim table has one for every two."""
    if len(value) != steps:
        value = np.repeat(value, SLIM_STEPS, axis=0)[:steps]
    name = key.partition("/")[2]
    if value.shape != (steps, linears[name].in_features) or not np.isfinite(value).all():
        raise ValueError(f"{key} of shape {value.shape}")
    return value.astype(np.float32)


def load_rows(path: Path, checkpoint: Checkpoint) -> dict[str, tuple[Float, NDArray[np.int64]]]:
    """The reservoir of the table at `path`: by Linear name, token rows [n, in] and the step each comes from, [n].

    Rows of the conditioning graph, which runs once a prompt, are all of step 0.
    Raises UserError as load_calibration, and for a table without rows (a shipped one).
    """
    metadata, tensors = _read(path)
    if metadata.get("checkpoint") != checkpoint.digest:
        raise UserError(f"the calibration table {path} belongs to another checkpoint; use --recalibrate")
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
    """Where a table comes from, for the manifest: prompts, settings and its sha256; UserError as load_calibration."""
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
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the calibration table {path} cannot be read ({error}); use --recalibrate")


def tensor_kinds(path: Path) -> set[str]:
    """`absmax`, `difference`, `rows`, ...: the kinds of tensors that a table has any values of.

    Raises UserError when it is unreadable.
    """
    try:
        with safe_open(path, framework="np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, it is no mapping
    except Exception as error:
        raise _unreadable(path, error) from None
    return {key.partition("/")[0] for key, shape in shapes.items() if shape[0]}


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
            slim[f"absmax/{name}"] = _slim(name, np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"])))
        elif kind == "difference":
            slim[key] = _slim(name, value)
    save_file(slim, target, metadata)
    target.chmod(0o644)


def _slim(name: str, absmax: Float) -> NDArray[np.float16]:
    absmax = np.maximum.reduceat(absmax, np.arange(0, len(absmax), SLIM_STEPS), axis=0)
    if absmax.max() > 65504:
        raise UserError(f"{name} reaches {absmax.max():.0f}, more than a slim table's fp16 holds")
    half = absmax.astype(np.float16)
    return np.where(half < absmax, np.nextafter(half, np.float16(np.inf)), half)
