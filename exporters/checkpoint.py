"""One model on disk, checked and read one tensor at a time: graph weights are asked for by graph name, fp32 numpy.

Where its tensors come from, model_files and tensor_files say; here they get the names and forms that graphs know:
parts of fused Linears, folded weight norms, RoPE's tables, the text encoder's own names.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.errors import UserError
from ..engines.home import sha256_kept
from .float_graphs import ModelSizes
from .graph_weights import Shape, graph_weights
from .hub import licence_of
from .linears import DIT_PREFIX, Linear, block_linears, split_keys
from .model_files import ModelFiles, find_model
from .tensor_files import TensorSource, check_dtype

INV_FREQ = DIT_PREFIX + "transformer.rotary_pos_emb.inv_freq"
TEXT_PREFIX = "conditioner.conditioners.prompt.model."
# The token table's other name, under which some files of transformers' have it.
_ALIASES = {"shared.weight": "encoder.embed_tokens.weight"}


class Checkpoint:
    """Raises UserError when a file is missing, unreadable, or not a model this package knows."""

    def __init__(self, files: ModelFiles):
        self._files = files
        self.folder, self.config, self.name, self.source = files.folder, files.config, files.name, files.source
        try:
            self.sizes = ModelSizes(self.config)
            self._weights = graph_weights(self.config)
            self.tokenizer_file  # noqa: B018
        except UserError:
            raise
        except Exception as error:  # whatever a part raises for a key it misses or a size that is none
            raise UserError(f"{files.config_file} lacks or misstates {error}") from None
        self.linears: list[Linear] = block_linears(self.sizes.dit)
        self._split = split_keys(self.linears)
        self._check()

    @classmethod
    def open(cls, model: str, text_encoder: str | None = None) -> Checkpoint:
        """`demo`, a folder in stable-audio-tools' or diffusers' layout, a file of weights, or a hub id.

        text_encoder: a folder or hub id, for models whose text encoder is not in the checkpoint.
        """
        return cls(find_model(model, text_encoder))

    @classmethod
    def of_bundle(cls, model: dict) -> Checkpoint:
        """The model that a bundle was built from, by what its manifest says of it (`model`)."""
        try:
            return cls.open(model["source"], model.get("text_encoder") or None)
        except UserError as error:
            raise UserError(f"the model that this bundle was built from cannot be opened again ({error})") from None

    @property
    def text_encoder(self) -> str:
        """What `open` was given for it, or nothing."""
        return "" if self._files.text_encoder is None else self._files.text_encoder.source

    @property
    def licence(self) -> str:
        """The checkpoint's own licence or notice text, carried into every bundle; empty when it has none."""
        return licence_of(self.folder)

    @cached_property
    def digest(self) -> str:
        """sha256 over configuration, tokenizer and the sha256 of every file of weights: what caches are keyed by."""
        files = [self.tokenizer_file, *self._files.tensors.files]
        if self._files.text_encoder is not None:
            files += self._files.text_encoder.tensors.files
        facts = [self.config, *map(sha256_kept, files)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_file(self) -> Path:
        if self._files.text_encoder is not None:
            return self._files.text_encoder.tokenizer
        path = self.folder / self.sizes.conditioning.configs["prompt"]["tokenizer"]
        if not path.is_file():
            raise UserError(f"{self.folder} has no {path.name} (the prompt conditioner's tokenizer)")
        return path

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 array of a graph weight: a checkpoint key, a part of a fused Linear, or a RoPE table.

        Raises UserError, with file and key, for one that is not there or holds NaN or infinity.
        """
        if name in ("rope.cos", "rope.sin"):
            return self._rope(name)
        source, key, rows = self._place(name)
        if (pair := _weight_norm(source, key)) is not None:
            return fold_weight_norm(*(_finite(source, part, slice(None)) for part in pair))
        if key not in source.shapes:
            raise UserError(f"{_file(source)} lacks {key}: not a checkpoint of this model_config.json")
        return _finite(source, key, rows)

    def _place(self, name: str) -> tuple[TensorSource, str, slice]:
        """Where a weight is: source, key and rows."""
        if name.startswith(TEXT_PREFIX) and self._files.text_encoder is not None:
            source, key = self._files.text_encoder.tensors, name.removeprefix(TEXT_PREFIX)
            return source, key if key in source.shapes else _ALIASES.get(key, key), slice(None)
        key, rows = self._split.get(name, (name, slice(None)))
        return self._files.tensors, key, rows

    def _check(self) -> None:
        """Every tensor that a graph will ask for is there, of the right shape, in a type that is read."""
        missing: list[str] = []
        for name, shape in self._expected().items():
            source, key, _ = self._place(name)
            if (pair := _weight_norm(source, key)) is not None:
                wanted = {pair[0]: (shape[0], *[1] * (len(shape) - 1)), pair[1]: shape}
            else:
                wanted = {key: shape}
            for key, shape in wanted.items():
                if key not in source.shapes:
                    missing.append(f"{_file(source)} lacks {key}")
                    continue
                if source.shapes[key] != shape:
                    found = list(source.shapes[key])
                    raise UserError(
                        f"{source.file_of(key)}: {key} is {found}, model_config.json asks for {list(shape)}"
                    )
                check_dtype(source, key)
        if missing:
            more = f" and {len(missing) - 1} more of its tensors" if len(missing) > 1 else ""
            raise UserError(f"{missing[0]}{more}: not a whole checkpoint of this model_config.json")

    def _expected(self) -> dict[str, Shape]:
        """Name, or of fused Linears key, of every tensor that graphs are made of -> its shape."""
        found = {name: shape for shapes in self._weights.values() for name, shape in shapes.items()}
        for table in ("rope.cos", "rope.sin"):
            del found[table]
        for linear in self.linears:
            for parameter in ("weight", "bias") if linear.bias else ("weight",):
                for part in linear.parts:
                    del found[linear.graph_name(part, parameter)]
                width = (linear.in_features,) if parameter == "weight" else ()
                found[linear.key(parameter)] = (linear.out_features, *width)
        return {**found, INV_FREQ: (self.sizes.dit.rotary_dim // 2,)}

    def _rope(self, name: str) -> NDArray[np.float32]:
        from .dit import RotaryEmbedding

        rotary = RotaryEmbedding(self.sizes.dit.rotary_dim)
        rotary.inv_freq = torch.from_numpy(self.tensor(INV_FREQ))
        cos, sin = rotary.tables(self.sizes.max_latents + 1)
        return (cos if name == "rope.cos" else sin).numpy()


def _file(source: TensorSource) -> Path:
    """The one that messages name for what is not there."""
    return source.files[0]


def _finite(source: TensorSource, key: str, rows: slice) -> NDArray[np.float32]:
    value = source.read(key, rows)
    if not np.isfinite(value).all():
        raise UserError(f"{source.file_of(key)}: {key} holds NaN or infinity; training or the download went wrong")
    return value


def _weight_norm(source: TensorSource, key: str) -> tuple[str, str] | None:
    """The keys of g and v, under torch's old or new names, where the source has them in place of `key`."""
    module = key.removesuffix(".weight")
    if key in source.shapes or module == key:
        return None
    new = f"{module}.parametrizations.weight.original"
    pairs = ((f"{key}_g", f"{key}_v"), (f"{new}0", f"{new}1"))
    return next((pair for pair in pairs if all(part in source.shapes for part in pair)), None)


def fold_weight_norm(g: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    """w = g v / ||v|| (Salimans and Kingma 2016, eq. 2), the norm over all axes along which g has one value.

    v [out, in, kernel], of a transposed convolution [in, out, kernel]: torch's g is [v.shape[0], 1, 1] of both.
    """
    axes = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
    norm = np.sqrt(np.square(v).sum(axis=axes, keepdims=True, dtype=np.float64))
    return v * (g / norm).astype(np.float32)
