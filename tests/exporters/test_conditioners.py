"""The context is as stable-audio-tools makes it, in the order of a config; what is not supported is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG, random_model, t5_config, write_t5

from dit_trt.engines.errors import UserError
from dit_trt.exporters.conditioners import MultiConditioner
from dit_trt.exporters.float_graphs import ModelSizes
from dit_trt.runtime.tokens import PromptTokenizer
from peers import require, stable_audio_tools

RELATIVE = 1e-5
PROMPTS = ["dog barking", "", "rain 🌧 " + "cat " * 200, "a puppy woofs at the siren"]


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = RELATIVE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def theirs(config: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """stable-audio-tools' conditioners of `config`, its T5 in `folder`, random weights elsewhere."""
    require("transformers")
    module = stable_audio_tools("models.conditioners")
    conditioning = copy.deepcopy(config["model"]["conditioning"])
    prompt = conditioning["configs"][0]["config"]
    width = prompt.pop("encoder")["d_model"]
    prompt["t5_model_name"] = str(folder)
    monkeypatch.setattr(module.T5Conditioner, "T5_MODELS", [str(folder)])
    monkeypatch.setattr(module.T5Conditioner, "T5_MODEL_DIMS", {str(folder): width})
    torch.manual_seed(0)
    return module.create_multi_conditioner_from_conditioning_config(conditioning).eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # of the peer's own autocast
@pytest.mark.parametrize(
    ("kind", "width", "project"), [("relu", 64, False), ("gated-gelu", 40, False), ("relu", 64, True)]
)
@pytest.mark.parametrize("numbers", [("seconds_start", "seconds_total"), ("seconds_total",)])
def test_equals_stable_audio_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, width: int, project: bool, numbers: tuple[str, ...]
) -> None:
    changes = {"feed_forward_proj": kind, "d_model": width}
    config = t5_config(numbers, 128, **changes)
    config["model"]["conditioning"]["configs"][0]["config"] |= {"project_out": project, "enable_grad": False}
    folder = write_t5(tmp_path / "t5", **changes)
    peer = theirs(config, folder, monkeypatch)
    ours = MultiConditioner(config).eval()
    weights = load_file(folder / "model.safetensors")  # in fp16 there; so rounded, both compute in fp32 below
    state = {f"conditioners.prompt.model.{key}": value.half().float() for key, value in weights.items()}
    assert not any(name in state for name in peer.state_dict()), "T5 would be in the checkpoint"
    ours.load_state_dict(state | peer.state_dict())
    assert ("conditioners.prompt.proj_out.weight" in peer.state_dict()) == (project or width == 40)

    seconds = {"seconds_start": [0.0, 1.0, 0.5, 3.0], "seconds_total": [0.7, 4.0, 2.0, 9.0]}
    asked = [{"prompt": text, **{name: seconds[name][i] for name in numbers}} for i, text in enumerate(PROMPTS)]
    tokenizer = PromptTokenizer(folder / "tokenizer.json", 128, special_tokens=True)
    ids, mask = (torch.cat([torch.from_numpy(tokenizer(text)[i]) for text in PROMPTS]) for i in (0, 1))
    cross, global_embed = ours(ids, mask, *(torch.tensor(seconds[name]) for name in numbers))
    assert cross.shape == (4, 128 + len(numbers), 64)

    half = peer(asked, "cpu")["prompt"][0].float()
    assert_close(cross[:, :128], half, 0.02)
    peer.conditioners["prompt"].model.float()
    made = peer(asked, "cpu")
    assert_close(cross, torch.cat([made[name][0] for name in ("prompt", *numbers)], dim=1))
    assert_close(global_embed, torch.cat([made[name][0][:, 0] for name in numbers], dim=1))
    assert made["prompt"][1].long().equal(mask)
    assert not cross[:, :128][mask == 0].any() and cross[:, :128][mask == 1].any(1).all()


ORDERS = [
    (("seconds_start", "seconds_total"), ("seconds_start", "seconds_total")),
    (("seconds_total", "seconds_start"), ("seconds_total", "seconds_start")),
    (("seconds_total", "seconds_start"), ("seconds_start", "seconds_total")),
    (("seconds_start", "seconds_total"), ("seconds_total",)),
    (("seconds_total",), ("seconds_total",)),
]


def of_order(numbers: tuple[str, ...], global_ids: tuple[str, ...]) -> dict:
    config = t5_config(numbers)
    config["model"]["diffusion"]["global_cond_ids"] = list(global_ids)
    config["model"]["diffusion"]["config"]["global_cond_dim"] = 64 * len(global_ids)
    return config


@torch.no_grad()
@pytest.mark.parametrize(("numbers", "global_ids"), ORDERS)
def test_tokens_and_global_vector_follow_the_config(numbers: tuple[str, ...], global_ids: tuple[str, ...]) -> None:
    config = of_order(numbers, global_ids)
    sizes = ModelSizes(config)
    assert (sizes.prompt_tokens, sizes.context_tokens) == (16, 16 + len(numbers))
    module = random_model(config=config).conditioner
    values = {name: torch.tensor([float(i), 2.5]) for i, name in enumerate(numbers)}
    ids, mask = torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    cross, global_embed = module(ids, mask, *values.values())
    made = {name: module.conditioners[name](value) for name, value in values.items()}
    assert cross[:, 16:].equal(torch.stack([made[name] for name in numbers], dim=1))
    assert global_embed.equal(torch.cat([made[name] for name in global_ids], dim=1))
    with pytest.raises(ValueError, match="zip"):
        module.numbers(*values.values(), torch.zeros(2))


def test_stable_audio_tools_default_length() -> None:
    config = t5_config(max_length=5)
    assert ModelSizes(config).prompt_tokens == 5
    del config["model"]["conditioning"]["configs"][0]["config"]["max_length"]
    assert ModelSizes(config).prompt_tokens == 128


def entry(config: dict, index: int) -> dict:
    return config["model"]["conditioning"]["configs"][index]


def ids_of(config: dict, kind: str, *names: str) -> None:
    config["model"]["diffusion"][f"{kind}_cond_ids"] = list(names)


REFUSED: dict[str, tuple[Callable[[dict], object], str]] = {
    "prompt not first": (
        lambda c: ids_of(c, "cross_attention", "seconds_start", "prompt", "seconds_total"),
        "cross_attention_cond_ids=['seconds_start', 'prompt', 'seconds_total'] is not supported",
    ),
    "no prompt": (
        lambda c: ids_of(c, "cross_attention", "seconds_total"),
        "cross_attention_cond_ids=['seconds_total']",
    ),
    "no seconds_total": (
        lambda c: ids_of(c, "cross_attention", "prompt", "seconds_start"),
        "cross_attention_cond_ids=['prompt', 'seconds_start'] is not supported",
    ),
    "another number": (
        lambda c: ids_of(c, "cross_attention", "prompt", "seconds_total", "bpm"),
        "cross_attention_cond_ids=['prompt', 'seconds_total', 'bpm'] is not supported",
    ),
    "a number twice": (
        lambda c: ids_of(c, "cross_attention", "prompt", "seconds_total", "seconds_total"),
        "cross_attention_cond_ids=",
    ),
    "no ids": (lambda c: c["model"]["diffusion"].pop("cross_attention_cond_ids"), "cross_attention_cond_ids=[]"),
    "a global number of no token": (
        lambda c: ids_of(c, "cross_attention", "prompt", "seconds_total"),
        "global_cond_ids=['seconds_start', 'seconds_total'] is not supported (only some of ['seconds_total'])",
    ),
    "a global prompt": (lambda c: ids_of(c, "global", "prompt"), "global_cond_ids=['prompt'] is not supported"),
    "no global number": (lambda c: ids_of(c, "global"), "global_cond_ids=[] is not supported"),
    "a global number twice": (lambda c: ids_of(c, "global", *["seconds_total"] * 2), "global_cond_ids="),
    "a conditioner of no list": (
        lambda c: c["model"]["conditioning"]["configs"].append({"id": "bpm", "type": "number", "config": {}}),
        "the conditioners 'bpm' are not of cross_attention_cond_ids",
    ),
    "a conditioner twice": (
        lambda c: c["model"]["conditioning"]["configs"].append(dict(entry(c, 1))),
        "the conditioners 'seconds_start' are not of cross_attention_cond_ids, or are there twice",
    ),
    "a missing conditioner": (
        lambda c: c["model"]["conditioning"]["configs"].pop(),
        "this model's conditioning lacks seconds_total",
    ),
    "a prompt of another kind": (
        lambda c: entry(c, 0).update(type="clap_text"),
        "the conditioner 'prompt' is of type 'clap_text'; supported: t5, token_table",
    ),
    "a number of another kind": (
        lambda c: entry(c, 1).update(type="int"),
        "the conditioner 'seconds_start' is of type 'int'; supported: number",
    ),
    "a setting of t5": (
        lambda c: entry(c, 0)["config"].update(layer=-2, pooled=True),
        "the conditioner 'prompt' has settings that are not supported: layer, pooled",
    ),
    "a setting of a number": (
        lambda c: entry(c, 2)["config"].update(fourier_features_type="log"),
        "the conditioner 'seconds_total' has settings that are not supported: fourier_features_type",
    ),
    "an empty range": (lambda c: entry(c, 1)["config"].update(min_val=4), "min_val 4 must be below its max_val 4"),
    "an endless range": (lambda c: entry(c, 1)["config"].update(max_val=float("inf")), "max_val inf"),
    "settings of all": (
        lambda c: c["model"]["conditioning"].update(pre_encoded_keys=["prompt"]),
        "model.conditioning has settings that are not supported: pre_encoded_keys",
    ),
    "no encoder": (
        lambda c: entry(c, 0)["config"].pop("encoder"),
        "the checkpoint does not contain the text encoder t5-base; give its folder with --text-encoder DIR",
    ),
    "an encoder of another kind": (
        lambda c: entry(c, 0)["config"]["encoder"].update(model_type="umt5"),
        "this T5 encoder is not supported: model_type='umt5'",
    ),
    **{
        f"{length} tokens": (
            lambda c, length=length: entry(c, 0)["config"].update(max_length=length),  # type: ignore[misc]
            f"the conditioner 'prompt' has max_length={length}, which must be in 1..2048",
        )
        for length in (0, -1, 2049, 10**9)
    },
    "another width": (
        lambda c: c["model"]["conditioning"].update(cond_dim=32),
        "conditioning.cond_dim 32 and diffusion.config.cond_token_dim 64 must be equal",
    ),
    "another global width": (
        lambda c: c["model"]["diffusion"]["config"].update(global_cond_dim=64),
        "global_cond_ids are 2 of cond_dim 64: diffusion.config.global_cond_dim must be 128",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named(change: Callable[[dict], object], said: str) -> None:
    config = t5_config()
    change(config)
    with pytest.raises(UserError) as error, torch.device("meta"):
        ModelSizes(config)
        MultiConditioner(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_setting_of_the_token_table_is_named() -> None:
    config: dict = copy.deepcopy(CONFIG)
    entry(config, 0)["config"]["dropout"] = 0.1
    with pytest.raises(UserError, match="the conditioner 'prompt' has settings that are not supported: dropout"):
        ModelSizes(config)


def test_settings_that_say_nothing_are_passed_over() -> None:
    config = t5_config()
    config["model"]["conditioning"] |= {"default_keys": {}, "pre_encoded_keys": []}
    entry(config, 0)["config"]["enable_grad"] = True
    assert ModelSizes(config).context_tokens == 18
