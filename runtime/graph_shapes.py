"""The input shapes of a bundle's graphs, from the sizes in its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from ..engines.manifest import step_graphs

TIME_ROWS = 128  # the conditioning graph embeds so many timesteps at once: one engine for every --steps up to it


def graph_shapes(
    sizes: dict[str, int],
    steps: int = TIME_ROWS,
    step_sigmas: Sequence[float] = (),
    latents: int | None = None,
    batch: int = 2,
    context: int | None = None,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Input shapes of every graph for one clip: the CFG pair is the batch of 2; the autoencoder sees one tile.

    steps: rows of t; step_sigmas: the manifest's, there is a step graph more than these. latents: of the clip (default:
    the model's full length); batch: CFG halves that the step graphs see; context: how many have one (default: all).
    """
    s = sizes
    key = (context or batch, s["num_heads"], s["context_tokens"], s["dim_heads"])
    keys_values = {f"context_{kind}.{i}": key for i in range(s["depth"]) for kind in ("k", "v")}
    latents = latents or s["max_latents"]
    tile = s.get("tile_latents")
    step = {
        "x": (batch, s["io_channels"], latents),
        "global_embed": (batch, s["embed_dim"]),
        "time_embed": (s["embed_dim"],),
        **({"step_scales": (s["step_scales"],)} if "step_scales" in s else {}),
        **keys_values,
    }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "text": {"input_ids": (1, s["prompt_tokens"]), "attention_mask": (1, s["prompt_tokens"])},
        "conditioning": {
            "prompt_embeds": (2, s["prompt_tokens"], s["cond_dim"]),
            **({"seconds_start": (2,)} if s["context_tokens"] - s["prompt_tokens"] > 1 else {}),
            "seconds_total": (2,),
            "keep": (2,),
            "t": (steps,),
        },
        **dict.fromkeys(step_graphs(step_sigmas), step),
        "decoder": {"latents": (1, s["io_channels"], min(tile or latents, latents))},
    }
    if tile:
        shapes["encoder"] = {"audio": (1, s["encoder_channels"], tile * s["downsampling_ratio"])}
    return shapes
