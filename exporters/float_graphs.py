"""The model becomes graphs without weights: text, conditioning, step, decoder, and encoder where it has one.

The cut follows what changes when: `text` and `conditioning` run once a prompt, `step` at every sampling step,
`decoder` and `encoder` once a clip. Modules are exported on meta tensors with their weights as inputs, so that
exporting needs no memory, nothing is folded into or shared between weights, and the graph names them as the checkpoint
does. `write_graph` puts weights in when it writes one; which weights, float or quantized, is not decided here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from ..engines.errors import UserError
from ..engines.home import flush, locked
from .conditioners import Conditioning, MultiConditioner
from .dit import DiffusionTransformer, DiTConfig, split_fused
from .linears import DIT_PREFIX
from .oobleck import EncoderGraph, OobleckConfig
from .pretransforms import decoder_from_config, encoder_from_config, has_encoder

OPSET = 20
GRAPH_FORMAT = 2  # raised when a change here changes the graphs: cached ones are then exported anew


class TextGraph(nn.Module):
    """input_ids, attention_mask int64 [batch, tokens] -> prompt_embeds fp32 [batch, tokens, cond_dim]."""

    def __init__(self, conditioner: MultiConditioner):
        super().__init__()
        self.conditioner = conditioner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conditioner.text(input_ids, attention_mask)


class ConditioningGraph(nn.Module):
    """All that is constant over a prompt; the timestep embeddings of all steps come with it, in fp32.

    prompt_embeds [batch, tokens, cond_dim]; the model's numbers (seconds_start, seconds_total), each [batch]; keep
    [batch] (1 for a prompt, 0 for the unconditional half of classifier-free guidance, whose context is exactly zero);
    t [steps].
    -> global_embed [batch, embed_dim], time_embed [steps, embed_dim],
       context_k.i, context_v.i [batch, heads, tokens + numbers, dim_heads] for every block i.
    """

    def __init__(self, dit: DiffusionTransformer, conditioner: MultiConditioner):
        super().__init__()
        self.dit = dit
        self.conditioner = conditioner

    def forward(self, prompt_embeds: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        *values, keep, t = others
        numbers = self.conditioner.numbers(*values)
        context = torch.cat((prompt_embeds, numbers), dim=1) * keep[:, None, None]
        global_embed = self.dit.to_global_embed(self.conditioner.global_vector(numbers))
        pairs = self.dit.context_keys_values(context)
        return (global_embed, self.dit.time_embed(t), *(tensor for pair in pairs for tensor in pair))


class StepGraph(nn.Module):
    """One call of the DiT: x [batch, io_channels, latents] -> velocity, both CFG halves in one batch.

    global_embed [batch, embed_dim] and context_k.i, context_v.i come from the conditioning graph; time_embed
    [embed_dim] is its row of this step. The context may have fewer rows than x: the last rows of the batch then have
    a context of zeros, and no cross attention. RoPE's cosines and sines are fp32 tables up to the model's own length.
    """

    def __init__(self, dit: DiffusionTransformer, max_latents: int):
        super().__init__()
        self.dit = dit
        self.rope = RopeTables(dit.config.rotary_dim, max_latents + 1)

    def forward(self, x: Tensor, global_embed: Tensor, time_embed: Tensor, context: list[Tensor]) -> Tensor:
        tokens = x.shape[-1] + 1
        prepend = (global_embed + time_embed)[:, None]
        pairs = list(zip(context[0::2], context[1::2]))
        return self.dit.step(x, prepend, pairs, self.rope.cos[:tokens], self.rope.sin[:tokens])


class RopeTables(nn.Module):
    """cos, sin [tokens, rotary_dim]: weights of the step graph, made from the checkpoint's inv_freq."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.register_buffer("cos", torch.zeros(tokens, dim))
        self.register_buffer("sin", torch.zeros(tokens, dim))


class ModelSizes:
    """What the graphs need to know of a `model_config.json`, validated: the DiT's sizes, tokens, latents."""

    def __init__(self, model_config: Mapping):
        self.dit = DiTConfig.from_model_config(model_config)
        self.conditioning = Conditioning.from_model_config(model_config)
        self.prompt_tokens = self.conditioning.prompt_tokens
        self.context_tokens = self.prompt_tokens + len(self.conditioning.numbers)
        self._check_widths()
        pretransform = model_config["model"]["pretransform"]["config"]
        self.downsampling_ratio = int(pretransform["downsampling_ratio"])
        self.max_latents = int(model_config["sample_size"]) // self.downsampling_ratio
        self.sample_rate = int(model_config["sample_rate"])
        self.objective = str(model_config["model"]["diffusion"].get("diffusion_objective", "v"))
        for name in ("prompt_tokens", "downsampling_ratio", "max_latents", "sample_rate"):
            if not 0 < getattr(self, name) < 2**20:
                raise ValueError(f"{name} {getattr(self, name)}, which must be in 1..{2**20 - 1}")
        self.tiling: dict[str, int] = {}
        if model_config["model"]["pretransform"]["type"] == "autoencoder":
            autoencoder = OobleckConfig.from_pretransform(model_config["model"]["pretransform"])
            if autoencoder.latent_dim != self.dit.io_channels:
                sizes = f"latent_dim {autoencoder.latent_dim}, the DiT io_channels {self.dit.io_channels}"
                raise UserError(f"the autoencoder has {sizes}: they must be equal")
            self.tiling = autoencoder.tiling(self.max_latents)

    def _check_widths(self) -> None:
        """What the conditioners make is as wide as the DiT takes."""
        made, taken = self.conditioning.cond_dim, self.dit.cond_token_dim
        if made != taken:
            raise UserError(f"conditioning.cond_dim {made} and diffusion.config.cond_token_dim {taken} must be equal")
        numbers = len(self.conditioning.global_numbers)
        if self.dit.global_cond_dim != numbers * made:
            width = f"global_cond_ids are {numbers} of cond_dim {made}"
            raise UserError(f"{width}: diffusion.config.global_cond_dim must be {numbers * made}")


def context_names(depth: int) -> list[str]:
    return [f"context_{kind}.{i}" for i in range(depth) for kind in ("k", "v")]


def attention_names(path: Path) -> dict[str, str]:
    """The Softmax nodes of a step graph -> the attention each is in, as a Linear's name would begin."""
    nodes = [node.name for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Softmax"]
    kinds = ("self_attn", "cross_attn")
    return {node: f"transformer.layers.{i // 2}.{kinds[i % 2]}" for i, node in enumerate(nodes)}


def export_topologies(model_config: Mapping, cache: Path) -> dict[str, onnx.ModelProto]:
    """All graphs of a model (see `graph_names`), weightless: every weight is a graph input of its checkpoint name.

    They depend on the configuration alone and are kept in `cache`, keyed by it.
    """
    text = json.dumps([GRAPH_FORMAT, OPSET, torch.__version__, version("onnxscript"), model_config], sort_keys=True)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    with locked(folder):
        return _load_or_export(model_config, folder)


def _load_or_export(model_config: Mapping, folder: Path) -> dict[str, onnx.ModelProto]:
    with contextlib.suppress(FileNotFoundError, DecodeError):  # not there, or damaged: exported again
        cached = {name: onnx.load(folder / f"{name}.onnx") for name in graph_names(model_config)}
        if all(model.graph.name for model in cached.values()):
            return cached
    folder.mkdir(parents=True, exist_ok=True)
    topologies = {}
    for name in graph_names(model_config):
        topologies[name] = _EXPORTS[name](model_config)
        part = folder / f"{name}.onnx.part"
        try:
            onnx.save_model(topologies[name], part)
            flush(part)
            part.replace(folder / f"{name}.onnx")
        finally:
            part.unlink(missing_ok=True)
    return topologies


def _text(model_config: Mapping) -> onnx.ModelProto:
    sizes = ModelSizes(model_config)
    with torch.device("meta"):
        module = TextGraph(MultiConditioner(model_config))
        ids, mask = (torch.zeros(2, sizes.prompt_tokens, dtype=torch.int64) for _ in range(2))
    batch = torch.export.Dim("batch")
    inputs, outputs = ["input_ids", "attention_mask"], ["prompt_embeds"]
    return _export(module, (ids, mask), inputs, outputs, ({0: batch}, {0: batch}))


def _conditioning(model_config: Mapping) -> onnx.ModelProto:
    sizes = ModelSizes(model_config)
    c = sizes.dit
    with torch.device("meta"):
        module = ConditioningGraph(DiffusionTransformer(c), MultiConditioner(model_config))
        embeds = torch.zeros(2, sizes.prompt_tokens, c.cond_token_dim)
        numbers = sizes.conditioning.numbers
        args = (embeds, *(torch.zeros(2) for _ in numbers), torch.zeros(2), torch.zeros(3))
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    inputs = ["prompt_embeds", *numbers, "keep", "t"]
    outputs = ["global_embed", "time_embed", *context_names(c.depth)]
    return _export(module, args, inputs, outputs, (*[{0: batch}] * (2 + len(numbers)), {0: steps}))


def _step(model_config: Mapping) -> onnx.ModelProto:
    sizes = ModelSizes(model_config)
    c = sizes.dit
    with torch.device("meta"):
        module = StepGraph(DiffusionTransformer(c), sizes.max_latents)
        keys = [torch.zeros(2, c.num_heads, sizes.context_tokens, c.dim_heads) for _ in range(2 * c.depth)]
        args = (torch.zeros(2, c.io_channels, 7), torch.zeros(2, c.embed_dim), torch.zeros(c.embed_dim), keys)
    batch, latents = torch.export.Dim("batch"), torch.export.Dim("latents", max=sizes.max_latents)
    inputs = ["x", "global_embed", "time_embed", *context_names(c.depth)]
    with_context = torch.export.Dim("context_batch")
    dynamic: tuple = ({0: batch, 2: latents}, {0: batch}, {}, [{0: with_context} for _ in keys])
    return _export(module, args, inputs, ["velocity"], dynamic)


def _decoder(model_config: Mapping) -> onnx.ModelProto:
    sizes = ModelSizes(model_config)
    with torch.device("meta"):
        decoder = decoder_from_config(model_config)
        args = (torch.zeros(2, sizes.dit.io_channels, 7),)
    batch, latents = torch.export.Dim("batch"), torch.export.Dim("latents")
    return _export(_Named(decoder), args, ["latents"], [str(decoder.output_name)], ({0: batch, 2: latents},))


def _encoder(model_config: Mapping) -> onnx.ModelProto:
    sizes = ModelSizes(model_config)
    ratio = sizes.downsampling_ratio
    with torch.device("meta"):
        encoder, outputs = encoder_from_config(model_config), list(EncoderGraph.output_names)
        args = (torch.zeros(2, sizes.tiling["encoder_channels"], 7 * ratio),)
    batch, latents = torch.export.Dim("batch"), torch.export.Dim("latents")
    return _export(_Named(encoder), args, ["audio"], outputs, ({0: batch, 2: ratio * latents},))


class _Named(nn.Module):
    """Gives the weights of a decoder or encoder their checkpoint prefix."""

    def __init__(self, pretransform: nn.Module):
        super().__init__()
        self.pretransform = pretransform

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.pretransform(x)


_EXPORTS = {"text": _text, "conditioning": _conditioning, "step": _step, "decoder": _decoder, "encoder": _encoder}


def graph_names(model_config: Mapping) -> list[str]:
    """The graphs of a model: all, but for the encoder where its pretransform has none."""
    return [name for name in _EXPORTS if name != "encoder" or has_encoder(model_config)]


class _Functional(nn.Module):
    """`module` with its weights as the first argument."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._call = partial(torch.func.functional_call, module)  # not a submodule: it brings no parameters of its own

    def forward(self, weights: dict[str, Tensor], *args: Tensor | list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return self._call(weights, args)


def _export(module: nn.Module, args: tuple, inputs: list[str], outputs: list[str], dynamic: tuple) -> onnx.ModelProto:
    flat = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
    assert len({id(tensor) for tensor in flat}) == len(flat), "the exporter takes one tensor given twice for one input"
    split_fused(module)
    module.eval().requires_grad_(False)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with quiet():
        exported = torch.export.export(
            _Functional(module),
            (weights, *args),
            dynamic_shapes=({name: {} for name in weights}, dynamic),
            strict=False,
        )
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, output_names=outputs, verbose=False)
    assert program is not None
    model = program.model_proto
    names = [_checkpoint_name(name) for name in weights] + inputs
    assert len(names) == len(model.graph.input), "the exporter changed the graph's inputs"
    _rename(model.graph, {value.name: name for value, name in zip(model.graph.input, names)})
    used = {name for node in model.graph.node for name in node.input}
    kept = [value for value in model.graph.input if value.name in used or value.name in inputs]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    return model


def _checkpoint_name(name: str) -> str:
    return DIT_PREFIX + name.removeprefix("dit.") if name.startswith("dit.") else name


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter talks on stdout, through warnings and through logging; a command's output is not the place."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
