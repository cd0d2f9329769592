"""Prompts and captions: a text file, AudioCaps' CSV or JSON lines in, sentences out, with ids or as a seeded choice."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from ..engines.errors import UserError

CAPTION_COLUMN = "caption"
ID_COLUMNS = ("id", "audiocap_id")  # the second is AudioCaps'
ID_BYTES = 180  # in UTF-8; with what is added a file's name stays under 255


@dataclass(frozen=True)
class Caption:
    """A sentence and the name of what is made from it: of a file, without its suffix."""

    id: str
    text: str


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a `.csv` with a `caption` column (AudioCaps' layout), or of any other file, one a line.

    A `.jsonl` file holds an object a line with a `caption`. Text files may hold blank lines and `#` comments. Raises
    UserError, naming file and fix, when the file is missing, not UTF-8, without prompts or without that column.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix.lower() in (".json", ".tsv"):
        raise UserError(f"{path}: give JSON lines (.jsonl), a CSV with commas (.csv) or a text file, a prompt a line")
    if path.suffix.lower() == ".jsonl":
        prompts = [entry[CAPTION_COLUMN] for entry in _objects(path, text).values()]
    else:
        prompts = _captions(path, text) if path.suffix.lower() == ".csv" else _lines(text)
    if not prompts:
        raise UserError(f"{path} holds no prompts: write one a line, or a CSV row each")
    return prompts


def read_captions(path: str | Path) -> list[Caption]:
    """The captions of a file as `read_prompts` reads it, each with its id, which names its clip.

    A CSV's are in its column `id`, or `audiocap_id` as in AudioCaps'; those of JSON lines in the field, of all or none.
    Captions without have their place in the file: 0001, 0002, ... Raises UserError as `read_prompts`, and for an id
    that is there twice or cannot be a file's name.
    """
    path = Path(path)
    texts = read_prompts(path)
    reading = {".csv": _ids, ".jsonl": _object_ids}.get(path.suffix.lower())
    ids = None if reading is None else reading(path, _read(path))
    if ids is None:
        width = max(4, len(str(len(texts))))
        return [Caption(f"{i + 1:0{width}}", text) for i, text in enumerate(texts)]
    known: dict[str, int] = {}
    for i, name in enumerate(ids):
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
            raise UserError(f"{path}: the id {name[:40]!r} cannot name a file; use letters, digits, -, _ and .")
        if len(name.encode()) > ID_BYTES:
            raise UserError(f"{path}: the id {name[:40]!r} is too long for a file's name; use at most {ID_BYTES} bytes")
        if (first := known.setdefault(name, i)) != i:
            raise UserError(f"{path}: the id {name} is there twice (captions {first + 1} and {i + 1}); make ids unique")
    return [Caption(name, text) for name, text in zip(ids, texts)]


def _ids(path: Path, text: str) -> list[str] | None:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    column = next((name for name in ID_COLUMNS if name in (reader.fieldnames or [])), None)
    return None if column is None else [(row[column] or "").strip() for row in reader]


def _objects(path: Path, text: str) -> dict[int, dict[str, Any]]:
    """By the number of their line."""
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get(CAPTION_COLUMN), str):
            raise UserError(
                f'{path}, line {number}: write an object a line, as {{"id": "91", "caption": "a dog barks"}}'
            )
        if not (caption := entry[CAPTION_COLUMN].strip()):
            raise UserError(f"{path}, line {number}: the caption is empty; complete or delete the line")
        found[number] = {**entry, CAPTION_COLUMN: caption}
    return found


def _object_ids(path: Path, text: str) -> list[str] | None:
    entries = _objects(path, text)
    column = next((name for name in ID_COLUMNS if any(name in entry for entry in entries.values())), None)
    if column is None:
        return None
    ids = {number: entry.get(column, "") for number, entry in entries.items()}
    for number, name in ids.items():
        if type(name) not in (str, int, float):
            raise UserError(f"{path}, line {number}: the {column} is neither text nor a number")
    return [*map(str, ids.values())]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no prompt file {path}: give a text file with one prompt a line, or AudioCaps' CSV") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None


def default_prompts() -> list[str]:
    """The 50 prompts that come with the package."""
    return read_prompts(Path(__file__).with_name("prompts.txt"))


def choose_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of `prompts` without replacement, in their own order; one seed chooses the same everywhere.

    Prompts are ranked by a hash of seed and position, so a smaller choice is always part of a larger one of
    the same seed. Raises UserError when `count` is not in 1..len(prompts).
    """
    if not 1 <= count <= len(prompts):
        raise UserError(f"cannot choose {count} of {len(prompts)} prompts: use --num-prompts 1 to {len(prompts)}")
    ranked = sorted(range(len(prompts)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return [prompts[i] for i in sorted(ranked[:count])]


def _lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _captions(path: Path, text: str) -> list[str]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames
        if columns is not None and CAPTION_COLUMN not in columns:
            raise UserError(
                f"{path} has no column {CAPTION_COLUMN!r} (it has {', '.join(columns)}): "
                "the first line must name the columns, as in AudioCaps' CSV"
            )
        captions = []
        for row in reader:
            if None in row:
                where = f"{path}, line {reader.line_num}"
                raise UserError(f"{where}: more fields than columns; put captions that hold commas in quotes")
            caption = (row[CAPTION_COLUMN] or "").strip()
            if not caption:
                raise UserError(f"{path}, line {reader.line_num}: the caption is empty; complete or delete the row")
            captions.append(caption)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    return captions


def heldout_prompts() -> list[str]:
    """The prompts that calibration never sees; comparisons run on them."""
    return read_prompts(Path(__file__).with_name("heldout.txt"))


def heldout_captions() -> list[Caption]:
    """Both of them with ids, 24 sentences: what clips are evaluated on."""
    return [
        replace(caption, id=f"{kind}-{caption.id}")
        for kind in ("ablation", "heldout")
        for caption in read_captions(Path(__file__).with_name(f"{kind}.txt"))
    ]


def ablation_prompts() -> list[str]:
    """The prompts of the ablation table: seen by neither calibration nor the comparisons that chose our defaults."""
    return read_prompts(Path(__file__).with_name("ablation.txt"))
