"""Manifests edited as a forger would: with a valid hash of their own. The product has no function for that."""

from __future__ import annotations

import hashlib
import json


def stamped(values: dict) -> str:
    """`values` as JSON with a valid `sha256` field: the sha256 of the text in which that field is 64 zeros."""
    return restamped(json.dumps({**values, "sha256": "0" * 64}, indent=3), "0" * 64)


def restamped(text: str, stamp: str) -> str:
    """A manifest's text with a right `sha256` field in the place of `stamp`."""
    field = '"sha256": "'
    assert text.count(field + stamp) >= 1
    blank = text.replace(field + stamp, field + "0" * 64, 1)
    return blank.replace(field + "0" * 64, field + hashlib.sha256(blank.encode()).hexdigest(), 1)
