"""What is in a bundle, read from its files: bytes by part, and every Linear with its shape, scales and bytes."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..engines.bundle import Bundle
from ..engines.errors import UserError
from .recipe import METHODS, Recipe


def has_recipe(bundle: Bundle) -> bool:
    """Whether one of our recipes made it; False when another quantizer did (see tooling/modelopt)."""
    return bundle.manifest["recipe"]["method"] in METHODS


def bundle_recipe(bundle: Bundle) -> Recipe:
    """The recipe that made a bundle. Raises UserError when another quantizer did."""
    if not has_recipe(bundle):
        made_by = bundle.manifest["recipe"]["method"]
        raise UserError(f"{bundle.folder.name} was made by {made_by}, not by a recipe of dit-trt build")
    return Recipe.from_dict(bundle.manifest["recipe"])


def bundle_parts(bundle: Bundle) -> dict[str, int]:
    """Bytes by part, a graph's two files in one; their sum is the bundle's size."""
    parts: dict[str, int] = {}
    for name, entry in bundle.manifest["files"].items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + entry["bytes"]
    return parts


def papers_count(parts: Mapping[str, int]) -> int:
    """Bytes of DiT, autoencoder, number conditioners and tables, of `bundle_parts`: without text encoder and tokenizer.

    What arXiv 2510.00313 counts: its 4,854 MB are those of Stable Audio Open's model.safetensors.
    """
    return sum(size for part, size in parts.items() if part not in ("text", "tokenizer"))


def bundle_layers(bundle: Bundle) -> list[dict]:
    """The manifest's layers, each with its activation_scale, smoothing_min and smoothing_max (None: it has none).

    Raises UserError when the scales cannot be read.
    """
    try:
        scales = load_file(bundle.path("scales.safetensors"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the bundle {bundle.folder.name}: scales.safetensors cannot be read ({error})") from None
    found = []
    for layer in bundle.manifest["layers"]:
        scale, smoothing = (scales.get(f"{kind}/{layer['name']}") for kind in ("activation_scale", "smoothing"))
        found.append(
            {
                **layer,
                "activation_scale": None if scale is None else float(scale[0]),
                "smoothing_min": None if smoothing is None else float(smoothing.min()),
                "smoothing_max": None if smoothing is None else float(smoothing.max()),
            }
        )
    return found
