"""The demo's words: WordLlama's tokenizer (lower-cased) and its frozen token table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors.torch import load as load_safetensors
from torch import Tensor

from .corpus import find

TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
TABLE = "wordllama/weights/l2_supercat_256.safetensors"


def read(assets: Path, member: str) -> bytes:
    with zipfile.ZipFile(find(assets, "wordllama-*.whl")) as wheel:
        return wheel.read(member)


def tokenizer_json(assets: Path) -> str:
    """WordLlama's tokenizer without special tokens around a prompt, and case-blind."""
    config = json.loads(read(assets, TOKENIZER))
    config["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    config["post_processor"] = None
    return json.dumps(config, ensure_ascii=False, separators=(",", ":"))


def base_table(assets: Path) -> Tensor:
    """float32 [32000, 256], std 1."""
    table = load_safetensors(read(assets, TABLE))["embedding.weight"].float()
    return table / table.std()
