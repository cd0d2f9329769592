"""A prompt becomes token ids: the bundle's tokenizer.json, read by the `tokenizers` package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..engines.errors import UserError


class PromptTokenizer:
    """Pads with 0 and cuts to the model's `max_length` tokens.

    special_tokens: add those of the tokenizer's own post-processor (T5's `</s>`), which a cut leaves in their places.
    """

    def __init__(self, path: Path, max_length: int, special_tokens: bool = False):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exceptions
            raise UserError(f"{path} is not a tokenizer this version reads: {error}") from None
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.no_padding()
        self.max_length, self._special_tokens = max_length, special_tokens

    def __call__(self, prompt: str) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """-> input_ids, attention_mask, both int64 [1, max_length], and how many tokens did not fit."""
        found = self._tokenizer.encode(prompt, add_special_tokens=self._special_tokens)
        input_ids = np.zeros((1, self.max_length), np.int64)
        mask = np.zeros((1, self.max_length), np.int64)
        input_ids[0, : len(found.ids)] = found.ids
        mask[0, : len(found.ids)] = 1
        # What was cut comes in pieces, each with its own special tokens.
        cut = sum(piece.special_tokens_mask.count(0) for piece in found.overflowing)
        return input_ids, mask, cut
