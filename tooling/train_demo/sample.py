"""Prompts in, sounds out, with the training code alone: how a run is checked while it is training.

python -m dit_trt.tooling.train_demo.sample --assets assets --run run --wavs wavs --seeds 4
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from ...runtime.griffin_lim import griffin_lim
from .captions import PROMPTS
from .features import CLIP, HOP, N_FFT, SAMPLE_RATE, decode_magnitude
from .train import DemoModel, load_run, tokenize


def polyexponential(steps: int, low: float = 0.3, high: float = 500.0) -> Tensor:
    """k-diffusion's schedule with rho 1, a zero appended: [steps + 1]."""
    return torch.cat((torch.linspace(math.log(high), math.log(low), steps).exp(), torch.zeros(1)))


@torch.no_grad()
def generate(
    model: DemoModel,
    ids: Tensor,
    mask: Tensor,
    seconds: Tensor,
    seeds: list[int],
    cfg: float = 7,
    steps: int = 100,
) -> Tensor:
    """DPM-Solver++(2M) -> latents [batch, C, 64]."""
    context, global_embed = model.condition(ids, mask, seconds)
    context = torch.cat((context, torch.zeros_like(context)))
    global_embed = global_embed.repeat(2, 1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        norm = (sigma**2 + 1).sqrt()
        t = (sigma.atan() * 2 / math.pi).expand(2 * len(x))
        with_text, without = model.dit((x / norm).repeat(2, 1, 1), t, context, global_embed).chunk(2)
        return x / norm**2 - sigma / norm * (without + (with_text - without) * cfg)

    sigmas = polyexponential(steps)
    shape = (model.dit.config.io_channels, 64)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]) * sigmas[0]
    previous, last_h = None, torch.zeros(())
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if following == 0:
            return denoised
        h = sigma.log() - following.log()
        estimate = denoised
        if previous is not None:
            estimate = denoised + h / last_h / 2 * (denoised - previous)
        x = following / sigma * x - torch.expm1(-h) * estimate
        previous, last_h = denoised, h
    return x


def to_audio(latents: np.ndarray, buffers: dict[str, np.ndarray], iterations: int = 64) -> np.ndarray:
    """latents [C, L] -> float32 [samples], peak at most 1."""
    audio = griffin_lim(decode_magnitude(latents, buffers), N_FFT, HOP, iterations)
    return audio / max(1.0, np.abs(audio).max())


def buffers_of(pool: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("pca."): value for name, value in pool.items() if name.startswith("pca.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--wavs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--prompt", action="append", help="default: the first wording of every class")
    parser.add_argument("--cfg", type=float, default=7)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _, model, tokenizer, pool = load_run(args.assets, args.run)
    args.wavs.mkdir(parents=True, exist_ok=True)
    prompts = {text.replace(" ", "_"): text for text in args.prompt} if args.prompt else PROMPTS
    for name, prompt in prompts.items():
        seeds = list(range(args.seeds))
        ids, mask = (torch.tensor([row] * len(seeds)) for row in tokenize(tokenizer, prompt, 32))
        seconds = torch.full((len(seeds),), CLIP / SAMPLE_RATE)
        latents = generate(model, ids, mask, seconds, seeds, args.cfg, args.steps)
        spread = latents.std().item()
        for seed, latent in zip(seeds, latents.numpy()):
            soundfile.write(args.wavs / f"{name}-{seed}.wav", to_audio(latent, buffers_of(pool)), SAMPLE_RATE)
        print(f"{prompt}: latents std {spread:.2f}, largest {latents.abs().max():.1f}", flush=True)


if __name__ == "__main__":
    main()
