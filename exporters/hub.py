"""Models by their id on the Hugging Face hub: only the files that are needed, into the hub's own cache.

`huggingface_hub` does the work (an extra), so HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and its other settings count. Where a
model is there in stable-audio-tools' layout and in diffusers', one of them is fetched: each is gigabytes.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engines.errors import UserError
from .tensor_files import weights_among

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
_DESCRIPTIONS = ("model_config.json", "model_index.json", "config.json", "tokenizer.json")
_DIFFUSERS_PARTS = ("transformer", "vae", "projection_model")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def is_hub_id(text: str) -> bool:
    """Whether a text reads as `owner/name` and is no path that exists here."""
    return len(text) <= 96 and re.fullmatch(f"{_NAME}/{_NAME}", text, re.ASCII) is not None and not Path(text).exists()


def fetch_model(repo_id: str) -> Path:
    """The folder of a model: its configuration, licence, the weights of one layout, text encoder and tokenizer.

    Raises UserError when the hub does not give it (gated, unknown, no network, ...), or when it is no model of Stable
    Audio's; ModuleNotFoundError without huggingface_hub.
    """
    return _fetch(repo_id, model_files)


def fetch_text_encoder(repo_id: str) -> Path:
    """The folder of a text encoder of its own, such as T5: configuration, weights, tokenizer. Raises as fetch_model."""
    return _fetch(repo_id, text_encoder_files)


def model_files(names: Collection[str], repo_id: str) -> list[str]:
    """Which files of a repository are the model. Raises UserError when it holds none, or several."""
    chosen = [name for name in ("model_config.json", "model_index.json", "tokenizer.json") if name in names]
    if "model_config.json" not in chosen and "model_index.json" not in chosen:
        raise UserError(f"{repo_id} has neither model_config.json nor model_index.json: no model of Stable Audio's")
    bare = "model_config.json" in chosen and any(
        name.endswith((".safetensors", ".ckpt", "pytorch_model.bin")) for name in _inside(names, "")
    )
    if bare or "model_index.json" not in chosen:
        chosen += _weights(names, "", repo_id)
    else:
        chosen += [name for name in names if re.fullmatch(r"scheduler/[^/]+\.json", name)]
        for part in _DIFFUSERS_PARTS:
            chosen += [f"{part}/config.json", *_weights(names, f"{part}/", repo_id)]
    if "text_encoder/config.json" in names:
        chosen += ["text_encoder/config.json", *_weights(names, "text_encoder/", repo_id)]
    return [*chosen, *(name for name in names if re.fullmatch(r"tokenizer/[^/]+\.(json|model)", name))]


def text_encoder_files(names: Collection[str], repo_id: str) -> list[str]:
    """Which files of a repository are the text encoder. Raises UserError when it holds none."""
    if "config.json" not in names:
        raise UserError(f"{repo_id} has no config.json: no text encoder")
    return ["config.json", *_weights(names, "", repo_id), *(name for name in _TOKENIZER if name in names)]


def _inside(names: Iterable[str], folder: str) -> set[str]:
    """The names of the files in a folder, without those in folders of it."""
    below = (name.removeprefix(folder) for name in names if name.startswith(folder))
    return {name for name in below if "/" not in name}


def _weights(names: Collection[str], folder: str, repo_id: str) -> list[str]:
    """The files of weights in a folder of a repository: one, or an index and its shards."""
    there = _inside(names, folder)
    chosen = weights_among(there, f"{repo_id}/{folder}".rstrip("/"))
    shards = []
    if chosen.endswith(".index.json"):
        stem = re.escape(chosen.removesuffix(".safetensors.index.json"))
        shards = sorted(name for name in there if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name))
    return [folder + name for name in (chosen, *shards)]


def _fetch(repo_id: str, choose: Callable[[Collection[str], str], list[str]]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    with _explained(repo_id):
        # First what is small, and the commit: everything else is of the same.
        folder = Path(snapshot_download(repo_id, allow_patterns=[*_LICENCES, *_DESCRIPTIONS]))
        try:
            wanted = choose(HfApi().list_repo_files(repo_id, revision=folder.name), repo_id)
        except (HTTPError, OfflineModeIsEnabled) as error:  # what the cache has may do
            try:
                wanted = choose([path.relative_to(folder).as_posix() for path in folder.rglob("*")], repo_id)
            except UserError:
                raise error from None
        return Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=[*map(glob.escape, wanted)]))


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the hub's client raises, in one line that names the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{repo_id} is gated: accept its licence on the model's page, then {_LOGIN}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo_id}: the hub has no such model, or a private one: check the name, or {_LOGIN}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(_answer(repo_id, error.response.status_code)) from None
    except errors.HFValidationError:
        raise UserError(f"{repo_id!r} is no id of a model on the hub: those are owner/name") from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(_answer(repo_id, cause.response.status_code)) from None
        raise _unreachable(repo_id, cause or error) from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # of the connection
        raise _unreachable(repo_id, error) from None


def _answer(repo_id: str, status: int) -> str:
    if status == 401:
        return f"{repo_id}: the hub does not accept the token (HF_TOKEN, or that of `hf auth login`): make a new one"
    if status == 403:
        return f"{repo_id}: the token may not read this model: give it the right to, or {_LOGIN} with another"
    return f"{repo_id}: the hub answers with status {status}; try again later"


def _unreachable(repo_id: str, error: BaseException) -> UserError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return UserError(f"{repo_id} is not whole in the local cache, and HF_HUB_OFFLINE is set: unset it to fetch it")
    return UserError(
        f"{repo_id} is not whole in the local cache, and the hub cannot be reached ({type(error).__name__}): check the "
        "network and its proxy"
    )


def licence_of(folder: Path) -> str:
    """The licence of the model in a folder: its licence and notice files, else what its model card says, else ''."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    )
    if files:
        return "\n".join(path.read_text("utf-8", "replace") for path in files)
    card = folder / "README.md"
    return _card_licence(card.read_text("utf-8", "replace")) if card.is_file() else ""


def _card_licence(card: str) -> str:
    """`license`, `license_name` and `license_link` of a model card's YAML head, one a line."""
    if (head := re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)) is None:
        return ""
    found = []
    for name in ("license", "license_name", "license_link"):
        if (entry := re.search(rf"^{name}:((?:.*)(?:\n\s*- .*)*)", head[1], re.MULTILINE)) is not None:
            values = [line.strip().removeprefix("- ").strip("'\" ") for line in entry[1].splitlines()]
            found.append(f"{name}: {', '.join(filter(None, values))}")
    return "\n".join(found)
