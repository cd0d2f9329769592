"""A Stable Audio pipeline as diffusers saves it, seen as a checkpoint of stable-audio-tools.

In: a folder with `model_index.json` and a folder for each part (`transformer/`, `vae/`, `projection_model/`, ...). Out:
the `model_config.json` that stable-audio-tools would have, and the tensors under its names.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..engines.errors import UserError
from ..engines.home import read_json
from .checks import is_size
from .diffusers_names import autoencoder_names, dit_names, number_names, origins
from .dit import TIMESTEP_FEATURES, RotaryEmbedding
from .linears import DIT_PREFIX
from .tensor_files import Computed, Origin, Renamed, TensorSource, open_weights

INDEX = "model_index.json"
_REQUIRED = object()
_LONGEST_PROMPT = 4096  # tokens; a tokenizer without a limit of its own says 10^30

# The settings of each part's config.json, with diffusers' defaults.
_SETTINGS: dict[str, dict[str, object]] = {
    "transformer": {
        "sample_size": 1024,
        "in_channels": 64,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "num_key_value_attention_heads": 12,
        "out_channels": 64,
        "cross_attention_dim": 768,
        "time_proj_dim": 256,
        "global_states_input_dim": 1536,
        "cross_attention_input_dim": 768,
    },
    "vae": {
        "encoder_hidden_size": 128,
        "downsampling_ratios": [2, 4, 4, 8, 8],
        "channel_multiples": [1, 2, 4, 8, 16],
        "decoder_channels": 128,
        "decoder_input_channels": 64,
        "audio_channels": 2,
        "sampling_rate": 44100,
    },
    "projection_model": {
        "text_encoder_dim": _REQUIRED,
        "conditioning_dim": _REQUIRED,
        "min_value": _REQUIRED,
        "max_value": _REQUIRED,
    },
}
# What the scheduler says of the model. The rest is of sampling, which is chosen at run time.
_SCHEDULER = {"prediction_type": "v_prediction", "sigma_data": 1.0}
_SAMPLING = (
    "sigma_min",
    "sigma_max",
    "sigma_schedule",
    "num_train_timesteps",
    "solver_order",
    "rho",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
)
_CLASSES = {
    "transformer": ("StableAudioDiTModel",),
    "vae": ("AutoencoderOobleck",),
    "projection_model": ("StableAudioProjectionModel",),
    "scheduler": ("CosineDPMSolverMultistepScheduler",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
}


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (folder / INDEX).is_file() and (folder / "transformer").is_dir()


def read_diffusers(folder: Path) -> tuple[dict, TensorSource]:
    """(model_config, tensors) of a pipeline folder.

    Raises UserError naming every setting that this package does not implement, a file that is missing, and weights
    that are not those of the configuration.
    """
    faults: list[str] = []
    _check_index(read_json(folder / INDEX), faults)
    parts = {part: _settings(folder, part, faults) for part in _SETTINGS}
    _check_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"), faults)
    tokens = read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", 0)
    if not is_size(tokens) or tokens > _LONGEST_PROMPT:
        faults.append(f"tokenizer model_max_length={tokens!r} (a number of tokens up to {_LONGEST_PROMPT})")
    if not faults:
        _check_sizes(parts["transformer"], parts["vae"], parts["projection_model"], faults)
    if faults:
        raise UserError(f"{folder}: this pipeline is not supported: " + "; ".join(faults))
    config = _model_config(parts["transformer"], parts["vae"], parts["projection_model"], tokens)
    return config, _tensors(folder, parts["transformer"], parts["vae"])


def _check_index(index: dict, faults: list[str]) -> None:
    if (kind := index.get("_class_name")) != "StableAudioPipeline":
        faults.append(f"_class_name={kind!r} (only 'StableAudioPipeline')")
    for part, known in _CLASSES.items():
        value = index.get(part)
        name = value[-1] if isinstance(value, list) and value else value
        if name not in known:
            faults.append(f"{part}={name!r} (only {known[0]!r})")
    faults += [f"{name}={value!r} (unknown)" for name, value in index.items() if _is_odd(name, _CLASSES)]


def _is_odd(name: str, known: object) -> bool:
    """Whether a setting is one that nobody here knows; those with an underscore are diffusers' own notes."""
    return not name.startswith("_") and name not in known  # type: ignore[operator]


def _settings(folder: Path, part: str, faults: list[str]) -> dict:
    """The settings of a part, each of its type; what is wrong with them is added to `faults`."""
    config, defaults = read_json(folder / part / "config.json"), _SETTINGS[part]
    faults += [f"{part} {name}={value!r} (unknown)" for name, value in config.items() if _is_odd(name, defaults)]
    settings = {name: config.get(name, default) for name, default in defaults.items()}
    for name, value in settings.items():
        if value is _REQUIRED:
            faults.append(f"{part} lacks {name}")
        elif name in ("min_value", "max_value"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                faults.append(f"{part} {name}={value!r} (a number)")
        elif isinstance(defaults[name], list):
            if not isinstance(value, list) or not value or not all(map(is_size, value)):
                faults.append(f"{part} {name}={value!r} (a list of positive integers)")
        elif not is_size(value):
            faults.append(f"{part} {name}={value!r} (a positive integer)")
    return settings


def _check_scheduler(config: dict, faults: list[str]) -> None:
    for name, only in _SCHEDULER.items():
        if (value := config.get(name, only)) != only:
            faults.append(f"scheduler {name}={value!r} (only {only!r})")
    known = (*_SCHEDULER, *_SAMPLING)
    faults += [f"scheduler {name}={value!r} (unknown)" for name, value in config.items() if _is_odd(name, known)]


def _check_sizes(dit: dict, vae: dict, projection: dict, faults: list[str]) -> None:
    """Sizes that diffusers lets one choose and stable-audio-tools ties together."""
    ratios, head = vae["downsampling_ratios"], dit["attention_head_dim"]
    tied = (
        ("transformer out_channels", dit["out_channels"], dit["in_channels"]),
        ("transformer time_proj_dim", dit["time_proj_dim"], TIMESTEP_FEATURES),
        ("transformer cross_attention_dim", dit["cross_attention_dim"], dit["num_key_value_attention_heads"] * head),
        ("transformer cross_attention_input_dim", dit["cross_attention_input_dim"], dit["cross_attention_dim"]),
        ("transformer global_states_input_dim", dit["global_states_input_dim"], 2 * projection["conditioning_dim"]),
        ("projection_model conditioning_dim", projection["conditioning_dim"], dit["cross_attention_input_dim"]),
        ("projection_model text_encoder_dim", projection["text_encoder_dim"], projection["conditioning_dim"]),
        ("vae decoder_input_channels", vae["decoder_input_channels"], dit["in_channels"]),
        ("vae encoder_hidden_size", vae["encoder_hidden_size"], 2 * vae["decoder_input_channels"]),
        ("the length of vae channel_multiples", len(vae["channel_multiples"]), len(ratios)),
    )
    faults += [
        f"{name}={found} (only {expected} with the other sizes)" for name, found, expected in tied if found != expected
    ]
    if head < 64 or head % 4:  # stable-audio-tools rotates at least 32 channels, diffusers half a head
        faults.append(f"transformer attention_head_dim={head} (a multiple of 4 from 64 on)")
    if projection["min_value"] >= projection["max_value"]:
        faults.append(f"projection_model min_value={projection['min_value']} (less than max_value)")


def _model_config(dit: dict, vae: dict, projection: dict, tokens: int) -> dict:
    ratio, latent_dim, audio_channels = math.prod(vae["downsampling_ratios"]), dit["in_channels"], vae["audio_channels"]
    half = {"c_mults": vae["channel_multiples"], "strides": vae["downsampling_ratios"], "use_snake": True}
    encoder = {"in_channels": audio_channels, "channels": vae["encoder_hidden_size"], "latent_dim": 2 * latent_dim}
    decoder = {"out_channels": audio_channels, "channels": vae["decoder_channels"], "latent_dim": latent_dim}
    seconds = {"type": "number", "config": {"min_val": projection["min_value"], "max_val": projection["max_value"]}}
    return {
        "model_type": "diffusion_cond",
        "sample_size": dit["sample_size"] * ratio,
        "sample_rate": vae["sampling_rate"],
        "audio_channels": audio_channels,
        "model": {
            "pretransform": {
                "type": "autoencoder",
                "iterate_batch": True,
                "config": {
                    "encoder": {"type": "oobleck", "requires_grad": False, "config": encoder | half},
                    "decoder": {"type": "oobleck", "config": decoder | half | {"final_tanh": False}},
                    "bottleneck": {"type": "vae"},
                    "latent_dim": latent_dim,
                    "downsampling_ratio": ratio,
                    "io_channels": audio_channels,
                },
            },
            "conditioning": {
                "configs": [
                    {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": tokens}},
                    {"id": "seconds_start", **seconds},
                    {"id": "seconds_total", **seconds},
                ],
                "cond_dim": projection["conditioning_dim"],
            },
            "diffusion": {
                "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
                "global_cond_ids": ["seconds_start", "seconds_total"],
                "type": "dit",
                "config": {
                    "io_channels": latent_dim,
                    "embed_dim": dit["num_attention_heads"] * dit["attention_head_dim"],
                    "depth": dit["num_layers"],
                    "num_heads": dit["num_attention_heads"],
                    "cond_token_dim": dit["cross_attention_input_dim"],
                    "global_cond_dim": dit["global_states_input_dim"],
                    "project_cond_tokens": False,
                    "transformer_type": "continuous_transformer",
                },
            },
            "io_channels": latent_dim,
        },
    }


def _tensors(folder: Path, dit: dict, vae: dict) -> Renamed:
    found: dict[str, Origin] = {}
    sources = {part: open_weights(folder / part) for part in _SETTINGS}
    names = {
        "transformer": dit_names(dit["num_layers"]),
        "vae": autoencoder_names(len(vae["downsampling_ratios"]), sources["vae"].shapes),
        "projection_model": number_names(),
    }
    for part, source in sources.items():
        found |= origins(source, names[part], folder / part)
    key = DIT_PREFIX + "transformer.rotary_pos_emb.inv_freq"
    frequencies = RotaryEmbedding(dit["attention_head_dim"] // 2).inv_freq.numpy()
    computed = Computed(folder / "transformer" / "config.json", {key: frequencies})
    return Renamed(found | {key: Origin(computed, (key,))})
