"""Recipes as TOML files: `read_recipe` takes one apart and tells every fault at once, `recipe_toml` writes one.

    method = "sqt"
    bits = "w4a8"
    alpha = "auto"
    exclude = ["cross_attn.to_q"]

    [bits_for]
    "ff.ff.2" = "w8a8"

All keys are optional; what is left out is the default of `Recipe`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..engines.errors import UserError
from .recipe import Recipe


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# What a key takes, in words, and whether a value is that.
_TAKES: dict[str, Callable[[object], bool]] = {
    "a string": lambda value: isinstance(value, str),
    'a number or "auto"': lambda value: _is_number(value) or value == "auto",
    "a whole number": lambda value: _is_number(value) and isinstance(value, int),
    'a whole number or "channel"': lambda value: value == "channel" or (_is_number(value) and isinstance(value, int)),
    "true or false": lambda value: isinstance(value, bool),
    "a list of strings": _is_texts,
    "a table of strings": lambda value: isinstance(value, dict) and _is_texts(list(value.values())),
}
KEYS = {
    "method": "a string",
    "bits": "a string",
    "alpha": 'a number or "auto"',
    "smooth": "true or false",
    "include": "a list of strings",
    "exclude": "a list of strings",
    "bits_for": "a table of strings",
    "sqd_weights": "a string",
    "lora_rank": "a whole number",
    "lora_form": "a string",
    "clip": "true or false",
    "cfg_pair": "a string",
    "w4": "a string",
    "group_size": 'a whole number or "channel"',
    "rounding": "a string",
    "decoder_bits": "a whole number",
    "trunk": "a string",
}
assert list(KEYS) == [field.name for field in fields(Recipe)]


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key on a line of its own; `read_recipe` gives back an equal one."""
    lines = [f"{key} = {_toml(getattr(recipe, key))}" for key in KEYS if key != "bits_for"]
    if recipe.bits_for:  # a table comes after all plain keys
        lines += ["", "[bits_for]", *(f"{_toml(pattern)} = {_toml(bits)}" for pattern, bits in recipe.bits_for)]
    return "\n".join(lines) + "\n"


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file by field name of Recipe, only those it names.

    Raises UserError for a file that cannot be read and, all in one line, for unknown keys, wrong types and values no
    recipe may have.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"the recipe {path} is not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the recipe {path} is not valid TOML: {_one_line(error)}") from None
    faults = [f"unknown key {key!r}{_hint(key)}" for key in values if key not in KEYS]
    good: dict[str, Any] = {}
    for key in KEYS.keys() & values.keys():
        if _TAKES[KEYS[key]](values[key]):
            good[key] = _as_field(values[key])
        else:
            faults.append(f"{key} takes {KEYS[key]}, not {_kind(values[key])}")
    try:
        Recipe(**good)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(f"the recipe {path}: {'; '.join(faults)}")
    return good


def _as_field(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "a table"}
    if isinstance(value, list):
        return "a list" if _is_texts(value) else "a list of other things"
    return names.get(type(value), "a date or time")


def _hint(key: str) -> str:
    near = get_close_matches(key.lower(), KEYS, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(KEYS)})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _toml(value: str | float | bool | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
