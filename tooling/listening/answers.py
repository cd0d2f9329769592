"""A folder of raters' files becomes their ratings: what cannot be counted is named, each with its reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import UserError
from .survey import KEY, Key

FORMAT = "dit-trt-listening-answers"
RATINGS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Rater:
    """One rater's file: ratings by question id, and when it was saved (ISO 8601, UTC)."""

    name: str
    file: Path
    saved: str
    ratings: dict[str, int]


@dataclass(frozen=True)
class Answers:
    """Who is counted, and a line for every file that is not."""

    raters: list[Rater]
    refused: list[tuple[Path, str]]

    def incomplete(self, key: Key) -> list[Rater]:
        return [rater for rater in self.raters if len(rater.ratings) < len(key.questions)]


def read_answers(folder: Path, key: Key) -> Answers:
    """Every `.json` file of a folder but the key. Of a rater's files the one saved last counts.

    Raises UserError when there is none, or none that counts.
    """
    if not folder.is_dir():
        raise UserError(f"--results {folder}: no such folder; put the raters' files into one")
    files = sorted(path for path in folder.glob("*.json") if path.name != KEY)
    if not files:
        raise UserError(f"{folder} holds no answers (*.json); put the raters' files there")
    raters: dict[str, Rater] = {}
    refused: list[tuple[Path, str]] = []
    for file in files:
        try:
            rater = _read(file, key)
        except UserError as error:
            refused.append((file, str(error)))
            continue
        other = raters.get(rater.name)
        if other is not None:
            older, rater = sorted((other, rater), key=lambda one: (one.saved, one.file))
            reason = f"the rater {rater.name!r} is there twice; {rater.file.name}, saved last, counts"
            refused.append((older.file, reason))
        raters[rater.name] = rater
    if not raters:
        file, reason = refused[0]
        raise UserError(f"no file of {folder} can be counted; {file.name}: {reason}")
    return Answers(list(raters.values()), refused)


def _read(file: Path, key: Key) -> Rater:
    """Raises UserError with the reason alone."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError("not JSON; ask the rater to save and send it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
        raise UserError("not the answers of a listening test of this version")
    if content.get("survey") != key.survey:
        raise UserError(f"of another survey ({content.get('survey')}), not of {key.survey}")
    name, saved, ratings = content.get("rater"), content.get("saved"), content.get("ratings")
    if not isinstance(name, str) or not name.strip() or not isinstance(saved, str) or not isinstance(ratings, dict):
        raise UserError("damaged: it lacks the rater, the time or the ratings")
    for question, rating in ratings.items():
        if question not in key.questions:
            raise UserError(f"rates a question {question!r} that the survey does not have")
        if type(rating) is not int or rating not in RATINGS:
            raise UserError(f"rates {question} with {rating!r}, not with 1 to 5")
    if not ratings:
        raise UserError("nothing is rated in it")
    return Rater(name.strip(), file, saved, ratings)
