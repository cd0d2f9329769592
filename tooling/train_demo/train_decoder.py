"""Train the demo's neural decoder: a pool of clips in, `decoder.safetensors` (EMA weights) out.

python -m dit_trt.tooling.train_demo.train_decoder --pool pool.npz --run run --seconds 400

Clips and PCA come from the pool: `audio` int16 [clips, samples] mono at 44.1 kHz, `pca.*` as features.fit_pca makes
it. Random crops become latents on the device, half of them noisy (a diffusion model's latents are not exact), and the
decoder makes sound of them again: spectral and mel distance at once, discriminators after a warm-up. Stops by the
clock; a killed run keeps what it had at most a minute ago.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...exporters.mel_vocoder import MelVocoder
from .adversary import (
    Discriminators,
    Features,
    SpectralDistance,
    discriminator_loss,
    generator_loss,
    inverse_stft,
)
from .features import FRAMES_PER_LATENT, HOP, MELS, N_FFT

CHECKPOINT, WEIGHTS, CONFIG = "decoder.pt", "decoder.safetensors", "decoder.json"
SIZES = {"dim": 192, "hidden": 384, "blocks": 6, "kernel": 11, "bins": 744}
CROP_LATENTS = 20
RATE, JUDGE_RATE = 8e-4, 3e-4
BETAS = (0.8, 0.95)
LR_WARMUP = 100
EMA_DECAY = 0.999
CLIP_NORM = 10.0
WARMUP, GAN_START, GAN_FULL = 0.10, 0.03, 0.10
"""The share of the time before discriminators learn; how much later they begin to count, and count fully."""
MEL_WEIGHT, STFT_WEIGHT, ADVERSARIAL_WEIGHT, MATCHING_WEIGHT = 10.0, 5.0, 1.0, 2.0
MOST_NOISE = 0.2
"""Of latents, in standard deviations of each channel."""
SAVE_EVERY, LOG_EVERY = 60.0, 5.0


def decoder_config(buffers: Mapping[str, np.ndarray]) -> dict:
    """The sizes of a decoder of these PCA buffers, as `model.pretransform.config` has them."""
    return {
        "latent_dim": len(buffers["components"]),
        "downsampling_ratio": FRAMES_PER_LATENT * HOP,
        "n_fft": N_FFT,
        "hop_length": HOP,
        "n_mels": MELS,
        "frames_per_latent": FRAMES_PER_LATENT,
        **SIZES,
    }


def make_decoder(buffers: Mapping[str, np.ndarray], config: Mapping) -> MelVocoder:
    """An untrained decoder with these PCA buffers."""
    decoder = MelVocoder.from_config(config)
    for name, buffer in decoder.named_buffers():
        buffer.copy_(torch.from_numpy(np.asarray(buffers[name], np.float32)))
    with torch.no_grad():  # at first every frame is a click in its middle, not at its ends, where the window is zero
        decoder.head.bias[decoder.bins :] = math.pi * (torch.arange(decoder.bins) % 2)
    return decoder


class Crops:
    """Random pieces of the pool's clips, all on the device; the quietest quarter of those drawn is left out."""

    def __init__(self, audio: np.ndarray, samples: int, seed: int, device: torch.device):
        if audio.dtype != np.int16 or audio.ndim != 2 or audio.shape[1] < samples:
            raise SystemExit(f"the pool's audio is {audio.dtype} {audio.shape}, not int16 of {samples} samples or more")
        self.clips, self.length = audio.shape
        self.samples, self.device = samples, device
        self.flat = torch.from_numpy(np.ascontiguousarray(audio)).to(device).view(-1)
        self.offsets = torch.arange(samples, device=device)
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> Tensor:
        """-> float32 [batch, samples]"""
        drawn = -(-batch * 4 // 3)
        clips = torch.randint(self.clips, (drawn,), generator=self.rng)
        starts = torch.randint(self.length - self.samples + 1, (drawn,), generator=self.rng)
        first = (clips * self.length + starts).to(self.device)
        audio = self.flat[first[:, None] + self.offsets].float() / 32767
        return audio[audio.square().mean(dim=1).topk(batch).indices]


class Training:
    """Models, optimizers and the step; everything lives on `device`."""

    def __init__(self, decoder: MelVocoder, device: torch.device, amp: bool, warmup: float = WARMUP):
        self.device, self.amp, self.warmup = device, amp, warmup
        self.decoder = decoder.to(device)
        self.ema = copy.deepcopy(self.decoder).requires_grad_(False)
        self.judges = Discriminators().to(device)
        self.features, self.distance = Features().to(device), SpectralDistance().to(device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), RATE, BETAS, weight_decay=0.01, fused=fused)
        self.judge_optimizer = torch.optim.AdamW(
            self.judges.parameters(), JUDGE_RATE, BETAS, weight_decay=0.01, fused=fused
        )
        self.noise = self.decoder.scale / self.decoder.scale.square().mean().sqrt()  # std of each channel
        self.step_count, self.skipped = 0, 0

    def judge(self, audio: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self.judges(audio)

    @torch.no_grad()
    def latents(self, audio: Tensor) -> Tensor:
        """Those of `audio`, every other clip's with noise."""
        d = self.decoder
        exact = self.features.latents(self.features.log_mel(audio), d.components, d.mean, d.scale)
        level = torch.rand(len(audio), 1, 1, device=self.device) * MOST_NOISE
        level[::2].zero_()
        return exact + level * self.noise[:, None] * torch.randn_like(exact)

    def sound(self, decoder: MelVocoder, latents: Tensor) -> Tensor:
        return inverse_stft(decoder(latents), self.features.window)

    def step(self, real: Tensor, progress: float) -> dict[str, Tensor]:
        """One update of the decoder, and of the discriminators once they learn. -> losses, on the device"""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        for optimizer, rate in ((self.optimizer, RATE), (self.judge_optimizer, JUDGE_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine * min(1, (self.step_count + 1) / LR_WARMUP)
        losses = {}
        fake = self.sound(self.decoder, self.latents(real))
        if progress >= self.warmup:
            self.judges.requires_grad_(True)
            loss = discriminator_loss(self.judge(real), self.judge(fake.detach()))
            self._update(self.judge_optimizer, self.judges, loss)
            losses["judges"] = loss.detach()
        convergence, logarithmic = self.distance(fake, real)
        mel = F.l1_loss(self.features.log_mel(fake), self.features.log_mel(real))
        total = MEL_WEIGHT * mel + STFT_WEIGHT * (convergence + logarithmic)
        losses |= {"mel": mel.detach(), "sc": convergence.detach(), "log": logarithmic.detach()}
        weight = min(1.0, (progress - self.warmup - GAN_START) / (GAN_FULL - GAN_START))
        if weight > 0:
            self.judges.requires_grad_(False)
            with torch.no_grad():
                of_real = self.judge(real)
            adversarial, matching = generator_loss(of_real, self.judge(fake))
            total = total + weight * (ADVERSARIAL_WEIGHT * adversarial + MATCHING_WEIGHT * matching)
            losses |= {"adv": adversarial.detach(), "fm": matching.detach()}
        losses["norm"] = self._update(self.optimizer, self.decoder, total)
        self._update_ema()
        self.step_count += 1
        return losses

    def _update(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            self.skipped += 1
        return norm.detach()

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step_count) / (10 + self.step_count))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.decoder.parameters()), 1 - decay)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "decoder": self.decoder,
            "ema": self.ema,
            "judges": self.judges,
            "optimizer": self.optimizer,
            "judge_optimizer": self.judge_optimizer,
        }

    def save(self, run: Path, seconds: float) -> None:
        """The checkpoint and the EMA weights, each written beside and renamed."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**state, "step": self.step_count, "seconds": seconds}, run / "decoder.pt.tmp")
        (run / "decoder.pt.tmp").replace(run / CHECKPOINT)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.ema.state_dict().items()}
        save_file(weights, run / "decoder.safetensors.tmp", metadata={"format": "pt"})
        (run / "decoder.safetensors.tmp").replace(run / WEIGHTS)

    def load(self, run: Path) -> float:
        """-> the seconds that the run has had"""
        state = torch.load(run / CHECKPOINT, map_location=self.device, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step_count = state["step"]
        return state["seconds"]


def train(args: argparse.Namespace) -> None:
    start = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    with np.load(args.pool) as archive:
        buffers = {name.removeprefix("pca."): archive[name] for name in archive.files if name.startswith("pca.")}
        audio = archive["audio"]
    config = decoder_config(buffers)
    (args.run / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    training = Training(make_decoder(buffers, config), device, device.type == "cuda", args.warmup)
    before = training.load(args.run) if args.resume else 0.0
    crops = Crops(audio, args.crop * FRAMES_PER_LATENT * HOP, args.seed + training.step_count, device)
    count = sum(p.numel() for p in training.decoder.parameters())
    print(f"{count / 1e6:.3f} M parameters, {len(audio)} clips on {device}", flush=True)
    last_save = last_log = time.monotonic()
    sums: dict[str, Tensor] = {}
    steps = 0
    while True:
        elapsed = before + time.monotonic() - start
        progress = elapsed / args.seconds
        if progress >= 1:
            break
        for name, value in training.step(crops.draw(args.batch), progress).items():
            sums[name] = sums.get(name, 0) + value
        steps += 1
        now = time.monotonic()
        if now - last_log >= LOG_EVERY:
            means = "  ".join(f"{name} {value.item() / steps:.3f}" for name, value in sums.items())
            print(
                f"{elapsed:5.0f} s  step {training.step_count}  {steps / (now - last_log):.2f} it/s  {means}",
                flush=True,
            )
            last_log, sums, steps = now, {}, 0
        if now - last_save >= SAVE_EVERY:
            training.save(args.run, elapsed)
            last_save = now
    training.save(args.run, elapsed)
    skipped = f", {training.skipped} updates left out (not finite)" if training.skipped else ""
    print(f"{training.step_count} steps in {elapsed:.0f} s{skipped}; {args.run / WEIGHTS}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help=".npz of audio and pca.*")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint and the weights")
    parser.add_argument("--seconds", type=float, default=400, help="wall-clock budget, loading included")
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--crop", type=int, default=CROP_LATENTS, help="latents of a crop, 2048 samples each")
    parser.add_argument("--warmup", type=float, default=WARMUP, help="share of the time without discriminators; 1: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
