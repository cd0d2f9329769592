"""Train the demo's DiT on the CPU: packages of recordings in, `models/demo`'s weights out.

python -m dit_trt.tooling.train_demo.corpus --assets assets               # download, 24 MB
python -m dit_trt.tooling.train_demo.train --assets assets --run run      # 60 minutes on 2 cores
python -m dit_trt.tooling.train_demo.export --assets assets --run run --out models/demo
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ...exporters.conditioners import MultiConditioner
from ...exporters.dit import DiffusionTransformer, DiTConfig
from .captions import caption
from .corpus import CLASSES, load
from .pool import DOG_WEIGHT, build_latents
from .text import base_table, tokenizer_json

MODEL_CONFIG = Path(__file__).parents[2] / "models" / "demo" / "model_config.json"
CLIPS_PER_CLASS = 240
LEARNING_RATE = 6e-4
WARMUP = 300
EMA_DECAY = 0.999
CFG_DROPOUT = 0.15
TEXT_NOISE = 0.3
T_MIN = 0.08
"""The sampler ends at sigma 0.3, t = 0.19: smaller times are never asked for."""


class DemoModel(nn.Module):
    """The shipped model in training form: the prompt's table is `proj(base)`, base frozen."""

    def __init__(self, model_config: dict, base: Tensor):
        super().__init__()
        model = model_config["model"]
        self.dit = DiffusionTransformer(DiTConfig.from_model_config(model_config))
        self.conditioner = MultiConditioner(model_config)
        self.conditioner.conditioners["prompt"].table = nn.Identity()
        self.base: Tensor
        self.register_buffer("base", base, persistent=False)
        self.proj = nn.Linear(base.shape[1], model["conditioning"]["cond_dim"], bias=False)

    def condition(self, ids: Tensor, mask: Tensor, seconds: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        rows = self.base[ids]
        text = self.proj(rows + noise * torch.randn_like(rows)) * mask[..., None]
        numbers = self.conditioner.numbers(torch.zeros_like(seconds), seconds)
        return torch.cat((text, numbers), dim=1), numbers.flatten(1)


def velocity_loss(model: DemoModel, x: Tensor, ids: Tensor, mask: Tensor, seconds: Tensor) -> Tensor:
    """The v-objective: alpha = cos(t pi/2), sigma = sin(t pi/2), v = alpha noise - sigma x."""
    context, global_embed = model.condition(ids, mask, seconds, TEXT_NOISE)
    context = context * (torch.rand(len(x), 1, 1) >= CFG_DROPOUT)
    # Stratified: every batch covers all noise levels evenly.
    t = T_MIN + (1 - T_MIN) * (torch.randperm(len(x)) + torch.rand(len(x))) / len(x)
    alpha, sigma = (f(t * math.pi / 2)[:, None, None] for f in (torch.cos, torch.sin))
    noise = torch.randn_like(x)
    return F.mse_loss(model.dit(alpha * x + sigma * noise, t, context, global_embed), alpha * noise - sigma * x)


class Batches:
    def __init__(self, pool: dict[str, np.ndarray], tokenizer: Tokenizer, max_length: int, batch: int):
        self.latents = torch.from_numpy(pool["latents"])
        self.seconds = torch.from_numpy(pool["seconds"])
        self.labels = pool["labels"]
        self.clips = [np.flatnonzero(self.labels == index) for index in range(len(CLASSES))]
        weights = np.array([DOG_WEIGHT if name == "dog" else 1 for name in CLASSES], float)
        self.weights = weights / weights.sum()
        self.encode = lambda text: tokenize(tokenizer, text, max_length)
        self.batch = batch
        self.rng, self.words = np.random.default_rng(), random.Random()

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels = self.rng.choice(len(CLASSES), self.batch, p=self.weights)
        clips = [self.rng.choice(self.clips[label]) for label in labels]
        ids, mask = zip(*(self.encode(caption(CLASSES[label], self.words)) for label in labels))
        return self.latents[clips].float(), torch.tensor(ids), torch.tensor(mask), self.seconds[clips]


def tokenize(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """-> ids and mask, each of max_length."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:max_length]
    pad = max_length - len(ids)
    return ids + [0] * pad, [1] * len(ids) + [0] * pad


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def load_run(assets: Path, run: Path) -> tuple[dict, DemoModel, Tokenizer, dict[str, np.ndarray]]:
    """-> model_config, a model (the EMA weights of the run's checkpoint, if any), the tokenizer, the pool."""
    model_config = json.loads(MODEL_CONFIG.read_text())
    channels = model_config["model"]["io_channels"]
    path = run / "pool.npz"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        np.savez(path, allow_pickle=False, **build_latents(load(assets), CLIPS_PER_CLASS, 0.985, (64, 96, 128)))
    with np.load(path) as archive:
        pool = dict(archive)
    if pool["latents"].shape[1] != channels:
        raise SystemExit(f"the pool has {pool['latents'].shape[1]} channels, model_config.json {channels}")
    model = DemoModel(model_config, base_table(assets))
    if (run / "checkpoint.pt").exists():
        model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["ema"])
    return model_config, model, Tokenizer.from_str(tokenizer_json(assets)), pool


class Threads:
    """Keeps to the thread count that is fastest now: with one core taken, two are slower than one."""

    TRIAL, PERIOD = 6, 150

    def __init__(self, most: int):
        self.counts = range(1, most + 1)
        self.best, self.times = most, dict.fromkeys(self.counts, 0.0)
        self.step, self.start = 0, 0.0

    def begin(self) -> None:
        at = self.step % self.PERIOD
        if at == 0:
            self.times = dict.fromkeys(self.counts, 0.0)
        trial = at // self.TRIAL + 1
        if at == self.TRIAL * len(self.counts):
            self.best = min(self.times, key=self.times.__getitem__)
        torch.set_num_threads(trial if trial in self.times else self.best)
        self.trial, self.start = trial, time.monotonic()

    def end(self) -> None:
        if self.trial in self.times:
            self.times[self.trial] += time.monotonic() - self.start
        self.step += 1


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(args: argparse.Namespace) -> None:
    threads = Threads(args.threads)
    model_config, model, tokenizer, pool = load_run(args.assets, args.run)
    ema = copy.deepcopy(model).requires_grad_(False)
    max_length = model_config["model"]["conditioning"]["configs"][0]["config"]["max_length"]
    batches = Batches(pool, tokenizer, max_length, args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.97), weight_decay=0.01)
    step, before = 0, 0.0
    if args.resume:
        state = torch.load(args.run / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    start = last_save = time.monotonic()
    losses: list[float] = []
    while True:
        elapsed = before + time.monotonic() - start
        progress = min(1.0, elapsed / (args.minutes * 60))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine * min(1, (step + 1) / WARMUP)
        threads.begin()
        loss = velocity_loss(model, *batches.draw())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
        threads.end()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            rate, recent = len(losses) / (time.monotonic() - start), np.mean(losses[-100:])
            print(
                f"{elapsed:6.0f} s  step {step}  loss {recent:.4f}  {rate:.2f}/s  {threads.best} threads",
                flush=True,
            )
        if progress >= 1 or time.monotonic() - last_save > 120:
            state = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save(args.run / "checkpoint.pt", {**state, "step": step, "seconds": elapsed})
            last_save = time.monotonic()
        if progress >= 1:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--run", type=Path, required=True, help="folder of the pool and the checkpoint")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="at most; fewer are used while that is faster")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
