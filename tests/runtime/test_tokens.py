"""Token ids equal those of transformers' fast tokenizer, called as stable-audio-tools calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import T5_PIECES, t5_tokenizer
from tokenizers import Tokenizer

from dit_trt.engines.errors import UserError
from dit_trt.runtime.tokens import PromptTokenizer
from peers import require

PROMPTS = {
    "words": "dog barking",
    "letters": "quiet rain, a cat",
    "empty": "",
    "spaces": " \n ",
    "emoji": "a dog 🐕 barking 🎵🎵",
    "its own special tokens": "dog</s> rain <pad> cat <unk>",
    "long": "the puppy woofs " * 9,
    "very long": "siren rain " * 20_000,
    "no spaces": "abcdefghijklmnop" * 300,
}
LENGTHS = (1, 2, 8, 16, 128)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    t5_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_with_special_tokens_equals_transformers(file: Path, prompt: str, length: int) -> None:
    fast = require("transformers").PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>")
    expected = fast([prompt], truncation=True, max_length=length, padding="max_length", return_tensors="np")
    ids, mask, cut = PromptTokenizer(file, length, special_tokens=True)(prompt)
    assert ids.dtype == mask.dtype == np.int64
    assert np.array_equal(ids, expected["input_ids"])
    assert np.array_equal(mask, expected["attention_mask"])
    assert T5_PIECES[ids[0, int(mask.sum()) - 1]] == "</s>"
    assert cut == max(0, len(Tokenizer.from_file(str(file)).encode(prompt).ids) - length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_without_special_tokens_it_is_the_first_tokens(file: Path, prompt: str, length: int) -> None:
    whole = Tokenizer.from_file(str(file)).encode(prompt, add_special_tokens=False).ids
    ids, mask, cut = PromptTokenizer(file, length)(prompt)
    kept = whole[:length]
    assert ids.tolist() == [kept + [0] * (length - len(kept))]
    assert mask.tolist() == [[1] * len(kept) + [0] * (length - len(kept))]
    assert cut == len(whole) - len(kept)


def test_by_hand(file: Path) -> None:
    tokenizer = PromptTokenizer(file, 4, special_tokens=True)
    dog, rain = (T5_PIECES.index(f"▁{word}") for word in ("dog", "rain"))
    assert tokenizer("dog")[0].tolist() == [[dog, 1, 0, 0]]
    assert tokenizer("dog rain dog rain dog")[0].tolist() == [[dog, rain, dog, 1]]
    assert tokenizer("dog rain dog rain dog")[2] == 2
    assert [part.tolist() for part in tokenizer("")[:2]] == [[[1, 0, 0, 0]], [[1, 0, 0, 0]]]


def test_what_a_file_says_of_cutting_and_padding_is_passed_over(file: Path) -> None:
    saved = t5_tokenizer()
    saved.enable_truncation(3, direction="left")
    saved.enable_padding(length=9, pad_id=5)
    prompt, plain = "dog rain cat siren a", PromptTokenizer(file, 6, special_tokens=True)
    expected = [part if isinstance(part, int) else part.tolist() for part in plain(prompt)]
    saved.save(str(file))
    found = PromptTokenizer(file, 6, special_tokens=True)(prompt)
    assert [part if isinstance(part, int) else part.tolist() for part in found] == expected
    assert expected[2] == 0


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer this version reads"):
        PromptTokenizer(tmp_path / "tokenizer.json", 4)
