"""A prompt becomes token ids: the bundle's tokenizer.json, read by the `tokenizers` package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..engines.errors import UserError


class PromptTokenizer:
    """Pads and cuts to the model's `max_length` tokens."""

    def __init__(self, path: Path, max_length: int):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exceptions
            raise UserError(f"{path} is not a tokenizer this version reads: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_length = max_length

    def __call__(self, prompt: str) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """-> input_ids, attention_mask, both int64 [1, max_length], and how many tokens did not fit."""
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        kept = ids[: self.max_length]
        input_ids = np.zeros((1, self.max_length), np.int64)
        mask = np.zeros((1, self.max_length), np.int64)
        input_ids[0, : len(kept)] = kept
        mask[0, : len(kept)] = 1
        return input_ids, mask, len(ids) - len(kept)
