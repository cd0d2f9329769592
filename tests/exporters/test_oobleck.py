"""Our Oobleck against stable-audio-tools' and diffusers', random weights; its refusals, its reach, its graphs."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import OOBLECK, write_oobleck_checkpoint

import peers
from dit_trt.engines.errors import UserError
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.checkpoint import Checkpoint, fold_weight_norm
from dit_trt.exporters.float_graphs import ModelSizes, export_topologies, graph_names
from dit_trt.exporters.oobleck import (
    Half,
    OobleckConfig,
    OobleckDecoder,
    OobleckEncoder,
    decoder_radius,
    encoder_radius,
)
from dit_trt.exporters.pretransforms import decoder_from_config, encoder_from_config
from dit_trt.exporters.qdq import write_graph
from dit_trt.runtime.tiles import decode_tiles, encode_tiles

TOLERANCE = 1e-5  # max |difference| / max |reference|, fp32


def pretransform(
    strides: list[int],
    latent_dim: int = 3,
    channels: int = 2,
    scale: float = 1.0,
    final_tanh: bool = False,
    **both: object,
) -> dict:
    half = {"channels": channels, "strides": strides, "c_mults": list(range(1, len(strides) + 1)), **both}
    return {
        "type": "autoencoder",
        "scale": scale,
        "config": {
            "encoder": {"type": "oobleck", "config": {"in_channels": channels, "latent_dim": 2 * latent_dim, **half}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": channels, "latent_dim": latent_dim, "final_tanh": final_tanh, **half},
            },
            "bottleneck": {"type": "vae"},
            "latent_dim": latent_dim,
            "downsampling_ratio": math.prod(strides),
            "io_channels": channels,
        },
    }


def defaults_of_stable_audio_tools() -> dict:
    """Only what has no default there: strides 2, 4, 8, 8, ELU, and a tanh at the end."""
    config = pretransform([2, 4, 8, 8], latent_dim=16)
    config["config"]["io_channels"] = 2
    config["config"]["encoder"]["config"] = {"channels": 2}
    config["config"]["decoder"]["config"] = {"channels": 2, "latent_dim": 16}
    del config["scale"]
    return config


PRETRANSFORMS = {
    "stable audio open, few channels": pretransform([2, 4, 4, 8, 8], latent_dim=4, use_snake=True),
    "tiny": OOBLECK,
    "odd strides, tanh, scaled": pretransform([3, 5], final_tanh=True, use_snake=True, scale=1.7),
    "odd and even, mono, ELU": pretransform([2, 3, 4], channels=1, use_snake=False),
    "defaults": defaults_of_stable_audio_tools(),
}
every_kind = pytest.mark.parametrize("config", PRETRANSFORMS.values(), ids=PRETRANSFORMS)


def folded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of theirs in ours' form: no weight norm."""
    found = {}
    for name, value in state.items():
        if name.endswith("weight_g"):
            weight = fold_weight_norm(value.numpy(), state[name[:-1] + "v"].numpy())
            found[name.removesuffix("_g")] = torch.from_numpy(weight)
        elif not name.endswith("weight_v"):
            found[name] = value
    return found


def ours(config: dict, state: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our encoder and decoder graphs with `state`, which they must match key by key."""
    model = {"model": {"pretransform": config}}
    modules = []
    for name, make in (("encoder", encoder_from_config), ("decoder", decoder_from_config)):
        module = make(model).eval().requires_grad_(False)
        module.load_state_dict({key: value for key, value in state.items() if key.startswith(f"model.{name}.")})
        modules.append(module)
    assert sum(len(module.state_dict()) for module in modules) == len(state)
    return modules[0], modules[1]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@every_kind
@torch.no_grad()
def test_equals_stable_audio_tools(config: dict) -> None:
    theirs = peers.oobleck(config)
    encoder, decoder = ours(config, folded(theirs.state_dict()))
    latents = draw(2, config["config"]["latent_dim"], 5)
    assert_close(decoder(latents), theirs.decode(latents))
    audio = draw(2, config["config"]["io_channels"], 5 * config["config"]["downsampling_ratio"])
    mean, stdev = encoder(audio)
    torch.manual_seed(0)
    expected = theirs.encode(audio)
    torch.manual_seed(0)
    assert_close(mean + stdev * torch.randn_like(mean), expected)
    assert mean.shape == latents.shape and stdev.min() > 0
    assert (stdev / mean.abs().mean()).max() > 0.1, "noise too small to show a wrong stdev"


def from_diffusers(name: str) -> str:
    """A key of diffusers' AutoencoderOobleck with three blocks -> ours."""
    half, _, rest = name.partition(".")
    for old, new in (("conv1", "0"), ("snake1", "4"), ("conv2", "5")):
        if rest.startswith(old + "."):
            return f"model.{half}.layers.{new}.{rest.removeprefix(old + '.')}"
    _, block, part, *inner = rest.split(".")
    first = 0 if half == "encoder" else 2  # a decoder's block begins with its snake and transposed convolution
    if part.startswith("res_unit"):
        layer = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}[inner.pop(0)]
        place = f"{first + int(part[-1]) - 1}.layers.{layer}"
    else:
        place = {"snake1": "3", "conv1": "4"}[part] if half == "encoder" else {"snake1": "0", "conv_t1": "1"}[part]
    return f"model.{half}.layers.{int(block) + 1}.layers.{place}.{inner[0]}"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_diffusers() -> None:
    module = peers.require("diffusers.models.autoencoders.autoencoder_oobleck")
    sizes = {"downsampling_ratios": [3, 4, 8], "channel_multiples": [1, 2, 3]}
    theirs = module.AutoencoderOobleck(8, decoder_channels=8, decoder_input_channels=4, **sizes).eval()
    state = {from_diffusers(name): value for name, value in peers.randomize_autoencoder(theirs).state_dict().items()}
    state = {name: value.flatten() if name.endswith(("alpha", "beta")) else value for name, value in state.items()}
    config = pretransform([3, 4, 8], latent_dim=4, use_snake=True)
    for half, audio in (("encoder", "in_channels"), ("decoder", "out_channels")):
        config["config"][half]["config"] |= {"channels": 8, audio: 2}
    encoder, decoder = ours(config, folded(state))
    latents, audio = draw(2, 4, 7), draw(2, 2, 7 * 96)
    assert_close(decoder(latents), theirs.decode(latents).sample)
    found, expected = encoder(audio), theirs.encode(audio).latent_dist
    assert_close(found[0], expected.mean)
    assert_close(found[1], expected.std)


@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_folding_is_the_inverse_of_torch_weight_norm(kind: type, norm) -> None:  # type: ignore[no-untyped-def]
    """Of a transposed convolution, too: torch norms its first axis, there the input's."""
    module = peers.randomize_autoencoder(norm(kind(3, 5, 4)))
    module(torch.zeros(1, 3, 9))  # the old one works its weight out here
    g, v = list(module.state_dict().values())[1:]
    np.testing.assert_allclose(fold_weight_norm(g.numpy(), v.numpy()), module.weight.detach().numpy(), rtol=1e-6)
    assert g.shape == (v.shape[0], 1, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(write_oobleck_checkpoint(tmp_path_factory.mktemp("oobleck"), peers.oobleck(OOBLECK))))


def test_checkpoint_folds_both_forms_of_weight_norm(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_oobleck_checkpoint(tmp_path / "new", peers.oobleck(OOBLECK))
    state = load_file(folder / "model.safetensors")
    rename = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for key in [key for key in state if key.endswith(tuple(rename))]:
        head, _, tail = key.rpartition(".")
        state[f"{head}.{rename[tail]}"] = state.pop(key)
    save_file(state, folder / "model.safetensors")
    renamed = Checkpoint.open(str(folder))
    expected = folded(peers.oobleck(OOBLECK).state_dict())
    for key, value in expected.items():
        for opened in (checkpoint, renamed):
            np.testing.assert_array_equal(opened.tensor(f"pretransform.{key}"), value.numpy())
    with pytest.raises(UserError, match=r"lacks pretransform.model.decoder.layers.9.weight: not a checkpoint"):
        checkpoint.tensor("pretransform.model.decoder.layers.9.weight")


@torch.no_grad()
def test_graphs_equal_their_modules_on_the_engine(checkpoint: Checkpoint, home: Path, tmp_path: Path) -> None:
    encoder, decoder = ours(OOBLECK, folded(peers.oobleck(OOBLECK).state_dict()))
    assert graph_names(checkpoint.config)[-1] == "encoder"
    topologies = export_topologies(checkpoint.config, home / "graphs")
    for name in ("encoder", "decoder"):
        path = tmp_path / f"{name}.onnx"
        write_graph(topologies[name], path, checkpoint.tensor)
        onnx.checker.check_model(str(path), full_check=True)
        kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert kinds & {"ReduceL2", "ReduceSumSquare", "Div", "Sqrt"} == set(), "weight norm is in the graph"
    for batch, length in ((1, 3), (2, 11)):
        latents, audio = draw(batch, 16, length), draw(batch, 2, length * 256)
        engine = OpenVINOEngine(tmp_path / "decoder.onnx", {"latents": tuple(latents.shape)})
        assert_close(torch.from_numpy(engine.run({"latents": latents.numpy()})["audio"]), decoder(latents))
        engine = OpenVINOEngine(tmp_path / "encoder.onnx", {"audio": tuple(audio.shape)})
        outputs = engine.run({"audio": audio.numpy()})
        for found, expected in zip(("mean", "stdev"), encoder(audio), strict=True):
            assert_close(torch.from_numpy(outputs[found]), expected)


STRIDES = [(2, 4, 4, 8, 8), (3, 5), (2,), (4, 8, 8), (7, 2, 3), (8, 4, 2)]


def positive(module: torch.nn.Module) -> torch.nn.Module:
    """All weights 1 / fan in, no biases: with ELU and nothing negative coming in, what is reached is not zero."""
    for name, value in module.double().requires_grad_(False).named_parameters():
        value.fill_(0 if name.endswith("bias") else 1 / value[0].numel())
    return module


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@torch.no_grad()
def test_the_radius_is_what_one_latent_reaches(strides: tuple[int, ...]) -> None:
    half = Half(1, 1, 2, (1,) * len(strides), strides)
    ratio, middle = math.prod(strides), 30
    latents = torch.zeros(1, 2, 2 * middle + 1, dtype=torch.float64)
    latents[..., middle] = 1
    touched = positive(OobleckDecoder(half))(latents)[0, 0].nonzero().flatten() // ratio
    assert decoder_radius(strides) == max(middle - int(touched.min()), int(touched.max()) - middle)
    audio = torch.zeros(1, 1, ratio * (2 * middle + 1), dtype=torch.float64)
    audio[..., middle * ratio : (middle + 1) * ratio] = 1
    touched = positive(OobleckEncoder(half))(audio)[0, 0].nonzero().flatten()
    assert encoder_radius(strides) == max(middle - int(touched.min()), int(touched.max()) - middle)


def test_the_published_sizes_of_stable_audio_open() -> None:
    half = {"channels": 128, "c_mults": (1, 2, 4, 8, 16), "strides": (2, 4, 4, 8, 8), "use_snake": True}
    with torch.device("meta"):
        encoder, decoder = OobleckEncoder(Half(latent_dim=128, **half)), OobleckDecoder(Half(latent_dim=64, **half))
    weights = [(name, v) for module in (encoder, decoder) for name, v in module.named_parameters()]
    norms = sum(value.shape[0] for name, value in weights if name.endswith("weight"))  # the g of weight norm
    assert sum(value.numel() for _, value in weights) + norms == 156_112_514
    assert (decoder_radius(half["strides"]), encoder_radius(half["strides"])) == (10, 8)


@every_kind
@pytest.mark.parametrize(("length", "extra"), [(61, 1), (90, 17), (73, 100)])
@torch.no_grad()
def test_tiles_equal_the_whole(config: dict, length: int, extra: int) -> None:
    """In float64, so that the tolerance is far below what a wrong sample would be: rounding differs with the length."""
    encoder, decoder = ours(config, folded(peers.oobleck(config).state_dict()))
    sizes = OobleckConfig.from_pretransform(config)
    overlap, ratio = sizes.tiling(1000)["tile_overlap"], sizes.downsampling_ratio
    tile = min(2 * overlap + extra, length)
    latents = draw(1, sizes.latent_dim, length).double()
    seen: list[int] = []

    def decode(part: np.ndarray) -> np.ndarray:
        seen.append(part.shape[1])
        return decoder.double()(torch.from_numpy(part)[None])[0].numpy()

    whole = decoder.double()(latents)[0].numpy()
    found = decode_tiles(decode, latents[0].numpy(), tile, overlap, ratio)
    assert set(seen) == {tile} and len(seen) == max(1, math.ceil((length - 2 * overlap) / (tile - 2 * overlap)))
    assert found.shape == whole.shape
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-11 * np.abs(whole).max())

    audio = draw(1, sizes.encoder.audio_channels, length * ratio).double()
    encode = lambda part: tuple(x[0].numpy() for x in encoder.double()(torch.from_numpy(part)[None]))  # noqa: E731
    expected = [x[0].numpy() for x in encoder.double()(audio)]
    for part, want in zip(encode_tiles(encode, audio[0].numpy(), tile, overlap, ratio), expected, strict=True):
        assert part.shape == want.shape
        np.testing.assert_allclose(part, want, rtol=0, atol=1e-11 * np.abs(want).max())


def test_tiling_covers_the_model_with_few_equal_tiles() -> None:
    config = OobleckConfig.from_pretransform(PRETRANSFORMS["stable audio open, few channels"])
    assert config.tiling(1024) == {"tile_latents": 121, "tile_overlap": 10, "encoder_channels": 2}
    assert config.tiling(129)["tile_latents"] == 75
    for latents in (1, 15, 128):
        assert config.tiling(latents)["tile_latents"] == latents
    wide = OobleckConfig.from_pretransform(pretransform([3]))
    assert wide.tiling(10**6)["tile_latents"] > 2 * wide.tiling(10**6)["tile_overlap"]


def changed(path: str, value: object) -> dict:
    config = copy.deepcopy(OOBLECK)
    *parents, last = path.split("/")
    place: dict = config
    for name in parents:
        place = place[name]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("config/encoder/type", "dac", r"encoder.type='dac' \(only 'oobleck'\)"),
        ("config/decoder/type", "taae", "decoder.type='taae'"),
        ("config/bottleneck", {"type": "fsq", "config": {"levels": 8}}, r"bottleneck.type='fsq' \(only 'vae'\)"),
        ("config/bottleneck", None, "lacks or misstates"),
        ("config/encoder/config/antialias_activation", True, "encoder.antialias_activation=True"),
        ("config/decoder/config/antialias_activation", True, "decoder.antialias_activation=True"),
        ("config/decoder/config/use_nearest_upsample", True, "decoder.use_nearest_upsample=True"),
        ("config/decoder/config/transformer_depths", [3], r"decoder.transformer_depths=\[3\]"),
        ("config/decoder/soft_clip", True, "decoder.soft_clip=True"),
        ("config/pretransform", {"type": "pqmf"}, "pretransform={'type': 'pqmf'}"),
        ("config/downsampling_ratio", 512, "the product of decoder.strides is 256, .* asks for 512"),
        ("config/downsampling_ratio", "256", "downsampling_ratio='256'"),
        ("config/encoder/config/strides", [8, 16], "the product of encoder.strides is 128"),
        ("config/decoder/config/strides", [1, 256], r"decoder.strides=\[1, 256\]"),
        ("config/decoder/config/c_mults", [1, 2, 3], "decoder has 3 c_mults and 2 strides"),
        ("config/decoder/config/c_mults", 4, "decoder.c_mults=4"),
        ("config/decoder/config/channels", 1.5, "decoder.channels=1.5"),
        ("config/latent_dim", 8, "encoder.latent_dim is 32, .* asks for 16"),
        ("config/in_channels", 1, "encoder.in_channels is 2, .* asks for 1"),
        ("config/out_channels", 1, "decoder.out_channels is 2, .* asks for 1"),
        ("scale", 0, "scale=0"),
        ("sigmas", [1], r"sigmas=\[1\]"),
    ],
)
def test_unsupported_settings_are_refused_by_name(path: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        OobleckConfig.from_pretransform(changed(path, value))
    assert "\n" not in str(error.value)


def test_settings_that_change_nothing_are_passed_over() -> None:
    plain = OobleckConfig.from_pretransform(OOBLECK)
    for path, value in (
        ("chunked", True),
        ("model_half", True),
        ("config/decoder/requires_grad", True),
        ("config/decoder/config/use_nearest_upsample", False),
        ("config/decoder/soft_clip", False),
        ("config/in_channels", 2),
    ):
        assert OobleckConfig.from_pretransform(changed(path, value)) == plain
    assert OobleckConfig.from_pretransform(changed("scale", 2)).scale == 2


def test_all_faults_are_named_at_once() -> None:
    config = changed("config/decoder/config/antialias_activation", True)
    config["config"]["encoder"]["config"]["channels"] = 0
    config["config"]["latent_dim"] = None
    with pytest.raises(UserError, match=r"encoder.channels=0.*decoder.antialias_activation=True.*latent_dim=None"):
        OobleckConfig.from_pretransform(config)


def test_latents_that_the_diffusion_model_does_not_make(checkpoint: Checkpoint) -> None:
    config = copy.deepcopy(checkpoint.config)
    config["model"]["diffusion"]["config"]["io_channels"] = 12
    with pytest.raises(UserError, match="latent_dim 16, the DiT io_channels 12"):
        ModelSizes(config)
