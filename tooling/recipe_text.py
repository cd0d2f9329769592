"""A recipe in a line for people: what of it is not the default."""

from __future__ import annotations

from .recipe import Recipe


def options_of(recipe: Recipe) -> list[str]:
    """Everything but method, bits, alpha, include and exclude that is not the default, a few words each."""
    found = [] if recipe.smooth else ["no smoothing"]
    if recipe.sqd_weights != Recipe.sqd_weights:
        found.append(f"weights {recipe.sqd_weights}")
    if recipe.cfg_pair != Recipe.cfg_pair:
        found.append(f"guidance pair as {recipe.cfg_pair}")
    if recipe.clip:
        found.append("clipped")
    if recipe.lora_rank:
        found.append(f"low rank {recipe.lora_rank} ({recipe.lora_form})")
    if recipe.group_size != Recipe.group_size:
        found.append(f"group {recipe.group_size}" if recipe.group_size else "a scale a channel")
    if recipe.rounding != Recipe.rounding:
        found.append(recipe.rounding)
    if recipe.w4 != Recipe.w4:
        found.append(f"4 bits in {recipe.w4}")
    if recipe.decoder_bits != Recipe.decoder_bits and recipe.method != "none":
        found.append("decoder in FP32")
    if recipe.trunk != Recipe.trunk:
        found.append(f"{recipe.trunk} trunk")
    return found + [f"{pattern} {bits}" for pattern, bits in recipe.bits_for]
