"""A training run's EMA weights in, the shipped `models/demo` folder's weights and tokenizer out.

python -m dit_trt.tooling.train_demo.export --assets assets --pool pool.npz --run run --out models/demo
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .text import base_table, tokenizer_json
from .train import MODEL_CONFIG, DemoModel, demo_model, load_pool

FULL_PRECISION = (
    "inv_freq",
    "timestep_features.weight",
    "gamma",
    "beta",
    "pretransform.",
    "embedding.0.weights",
)
"""Small, and used as numbers rather than as a matrix: kept in fp32. All else is fp16."""


def state_dict(model: DemoModel, pool: dict) -> dict[str, Tensor]:
    """stable-audio-tools' keys: model.model.*, conditioner.conditioners.*, pretransform.*"""
    state = {f"model.model.{name}": value for name, value in model.dit.state_dict().items()}
    state |= {f"conditioner.{name}": value for name, value in model.conditioner.state_dict().items()}
    state["conditioner.conditioners.prompt.table.weight"] = model.proj(model.base).detach()
    for name, value in pool.items():
        if name.startswith("pca."):
            state[f"pretransform.{name.removeprefix('pca.')}"] = torch.from_numpy(value)
    return {
        name: value.contiguous() if any(part in name for part in FULL_PRECISION) else value.half().contiguous()
        for name, value in state.items()
    }


def export(assets: Path, pool_path: Path, run: Path, out: Path) -> None:
    model_config = json.loads(MODEL_CONFIG.read_text("utf-8"))
    model = demo_model(model_config, base_table(assets), run)
    pool = load_pool(pool_path, model_config["model"]["io_channels"])
    out.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a reader never sees half a file.
    save_file(state_dict(model, pool), out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").chmod(0o644)  # safetensors makes it private
    (out / "model.tmp").replace(out / "model.safetensors")
    (out / "tokenizer.tmp").write_text(tokenizer_json(assets), encoding="utf-8")
    (out / "tokenizer.tmp").replace(out / "tokenizer.json")
    for path in (out / "model.safetensors", out / "tokenizer.json"):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True, help="its principal components are the decoder's")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.assets, args.pool, args.run, args.out)


if __name__ == "__main__":
    main()
