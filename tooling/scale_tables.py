"""SQD's tables of a calibrated schedule become a few knots each: which noise levels, what values, and the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..engines.home import save_tensors
from ..exporters.quantized import Slot

Float = NDArray[np.float32]
KNOTS = 16


def fit_knots(
    sigmas: ArrayLike, tables: Mapping[str, NDArray[np.floating]], knots: int = KNOTS
) -> tuple[Float, dict[str, NDArray[np.floating]]]:
    """Positive tables [steps, width] at the noise levels `sigmas` [steps] -> knots and log tables for `save_scales`.

    With no more steps than knots nothing is lost. Tables are asked for by name twice, so a lazy mapping may make them.
    """
    places = choose_knots(sigmas, tables, knots)
    return places, {name: fit_table(places, sigmas, table) for name, table in tables.items()}


def choose_knots(sigmas: ArrayLike, tables: Mapping[str, NDArray[np.floating]], knots: int = KNOTS) -> Float:
    """float32 [k <= knots], log sigma, ascending: those of the steps that serve all tables best, every table alike.

    Greedy: to both ends is added, again and again, the step that leaves the least squared error of log(table). For
    a projection onto the columns of an orthonormal Q that is tr(G) - tr(Q' G Q), G = sum of log T log T' [steps,
    steps], whatever the tables' width.
    """
    places = np.log(np.asarray(sigmas, np.float64))
    candidates = np.unique(places.astype(np.float32))
    if len(candidates) <= knots:
        return candidates
    gram = np.zeros((len(places), len(places)))
    for table in tables.values():
        log_table = _log(table)
        log_table -= log_table.mean(axis=0)  # a constant is never an error, and costs digits
        gram += log_table @ log_table.T / log_table.shape[1]
    chosen = [0, len(candidates) - 1][:knots]
    while len(chosen) < knots:

        def explained(candidate: int) -> float:
            q, _ = np.linalg.qr(hat_functions(candidates[sorted([*chosen, candidate])], places))
            return float(np.einsum("ij,ij->", q, gram @ q))

        chosen.append(max((i for i in range(len(candidates)) if i not in chosen), key=explained))
    return candidates[sorted(chosen)]


def fit_table(knots: Float, sigmas: ArrayLike, table: NDArray[np.floating]) -> NDArray[np.floating]:
    """A positive table [steps, width] -> its logarithm at `knots` [k, width], the interpolant being closest (least
    squares). float32 where the width is 1, else float16.

    Least squares on purpose, though half of the steps' ranges come out too small and clip: on the demo (48 Linears,
    100 steps, 16 knots) the quantization error rises by 0.5 %, by 1.3 % with the steps' own values at the knots, and
    by 6 % with the smallest values that nowhere clip, for then all other steps are too coarse.
    """
    basis = hat_functions(knots, np.log(np.asarray(sigmas, np.float64)))
    values = np.linalg.pinv(basis) @ _log(table)
    return values.astype(np.float32 if table.shape[1] == 1 else np.float16)


def _log(table: NDArray[np.floating]) -> NDArray[np.float64]:
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError("a table of scales must be positive and finite")
    return np.log(table, dtype=np.float64)


def hat_functions(knots: NDArray[np.floating], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """[places, knots]: the weight of each knot's value in the piecewise linear interpolant, the ends held."""
    return np.stack([np.interp(places, knots, unit) for unit in np.eye(len(knots))], axis=1)


def save_scales(path: Path, knots: Float, logs: Mapping[str, NDArray[np.floating]], slots: Sequence[Slot]) -> int:
    """Write `<graph>.scales.safetensors`; only the tables that a slot names. Returns the width of `step_scales`."""
    used = sorted({name for slot in slots for name in slot.powers})
    tensors: dict[str, NDArray] = {"knots": np.asarray(knots, np.float32)}
    tensors |= {f"log/{name}": np.ascontiguousarray(logs[name]) for name in used}
    for index, slot in enumerate(slots):
        tensors[f"constant/{index}"] = np.ascontiguousarray(slot.constant, np.float32).reshape(-1)
    described = [{"width": slot.width, "powers": dict(slot.powers)} for slot in slots]
    save_tensors(tensors, path, {"slots": json.dumps(described)})
    return sum(slot.width for slot in slots)
