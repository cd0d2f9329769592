"""A training run's EMA weights in, the shipped `models/demo` folder's weights and tokenizer out.

python -m dit_trt.tooling.train_demo.export --assets assets --run run --out models/demo [--decoder-run run]

With --decoder-run the neural decoder of that folder (train_decoder) goes in, too; models/demo/model_config.json must
have its sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...exporters.pretransforms import decoder_from_config
from .text import tokenizer_json
from .train import DemoModel, load_run
from .train_decoder import CONFIG, WEIGHTS

FULL_PRECISION = (
    "inv_freq",
    "timestep_features.weight",
    "gamma",
    "beta",
    "embedding.0.weights",
)
"""Small, and used as numbers rather than as a matrix: kept in fp32, as vectors of the decoder. All else is fp16."""


def decoder_state(pool: dict, model_config: dict, run: Path | None) -> dict[str, Tensor]:
    """The decoder's tensors: the pool's PCA, and what the run trained, where there is one."""
    state = {name[4:]: torch.from_numpy(value) for name, value in pool.items() if name.startswith("pca.")}
    if run is None:
        return state
    trained = load_file(run / WEIGHTS)
    shapes = {name: value.shape for name, value in decoder_from_config(model_config).state_dict().items()}
    if shapes != {name: value.shape for name, value in trained.items()}:
        config = " ".join((run / CONFIG).read_text().split())
        raise SystemExit(f"model_config.json needs a pretransform of type mel_vocoder, as {run} has it: {config}")
    for name, value in state.items():
        if not torch.equal(trained[name], value):
            raise SystemExit(f"the decoder of {run} was trained with another pool: its {name} differs")
    return trained


def state_dict(model: DemoModel, decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """stable-audio-tools' keys: model.model.*, conditioner.conditioners.*, pretransform.*"""
    state = {f"model.model.{name}": value for name, value in model.dit.state_dict().items()}
    state |= {f"conditioner.{name}": value for name, value in model.conditioner.state_dict().items()}
    state["conditioner.conditioners.prompt.table.weight"] = model.proj(model.base).detach()
    state |= {f"pretransform.{name}": value for name, value in decoder.items()}

    def is_full(name: str) -> bool:
        vector = name.startswith("pretransform.") and state[name].ndim < 2
        return vector or any(part in name for part in FULL_PRECISION)

    return {name: (value if is_full(name) else value.half()).contiguous() for name, value in state.items()}


def export(assets: Path, run: Path, out: Path, decoder_run: Path | None = None) -> None:
    model_config, model, _, pool = load_run(assets, run)
    decoder = decoder_state(pool, model_config, decoder_run)
    out.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a reader never sees half a file.
    save_file(state_dict(model, decoder), out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").chmod(0o644)  # safetensors makes it private
    (out / "model.tmp").replace(out / "model.safetensors")
    (out / "tokenizer.tmp").write_text(tokenizer_json(assets), encoding="utf-8")
    (out / "tokenizer.tmp").replace(out / "tokenizer.json")
    for path in (out / "model.safetensors", out / "tokenizer.json"):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decoder-run", type=Path, help="folder of the trained decoder")
    args = parser.parse_args()
    export(args.assets, args.run, args.out, args.decoder_run)


if __name__ == "__main__":
    main()
