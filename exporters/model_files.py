"""Where a model is: what a user names becomes a folder, its configuration, its tensors and its text encoder.

`demo`, a folder in stable-audio-tools' or diffusers' layout, a file of weights beside its `model_config.json` (a
fine-tune), or a hub id.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engines.errors import UserError
from ..engines.home import expanded, read_json
from .diffusers_layout import is_diffusers, read_diffusers
from .hub import fetch_model, fetch_text_encoder, is_hub_id
from .tensor_files import TensorSource, open_weights

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
CONFIG = "model_config.json"
_NO_MODEL = "not a folder in stable-audio-tools' or diffusers' layout"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder that is no part of a checkpoint: its config.json, tensors under transformers' names, tokenizer."""

    source: str
    config: dict
    tensors: TensorSource
    tokenizer: Path


@dataclass(frozen=True)
class ModelFiles:
    """What was found. source: what `find_model` takes to find it again; config_file: what messages name."""

    source: str
    name: str
    folder: Path
    config_file: Path
    config: dict
    tensors: TensorSource
    text_encoder: TextEncoder | None


def find_model(model: str, text_encoder: str | None = None) -> ModelFiles:
    """`demo`, a folder, a file of weights, or a hub id. text_encoder: a folder or hub id (default: the model's own).

    The text encoder's config.json is put into the prompt conditioner's settings, so that graphs depend on the model's
    configuration alone. Raises UserError when something is missing or unreadable.
    """
    path = DEMO if model == "demo" else expanded(model)
    if path.exists():
        # A file may be a link, as all of the hub's cache are: its name and what lies beside it are those of the link.
        place = path.resolve() if path.is_dir() else path.absolute()
        source, name = ("demo" if path == DEMO else str(place)), place.name if path.is_dir() else place.stem
    elif is_hub_id(model):
        source, name, path = model, model.partition("/")[2], _fetched(model, fetch_model)
    else:
        raise UserError(
            f"--model {model}: no such folder or file; give 'demo', a folder with {CONFIG}, or a hub id (owner/name)"
        )
    folder = path if path.is_dir() else path.parent
    config_file = folder / CONFIG
    if path.is_dir() and is_diffusers(path) and not _has_own_weights(path):
        config_file = path / "model_index.json"
        config, tensors = read_diffusers(path)
    else:
        config, tensors = read_json(config_file, _NO_MODEL), open_weights(path)
    encoder = None
    if (prompt := _t5_settings(config)) is not None:
        encoder = find_text_encoder(str(prompt.get("t5_model_name", "t5-base")), folder, text_encoder)
        config = copy.deepcopy(config)
        _t5_settings(config)["encoder"] = encoder.config  # type: ignore[index]
    elif text_encoder is not None:
        raise UserError(f"--text-encoder: the model {name} takes none, its prompts have a table of their own")
    return ModelFiles(source, name, folder, config_file, config, tensors, encoder)


def _fetched(repo_id: str, fetch: Callable[[str], Path]) -> Path:
    """What reads as a hub id may have been meant as a folder: the message says that there is none, too."""
    try:
        return fetch(repo_id)
    except UserError as error:
        raise UserError(f"there is no folder {repo_id} here, and as a hub id: {error}") from None


def _has_own_weights(folder: Path) -> bool:
    """Whether a folder in diffusers' layout has stable-audio-tools', too, as Stable Audio Open's repository does."""
    suffixes = (".safetensors", ".safetensors.index.json", ".ckpt")
    return (folder / CONFIG).is_file() and any(path.name.endswith(suffixes) for path in folder.iterdir())


def find_text_encoder(name: str, model_folder: Path, given: str | None) -> TextEncoder:
    """The given one; else that beside the model (`text_encoder/`, `tokenizer/`, as diffusers'); else the hub's."""
    if given is not None:
        folder = expanded(given)
        if folder.is_dir():
            return _open_text_encoder(str(folder.resolve()), folder)
        if not is_hub_id(given):
            raise UserError(f"--text-encoder {given}: no such folder; give one with config.json, or a hub id")
        return _open_text_encoder(given, _fetched(given, fetch_text_encoder))
    if (model_folder / "text_encoder").is_dir():
        return _open_text_encoder("", model_folder / "text_encoder")
    try:
        return _open_text_encoder("", fetch_text_encoder(name))
    except UserError as error:
        raise UserError(f"{error}; or give the folder of the text encoder {name} with --text-encoder DIR") from None


def _open_text_encoder(source: str, folder: Path) -> TextEncoder:
    """source: what --text-encoder was, empty where it was not given."""
    config = read_json(folder / "config.json", "the folder of a text encoder has one")
    places = (folder / "tokenizer.json", folder.parent / "tokenizer" / "tokenizer.json")
    tokenizer = next((path for path in places if path.is_file()), None)
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer.json, nor ../tokenizer/tokenizer.json: "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    return TextEncoder(source, config, open_weights(folder), tokenizer)


def _t5_settings(config: dict) -> dict | None:
    """The settings of a prompt conditioner of type t5; None where there is none, or the configuration is malformed."""
    try:
        entries = config["model"]["conditioning"]["configs"]
        return next((e["config"] for e in entries if e["id"] == "prompt" and e["type"] == "t5"), None)
    except (KeyError, TypeError):
        return None
