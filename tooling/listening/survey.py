"""Sounds of several models become a blind survey: one HTML page for raters, and the key that tells which is which."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ...engines.errors import UserError
from ...engines.home import read_json
from ..loudness import matching_gains
from .clips import Sound
from .flac import flac_files

PAGE, KEY = "survey.html", "key.json"
FORMAT = "dit-trt-listening-key"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Survey:
    """What was written: the files, and how loud (LUFS) every clip is."""

    id: str
    page: Path
    key: Path
    questions: int
    loudness: float


def check_new(folder: Path) -> None:
    """Raises UserError where a survey would replace another: without its key, answers to that one are worth nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    for name in (PAGE, KEY):
        if (folder / name).exists():
            raise UserError(f"{folder} holds a survey already ({name}); choose another --output")


def check_title(title: str, models: Sequence[str]) -> None:
    """Raises UserError for a title that raters must not see."""
    for model in models:
        if model.lower() in title.lower():
            raise UserError(f"--title names the model {model}, which a blind test must not; choose another")


def write_survey(sounds: Sequence[Sound], models: Sequence[str], title: str, folder: Path) -> Survey:
    """Write PAGE and KEY into `folder`, a question for every sound.

    The page holds captions, clips made equally loud and as large as each other by caption, and ids that are random: its
    order, sizes and names tell nothing. All else is in the key.
    """
    gains, loudness = matching_gains([sound.audio for sound in sounds], sounds[0].sample_rate)
    files: dict[int, bytes] = {}
    for caption_id in dict.fromkeys(sound.id for sound in sounds):
        places = [place for place, sound in enumerate(sounds) if sound.id == caption_id]
        louder = [sounds[place].audio * gains[place] for place in places]
        files |= dict(zip(places, flac_files(louder, sounds[0].sample_rate)))
    survey_id = secrets.token_hex(8)
    ids = _ids(len(sounds))
    key = {
        "format": FORMAT,
        "version": 1,
        "survey": survey_id,
        "title": title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": list(models),
        "loudness_lufs": round(loudness, 2),
        "questions": {name: _answer(sound, gain) for name, sound, gain in zip(ids, sounds, gains)},
    }
    asked = [
        {"id": name, "caption": sounds[place].caption, "audio": base64.b64encode(files[place]).decode()}
        for place, name in enumerate(ids)
    ]
    page = render(survey_id, title, sorted(asked, key=lambda question: question["id"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / PAGE).write_text(page, "utf-8")
    return Survey(survey_id, folder / PAGE, folder / KEY, len(sounds), loudness)


def _ids(count: int) -> list[str]:
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[secrets.token_hex(4)] = None
    return list(ids)


def _answer(sound: Sound, gain: float) -> dict[str, Any]:
    return {"model": sound.model, "id": sound.id, "caption": sound.caption, "seed": sound.seed, "gain": round(gain, 5)}


def render(survey_id: str, title: str, questions: Sequence[dict[str, str]]) -> str:
    """The page. A policy in its head lets the browser run and show what is in it and refuse every request."""
    style, script = ((_HERE / f"survey.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = [
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(style)}'",
        "media-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    data = json.dumps({"survey": survey_id, "questions": questions}, ensure_ascii=False)
    return Template((_HERE / "survey.html").read_text("utf-8")).substitute(
        policy="; ".join(policy),
        title=html.escape(title),
        count=len(questions),
        style=style,
        data=data.replace("<", "\\u003c"),  # no caption ends the script
        script=script,
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@dataclass(frozen=True)
class Key:
    """What a key file says; questions: id in the page -> the model, and the id of its caption."""

    survey: str
    title: str
    models: list[str]
    questions: dict[str, tuple[str, str]]


def read_key(path: Path) -> Key:
    """Raises UserError when the file is no key of a survey."""
    content = read_json(path, "it is the key.json that dit-trt listen wrote beside the page; name it with --key")
    try:
        if content["format"] != FORMAT or content["version"] != 1:
            raise KeyError("format")
        questions = {name: (str(said["model"]), str(said["id"])) for name, said in content["questions"].items()}
        found = Key(str(content["survey"]), str(content["title"]), list(content["models"]), questions)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the key of a listening test of this version; name it with --key") from None
    if not questions or {model for model, _ in questions.values()} != set(found.models):
        raise UserError(f"{path} is damaged: its questions are not those of its models")
    return found
