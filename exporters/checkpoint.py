"""A checkpoint folder in stable-audio-tools' layout, read one tensor at a time.

`model_config.json` and `model.safetensors`; graph weights are asked for by graph name and come back as fp32 numpy.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..engines.errors import UserError
from ..engines.home import expanded
from .conditioners import MultiConditioner
from .float_graphs import ModelSizes
from .linears import DIT_PREFIX, Linear, block_linears, split_keys
from .pretransforms import decoder_from_config

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
Array = NDArray[np.generic]


class Checkpoint:
    """One model on disk.

    Raises UserError when a file is missing, unreadable, or not a model this package knows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _read_config(folder / "model_config.json")
        try:
            self.sizes = ModelSizes(self.config)
            with torch.device("meta"):  # nothing is computed: only asked whether every part can be made of its config
                MultiConditioner(self.config)
                decoder_from_config(self.config)
            self.tokenizer_file  # noqa: B018
        except UserError:
            raise
        except Exception as error:  # whatever a part raises for a key it misses or a size that is none
            raise UserError(f"{folder / 'model_config.json'} lacks or misstates {error}") from None
        self.linears: list[Linear] = block_linears(self.sizes.dit)
        self._split = split_keys(self.linears)
        self.weights_file = folder / "model.safetensors"
        if not self.weights_file.is_file():
            raise UserError(f"{folder} has no model.safetensors")
        try:
            self._tensors = safe_open(self.weights_file, framework="pt")
            self.keys = set(self._tensors.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.weights_file} is not a readable safetensors file: {error}") from None
        for linear in self.linears:
            key, expected = linear.key(), [linear.out_features, linear.in_features]
            found = self._tensors.get_slice(key).get_shape() if key in self.keys else "missing"
            if found != expected:
                raise UserError(f"{self.weights_file}: {key} is {found}, model_config.json asks for {expected}")

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """`demo` or a local folder in stable-audio-tools' layout."""
        folder = DEMO if model == "demo" else expanded(model)
        if not folder.is_dir():
            raise UserError(f"--model {model}: no such folder; give 'demo' or a folder with model_config.json")
        return cls(folder)

    @property
    def source(self) -> str:
        """What `open` takes to find it again."""
        return "demo" if self.folder == DEMO else str(self.folder.resolve())

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def licence(self) -> str:
        """The checkpoint's own licence or notice text, carried into every bundle; empty when it has none."""
        texts = [path.read_text("utf-8", "replace") for path in self._notices()]
        return "\n".join(texts)

    def _notices(self) -> list[Path]:
        return [path for name in ("LICENSE", "LICENSE.md", "NOTICE") if (path := self.folder / name).is_file()]

    @cached_property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weights: what caches are keyed by."""
        sha = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        sha.update(self.tokenizer_file.read_bytes())
        with self.weights_file.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha.update(chunk)
        return sha.hexdigest()

    @property
    def tokenizer_file(self) -> Path:
        configs = {c["id"]: c["config"] for c in self.config["model"]["conditioning"]["configs"]}
        path = self.folder / configs["prompt"]["tokenizer"]
        if not path.is_file():
            raise UserError(f"{self.folder} has no {path.name} (the prompt conditioner's tokenizer)")
        return path

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 array of a graph weight: a checkpoint key, a part of a fused Linear, or a RoPE table."""
        if name in ("rope.cos", "rope.sin"):
            return self._rope(name)
        key, rows = self._split.get(name, (name, slice(None)))
        if (pair := self._weight_norm(key)) is not None:
            return fold_weight_norm(*(self.tensor(part) for part in pair))
        if key not in self.keys:
            raise UserError(f"{self.weights_file} lacks {key}: not a checkpoint of this model_config.json")
        # Opened for every tensor: pages of a mapping that stays open count as this process's memory.
        with safe_open(self.weights_file, framework="pt") as file:
            tensor = file.get_tensor(key) if rows == slice(None) else file.get_slice(key)[rows]
            return np.array(tensor.float().numpy())

    def _weight_norm(self, key: str) -> tuple[str, str] | None:
        """The keys of g and v, under torch's old or new names, where the checkpoint has them in place of `key`."""
        module = key.removesuffix(".weight")
        if key in self.keys or module == key:
            return None
        new = f"{module}.parametrizations.weight.original"
        pairs = ((f"{key}_g", f"{key}_v"), (f"{new}0", f"{new}1"))
        return next((pair for pair in pairs if self.keys.issuperset(pair)), None)

    def _rope(self, name: str) -> NDArray[np.float32]:
        from .dit import RotaryEmbedding

        rotary = RotaryEmbedding(self.sizes.dit.rotary_dim)
        rotary.inv_freq = torch.from_numpy(self.tensor(DIT_PREFIX + "transformer.rotary_pos_emb.inv_freq"))
        cos, sin = rotary.tables(self.sizes.max_latents + 1)
        return (cos if name == "rope.cos" else sin).numpy()


def fold_weight_norm(g: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """w = g v / ||v|| (Salimans and Kingma 2016, eq. 2), the norm over all axes along which g has one value.

    v [out, in, kernel], of a transposed convolution [in, out, kernel]: torch's g is [v.shape[0], 1, 1] of both.
    """
    axes = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
    norm = np.sqrt(np.square(v).sum(axis=axes, keepdims=True, dtype=np.float64))
    return v * (g / norm).astype(np.float32)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no model_config.json: not a folder in stable-audio-tools' layout") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config
