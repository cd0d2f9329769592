"""Train the demo's DiT, on an NVIDIA GPU where one is: a pool of clips in, a checkpoint out.

python -m dit_trt.tooling.train_demo.corpus --assets assets --pack recordings.npz
python -m dit_trt.tooling.train_demo.pool --recordings recordings.npz --output pool.npz --clips 30000
python -m dit_trt.tooling.train_demo.train --assets assets --pool pool.npz --run run --seconds 415
python -m dit_trt.tooling.train_demo.export --assets assets --pool pool.npz --run run --out models/demo

The length is a time, not a number of steps: the learning rate falls to nothing at its end, however fast the machine is.
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

from ...exporters.conditioners import MultiConditioner, NumberConditioner
from ...exporters.dit import CrossAttention, DiffusionTransformer, DiTConfig, FourierFeatures, SelfAttention
from .captions import caption, pair_caption
from .corpus import CLASSES
from .text import base_table, tokenizer_json

MODEL_CONFIG = Path(__file__).parents[2] / "models" / "demo" / "model_config.json"
CHECKPOINT = "checkpoint.pt"
LEARNING_RATE = 1e-3
WARMUP = 500
EMA_DECAY = 0.9995
CFG_DROPOUT = 0.15
TEXT_NOISE = 0.3
T_MIN = 0.08
"""The sampler ends at sigma 0.3, t = 0.19: smaller times are never asked for."""
CAPTIONS_PER_CLIP = 8
SAVE_EVERY, SAY_EVERY = 60.0, 5.0  # seconds


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
    context = context * (torch.rand(len(x), 1, 1, device=x.device) >= CFG_DROPOUT)
    # Stratified: every batch covers all noise levels evenly.
    t = T_MIN + (1 - T_MIN) * (torch.arange(len(x), device=x.device) + torch.rand(len(x), device=x.device)) / len(x)
    alpha, sigma = (f(t * math.pi / 2)[:, None, None] for f in (torch.cos, torch.sin))
    noise = torch.randn_like(x)
    velocity = model.dit(alpha * x + sigma * noise, t, context, global_embed)
    return F.mse_loss(velocity.float(), alpha * noise - sigma * x)


class Clips:
    """The pool on the device, several captions a clip; a batch is drawn where it is used.

    pool: latents float16 [n, channels, latents], first and second int16 [n] (classes; -1: no second), seconds [n].
    """

    def __init__(
        self, pool: dict[str, np.ndarray], tokenizer: Tokenizer, max_length: int, batch: int, seed: int, device: str
    ):
        words = random.Random(seed)
        texts = [
            caption(CLASSES[first], words) if second < 0 else pair_caption(CLASSES[first], CLASSES[second], words)
            for first, second in zip(pool["first"].tolist(), pool["second"].tolist())
            for _ in range(CAPTIONS_PER_CLIP)
        ]
        self.ids, self.mask = (
            torch.from_numpy(rows).view(-1, CAPTIONS_PER_CLIP, max_length).to(device)
            for rows in tokenize(tokenizer, texts, max_length)
        )
        self.latents = torch.from_numpy(pool["latents"]).to(device)
        self.seconds = torch.from_numpy(pool["seconds"]).to(device)
        self.batch, self.device = batch, device

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        clips = torch.randint(len(self.latents), (self.batch,), device=self.device)
        which = torch.randint(CAPTIONS_PER_CLIP, (self.batch,), device=self.device)
        return self.latents[clips].float(), self.ids[clips, which], self.mask[clips, which], self.seconds[clips]


def tokenize(tokenizer: Tokenizer, texts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """-> ids and mask, int64 [texts, max_length]."""
    ids, mask = (np.zeros((len(texts), max_length), np.int64) for _ in range(2))
    for row, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        kept = encoding.ids[:max_length]
        ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
    return ids, mask


def in_float32(module: nn.Module, device: str) -> None:
    """Keep a module out of autocast: bfloat16 knows 64 of a hundred noise levels."""
    forward = module.forward

    def call(*args: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            return forward(*(arg.float() for arg in args))

    module.forward = call


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


PARTS = ("model", "ema", "optimizer")  # of a Trainer, that a checkpoint keeps


class Trainer:
    """One model, its optimizer and the running mean of its weights; on a GPU in bfloat16 where that does no harm."""

    def __init__(self, model: DemoModel, clips: Clips):
        self.model, self.clips = model, clips
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.kind = clips.device.partition(":")[0]
        self.rate = torch.tensor(0.0, device=clips.device)
        self.loss = torch.zeros((), device=clips.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step = 0
        for module in model.modules():
            if isinstance(module, FourierFeatures | NumberConditioner):
                in_float32(module, self.kind)
            if isinstance(module, SelfAttention | CrossAttention):
                module.attend = fused_attention

    def advance(self, rate: float) -> None:
        self.rate.fill_(rate)
        self._update()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1

    def _update(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.kind, torch.bfloat16, self.kind == "cuda"):
            loss = velocity_loss(self.model, *self.clips.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.detach()

    def state(self, seconds: float) -> dict:
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "step": self.step,
            "seconds": seconds,
        }

    def resume(self, state: dict) -> float:
        """-> the seconds it was trained for."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.step = state["step"]
        return float(state["seconds"])


def demo_model(model_config: dict, base: Tensor, run: Path) -> DemoModel:
    """The EMA weights of the run's checkpoint."""
    if not (path := run / CHECKPOINT).is_file():
        raise SystemExit(f"{path} is not there; train first: python -m dit_trt.tooling.train_demo.train --run {run}")
    model = DemoModel(model_config, base)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["ema"])
    return model


def load_pool(path: Path, channels: int) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        pool = {name: archive[name] for name in archive.files if name != "audio"}
    if pool["latents"].shape[1] != channels:
        raise SystemExit(f"the pool has {pool['latents'].shape[1]} channels, model_config.json {channels}")
    return pool


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(args: argparse.Namespace) -> None:
    if not args.resume and (args.run / CHECKPOINT).exists():
        raise SystemExit(f"{args.run} holds a training already; go on with --resume, or name another folder")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model_config = json.loads(MODEL_CONFIG.read_text("utf-8"))
    pool = load_pool(args.pool, model_config["model"]["io_channels"])
    max_length = model_config["model"]["conditioning"]["configs"][0]["config"]["max_length"]
    tokenizer = Tokenizer.from_str(tokenizer_json(args.assets))
    clips = Clips(pool, tokenizer, max_length, args.batch, args.seed, args.device)
    trainer = Trainer(DemoModel(model_config, base_table(args.assets)).to(args.device), clips)
    args.run.mkdir(parents=True, exist_ok=True)
    before = 0.0
    if args.resume:
        before = trainer.resume(torch.load(args.run / CHECKPOINT, map_location=args.device, weights_only=True))
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, {len(clips.latents)} clips, on {args.device}", flush=True)
    start = said = saved = time.monotonic()
    first = trainer.step
    while True:
        now = time.monotonic()
        elapsed = before + now - start
        progress = min(1.0, elapsed / args.seconds)
        if progress >= 1 or now - saved > SAVE_EVERY:
            save(args.run / CHECKPOINT, trainer.state(elapsed))
            saved = now
        if progress >= 1:
            print(f"{elapsed:.0f} s, {trainer.step} steps of {args.batch}, loss {trainer.loss.item():.4f}", flush=True)
            return
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        trainer.advance(args.rate * cosine * min(1, (trainer.step + 1) / WARMUP))
        if now - said > SAY_EVERY:
            loss, speed = trainer.loss.item(), (trainer.step - first) / (time.monotonic() - start)
            print(f"{elapsed:6.0f} s  step {trainer.step}  loss {loss:.4f}  {speed:.1f}/s", flush=True)
            if not math.isfinite(loss):
                raise SystemExit("the loss is not finite: begin again with a lower --rate")
            said = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder of the downloaded packages")
    parser.add_argument("--pool", type=Path, required=True, help="what train_demo.pool wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seconds", type=float, default=415, help="how long; 415 are for a data centre's GPU")
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
