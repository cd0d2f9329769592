"""Manifests edited as a forger would: with a valid hash of their own. The product has no function for that."""

from __future__ import annotations

import hashlib
import json


def stamped(values: dict) -> str:
    """`values` as JSON with a valid `sha256` field: the sha256 of the text in which that field is 64 zeros."""
    blank = json.dumps({**values, "sha256": "0" * 64}, indent=3)
    assert blank.count("0" * 64) >= 1
    stamp = hashlib.sha256(blank.encode()).hexdigest()
    return blank.replace('"sha256": "' + "0" * 64, '"sha256": "' + stamp, 1)
