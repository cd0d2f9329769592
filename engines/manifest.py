"""manifest.json: written with a hash of its own, read back only when it is unchanged and every field is well formed."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import UserError
from .home import sha256

FORMAT = 4
MANIFEST = "manifest.json"
_GRAPHS = ("text.onnx", "conditioning.onnx", "step.onnx", "decoder.onnx")
REQUIRED = frozenset({*_GRAPHS, *(f"{name}.data" for name in _GRAPHS), "scales.safetensors", "tokenizer.json"})
SCALES = "{}.scales.safetensors"  # of a step graph that takes `step_scales`
_BLANK = "0" * 64  # stands in the manifest's own `sha256` while that is computed
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def step_graphs(step_sigmas: Sequence[float]) -> tuple[str, ...]:
    """Names of the step graphs, highest noise first; `step_sigmas` are the falling bounds between them.

    The first runs at every noise level that reaches the first bound, and so on; the last below all bounds.
    """
    return ("step", *(f"step-{index + 1}" for index in range(len(step_sigmas))))


def read_manifest(folder: Path) -> dict:
    """The manifest of `folder`: unchanged since it was written, and every field that other code reads well formed."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a bundle (no {MANIFEST}); make one with: dit-trt build") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); build the bundle again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT:
        raise UserError(f"{folder} has bundle format {found!r:.40}, this version reads {FORMAT}; build it again")
    stamp = manifest.get("sha256")
    if not _is_sha256(stamp) or _own_sha256(raw.replace(stamp.encode(), _BLANK.encode(), 1)) != stamp:
        raise UserError(f"{path} is damaged (it does not match its own sha256); build the bundle again")
    files = manifest.get("files")
    fields = _FIELDS | (_TILING if isinstance(files, dict) and "encoder.onnx" in files else {})
    sizes = manifest.get("sizes")
    fields |= {"step_sigmas": _are_falling} if "step_sigmas" in manifest else {}
    fields |= {"sizes.step_scales": _is_size} if isinstance(sizes, dict) and "step_scales" in sizes else {}
    fields |= {name: good for name, good in _OPTIONAL.items() if name in manifest}
    faults = [name for name, is_good in fields.items() if not is_good(field(manifest, name))]
    if faults:
        raise UserError(f"{path} lacks or misstates {', '.join(faults)}; build the bundle again")
    files = manifest["files"]
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise UserError(f"the bundle {folder.name} names a file outside itself: {name!r:.60}; build it again")
    needed = REQUIRED | {f"{name}.data" for name in files if name.endswith(".onnx")}
    for graph in step_graphs(manifest.get("step_sigmas", ())):
        needed |= {f"{graph}.onnx", f"{graph}.onnx.data"}
        needed |= {SCALES.format(graph)} if "step_scales" in manifest["sizes"] else set()
    if missing := sorted(needed - files.keys()):
        raise UserError(f"{path} does not list {', '.join(missing)}; build the bundle again")
    return manifest


def _own_sha256(blanked: bytes) -> str:
    return hashlib.sha256(blanked).hexdigest()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def field(manifest: dict, dotted: str) -> object:
    value: object = manifest
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _is_time(value: object) -> bool:
    """ISO 8601 with its zone: without one, times of two machines have no order."""
    try:
        return isinstance(value, str) and datetime.datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _are_falling(value: object) -> bool:
    """Noise levels, each below the one before."""
    if not (isinstance(value, list) and all(_is_number(sigma) for sigma in value)):
        return False
    ends = [math.inf, *value, 0]
    return all(above > below for above, below in itertools.pairwise(ends))


def _is_pretransform(value: object) -> bool:
    if not (isinstance(value, dict) and _is_text(value.get("type")) and isinstance(value.get("config"), dict)):
        return False
    needed = ("n_fft", "hop_length", "griffin_lim_iterations") if value["type"] == "mel_pca" else ()
    return all(_is_size(value["config"].get(name)) for name in needed)


def _is_plan(value: object) -> bool:
    """What PlanOptions takes: compute capabilities, bounds of the latents, bytes."""
    if not isinstance(value, dict):
        return False
    lists = {name: value.get(name, []) for name in ("targets", "profile")}
    counts = (value[name] for name in ("workspace", "weight_streaming") if name in value)
    return (
        value.keys() <= {"targets", "profile", "workspace", "weight_streaming"}
        and all(isinstance(items, list) for items in lists.values())
        and all(_is_text(target) for target in lists["targets"])
        and len(lists["profile"]) in (0, 3)
        and all(_is_size(latents) for latents in lists["profile"])
        and all(_is_count(size) and size for size in counts)
    )


def _are_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and _is_count(entry.get("bytes")) and _is_sha256(entry.get("sha256"))
        for entry in value.values()
    )


def _are_layers(value: object) -> bool:
    texts, counts = (
        ("name", "kind", "graph", "bits"),
        ("in_features", "out_features", "float_bytes", "bytes", "branch_bytes"),
    )
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and all(_is_text(layer.get(name)) for name in texts)
        and all(_is_count(layer.get(name)) for name in counts)
        for layer in value
    )


# What other code reads of a manifest, and what it must be. Fields that are not named here are not looked at.
_FIELDS: dict[str, Callable[[object], bool]] = {
    "backend": _is_text,
    "created": _is_time,
    "files": _are_files,
    "layers": _are_layers,
    "linears": _is_count,
    "int8_linears": _is_count,
    "recipe.method": _is_text,
    "recipe.bits": _is_text,
    "model.name": _is_string,
    "model.source": _is_string,
    "model.digest": _is_sha256,
    "model.licence": _is_string,
    "model.pretransform": _is_pretransform,
    **{
        f"sizes.{name}": _is_size
        for name in (
            *("io_channels", "embed_dim", "depth", "num_heads", "dim_heads", "cond_dim"),
            *("prompt_tokens", "context_tokens", "max_latents", "downsampling_ratio", "sample_rate"),
        )
    },
    "tokenizer.special_tokens": _is_flag,
    "schedule.steps": _is_size,
    "schedule.sampler": _is_text,
    "schedule.seed": _is_count,
    **{f"schedule.{name}": _is_number for name in ("cfg", "sigma_min", "sigma_max")},
}

_OPTIONAL: dict[str, Callable[[object], bool]] = {
    "trunk": _is_text,
    "plan": _is_plan,
    "short_context": _is_flag,
    "int16_sums": _is_flag,
}
_TILING = {f"sizes.{name}": _is_size for name in ("tile_latents", "tile_overlap", "encoder_channels")}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Add `format`, the bytes and sha256 of every file in `folder`, and the manifest's own sha256; write it last."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    stamped = {"format": FORMAT, "sha256": _BLANK}
    text = json.dumps({**stamped, **manifest, **stamped, "files": files}, indent=1) + "\n"
    stamp = _own_sha256(text.encode())
    (folder / MANIFEST).write_bytes(text.replace(_BLANK, stamp, 1).encode())
