"""The other layouts in which a model arrives, made from a folder in stable-audio-tools' layout.

Names are translated here by rules of their own, the other way round than exporters/diffusers_names.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
SIDE_FILES = ("model_config.json", "tokenizer.json", "LICENSE", "text_encoder", "tokenizer")


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def without_weights(folder: Path, target: Path) -> Path:
    """`target` with all of `folder` but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
        elif (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    return target


def save_shards(state: State, target: Path, stem: str = "model", shards: int = 3) -> Path:
    """Shards that take the keys in turn, and their index."""
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key, place in weight_map.items() if place == name}, target / name)
    total = sum(value.nbytes for value in state.values())
    index = target / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return index


def sharded(folder: Path, target: Path) -> Path:
    save_shards(weights(folder), without_weights(folder, target))
    return target


def bare_ckpt(folder: Path, target: Path) -> Path:
    """A state dict in a file of its own."""
    torch.save(weights(folder), without_weights(folder, target) / "model.ckpt")
    return target


def wrapped_state(state: State) -> State:
    """What stable-audio-tools' training calls the tensors; the DiT that is not averaged is another one."""
    wrapped = {f"diffusion.{key}": value for key, value in state.items()}
    for key, value in state.items():
        if key.startswith("model."):
            wrapped[f"diffusion.{key}"] = value + 1
            wrapped[f"diffusion_ema.ema_model.{key.removeprefix('model.')}"] = value
    wrapped["diffusion_ema.initted"] = torch.tensor(True)
    wrapped["diffusion_ema.step"] = torch.tensor(1000)
    return wrapped


def wrapped_ckpt(folder: Path, target: Path, **more: object) -> Path:
    """A checkpoint of PyTorch Lightning in the middle of a fine-tune; `more` are further entries of it."""
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": wrapped_state(weights(folder)),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 5e-5, "betas": (0.9, 0.999), "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 1000, "_last_lr": [5e-5]}],
        **more,
    }
    torch.save(content, without_weights(folder, target) / "epoch=3-step=1000.ckpt")
    return target


def diffusers(folder: Path, target: Path) -> Path:
    """A pipeline folder; of a model that it can hold: T5, Oobleck with snakes, heads of 64 or more."""
    config = json.loads((folder / "model_config.json").read_text())
    target.mkdir(parents=True, exist_ok=True)
    for name in ("text_encoder", "tokenizer"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
    for part, settings in part_configs(config).items():
        write_json(target / part, settings)
    write_json(target / "model_index.json", INDEX)
    parts: dict[str, State] = {"transformer": {}, "vae": {}, "projection_model": {}}
    blocks = len(config["model"]["pretransform"]["config"]["encoder"]["config"]["strides"])
    for key, value in weights(folder).items():
        for part, name, tensor in in_diffusers(key, value, blocks):
            parts[part][name] = tensor.contiguous()
    for part, state in parts.items():
        save_file(state, target / part / "diffusion_pytorch_model.safetensors")
    return target


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


INDEX = {
    "_class_name": "StableAudioPipeline",
    "_diffusers_version": "0.42.1",
    "projection_model": ["stable_audio", "StableAudioProjectionModel"],
    "scheduler": ["diffusers", "CosineDPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "StableAudioDiTModel"],
    "vae": ["diffusers", "AutoencoderOobleck"],
}
SCHEDULER = {
    "_class_name": "CosineDPMSolverMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "sigma_data": 1.0,
    "sigma_max": 500,
    "sigma_min": 0.3,
    "sigma_schedule": "exponential",
    "solver_order": 2,
    "solver_type": "midpoint",
}


def part_configs(config: dict) -> dict[str, dict]:
    """The JSON files of a pipeline by path, from a model_config.json."""
    model = config["model"]
    dit, autoencoder = model["diffusion"]["config"], model["pretransform"]["config"]
    encoder, decoder = (autoencoder[half]["config"] for half in ("encoder", "decoder"))
    prompt, start, total = (entry["config"] for entry in model["conditioning"]["configs"])
    assert start == total
    head = dit["embed_dim"] // dit["num_heads"]
    return {
        "transformer/config.json": {
            "_class_name": "StableAudioDiTModel",
            "sample_size": config["sample_size"] // autoencoder["downsampling_ratio"],
            "in_channels": dit["io_channels"],
            "out_channels": dit["io_channels"],
            "num_layers": dit["depth"],
            "attention_head_dim": head,
            "num_attention_heads": dit["num_heads"],
            "num_key_value_attention_heads": dit["cond_token_dim"] // head,
            "cross_attention_dim": dit["cond_token_dim"],
            "cross_attention_input_dim": dit["cond_token_dim"],
            "global_states_input_dim": dit["global_cond_dim"],
            "time_proj_dim": 256,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderOobleck",
            "encoder_hidden_size": encoder["channels"],
            "downsampling_ratios": encoder["strides"],
            "channel_multiples": encoder["c_mults"],
            "decoder_channels": decoder["channels"],
            "decoder_input_channels": decoder["latent_dim"],
            "audio_channels": decoder["out_channels"],
            "sampling_rate": config["sample_rate"],
        },
        "projection_model/config.json": {
            "_class_name": "StableAudioProjectionModel",
            "text_encoder_dim": model["conditioning"]["cond_dim"],
            "conditioning_dim": model["conditioning"]["cond_dim"],
            "min_value": start["min_val"],
            "max_value": start["max_val"],
        },
        "tokenizer/tokenizer_config.json": {"model_max_length": prompt["max_length"], "tokenizer_class": "T5Tokenizer"},
        "scheduler/scheduler_config.json": SCHEDULER,
    }


_RULES = {  # in this order
    "transformer": (
        (r"^model\.model\.", ""),
        (r"^timestep_features", "time_proj"),
        (r"^to_timestep_embed", "timestep_proj"),
        (r"^to_global_embed", "global_proj"),
        (r"^to_cond_embed", "cross_attention_proj"),
        (r"^transformer\.project_", "proj_"),
        (r"^transformer\.layers", "transformer_blocks"),
        (r"self_attn", "attn1"),
        (r"cross_attn", "attn2"),
        (r"to_out", "to_out.0"),
        (r"pre_norm", "norm1"),
        (r"cross_attend_norm", "norm2"),
        (r"ff_norm", "norm3"),
        (r"ff\.ff", "ff.net"),
        (r"gamma$", "weight"),
        (r"beta$", "bias"),
    ),
    "projection_model": (
        (r"^conditioner\.conditioners\.", ""),
        (r"^seconds_start\.embedder\.embedding", "start_number_conditioner.time_positional_embedding"),
        (r"^seconds_total\.embedder\.embedding", "end_number_conditioner.time_positional_embedding"),
    ),
}


def in_diffusers(key: str, value: Tensor, blocks: int) -> list[tuple[str, str, Tensor]]:
    """(part, name, tensor) of what one tensor becomes."""
    if key.startswith("pretransform."):
        name = _autoencoder_name(key.removeprefix("pretransform.model."), blocks)
        return [("vae", name, value[None, :, None] if name.endswith(("alpha", "beta")) else value)]
    part = "transformer" if key.startswith("model.") else "projection_model"
    name = key
    for pattern, text in _RULES[part]:
        name = re.sub(pattern, text, name)
    if name.endswith("inv_freq"):
        return []
    if name == "time_proj.weight":
        value = value[:, 0]
    for fused in ("qkv", "kv"):
        if f".to_{fused}." in name:
            pieces = value.chunk(len(fused))
            return [(part, name.replace(f"to_{fused}", f"to_{one}"), piece) for one, piece in zip(fused, pieces)]
    return [(part, name, value)]


def _autoencoder_name(key: str, blocks: int) -> str:
    half, _, first, *inner, leaf = key.split(".")
    if first == "0":
        return f"{half}.conv1.{leaf}"
    if int(first) > blocks:
        return f"{half}.{('snake1', 'conv2')[int(first) - blocks - 1]}.{leaf}"
    place = f"{half}.block.{int(first) - 1}"
    part = int(inner[1])
    units, others = (
        (range(3), {3: "snake1", 4: "conv1"}) if half == "encoder" else (range(2, 5), {0: "snake1", 1: "conv_t1"})
    )
    if part in units:
        return f"{place}.res_unit{units.index(part) + 1}.{('snake1', 'conv1', 'snake2', 'conv2')[int(inner[3])]}.{leaf}"
    return f"{place}.{others[part]}.{leaf}"
