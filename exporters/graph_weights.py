"""Which float weights each graph will hold, by name and shape, without exporting or reading any.

The modules that float_graphs exports are made on the meta device; their parameters and buffers are the graphs' weights.
Where the cut between the conditioning and the step graph runs is said once more here; a test compares with real files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .conditioners import MultiConditioner
from .dit import DiffusionTransformer, split_fused
from .float_graphs import ModelSizes, graph_names
from .linears import DIT_PREFIX
from .pretransforms import decoder_from_config, encoder_from_config, has_encoder

# Parts of the DiT's names that run once a prompt; all others run at every step.
_ONCE = (
    "to_cond_embed.",
    "to_global_embed.",
    "to_timestep_embed.",
    "timestep_features.",
    ".cross_attn.to_kv.",
    ".cross_attn.k_norm.",
)

Shape = tuple[int, ...]


def graph_weights(model_config: Mapping) -> dict[str, dict[str, Shape]]:
    """Graph -> weight name -> shape, all fp32. RoPE's tables are in the place of the frequencies they are made from."""
    sizes = ModelSizes(model_config)
    with torch.device("meta"):
        dit = DiffusionTransformer(sizes.dit)
        conditioner, decoder = MultiConditioner(model_config), decoder_from_config(model_config)
        encoder = encoder_from_config(model_config) if has_encoder(model_config) else None
    split_fused(dit)
    found: dict[str, dict[str, Shape]] = {graph: {} for graph in graph_names(model_config)}
    for name, shape in _shapes(dit, DIT_PREFIX).items():
        if not name.endswith(".inv_freq"):
            found["conditioning" if any(part in name for part in _ONCE) else "step"][name] = shape
    rope = (sizes.max_latents + 1, sizes.dit.rotary_dim)
    found["step"] |= {"rope.cos": rope, "rope.sin": rope}
    for name, shape in _shapes(conditioner, "conditioner.").items():
        found["text" if name.startswith("conditioner.conditioners.prompt.") else "conditioning"][name] = shape
    found["decoder"] = _shapes(decoder, "pretransform.")
    if encoder is not None:
        found["encoder"] = _shapes(encoder, "pretransform.")
    return found


def _shapes(module: torch.nn.Module, prefix: str) -> dict[str, Shape]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {prefix + name: tuple(tensor.shape) for name, tensor in tensors}
