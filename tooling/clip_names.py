"""How a clip's file is called."""

from __future__ import annotations

import re


def clip_name(prompt: str, seed: int) -> str:
    """`<prompt>-<seed>.wav`; of the prompt 60 letters at most, and 180 bytes, so that any script fits a file name."""
    letters = re.sub(r"[^\w]+", "-", prompt.lower())[:60].encode()[:180].decode(errors="ignore")
    return f"{letters.strip('-') or 'clip'}-{seed}.wav"
