"""Small surveys for the tests: tones in the place of clips, and raters' files made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dit_trt.tooling.listening.answers import FORMAT
from dit_trt.tooling.listening.clips import Sound

MODELS = ["float-model", "sqs-model", "sqt-model"]
CAPTIONS = [
    "a dog barks",
    "says \"hello\" & 'bye'",
    "</script><script>document.title = 'broken'</script>",
    "Grüße, 日本語 🐕 \u2028 next",
    "$title <b>bold</b> <!-- ${count} " + "verylongword" * 12,
]
RATE = 44100


def sounds(seconds: float = 0.4) -> list[Sound]:
    """A tone for every caption and model; pitch and loudness differ by model, and only pitch will in a survey."""
    time = np.arange(round(seconds * RATE)) / RATE
    found = []
    for number, caption in enumerate(CAPTIONS):
        for place, model in enumerate(MODELS):
            tone = 0.1 * (1 + place) * np.sin(2 * np.pi * (300 + 100 * number + 40 * place) * time)
            audio = np.stack([tone, tone]).astype(np.float32)
            found.append(Sound(model, f"{number + 1:03}", caption, 1000 + number, audio, RATE))
    return found


def write_answers(file: Path, survey: str, rater: str, ratings: dict[str, object], **changes: object) -> Path:
    """A rater's file as the page saves it."""
    content = {
        "format": FORMAT,
        "version": 1,
        "survey": survey,
        "rater": rater,
        "begun": "2026-01-01T10:00:00.000Z",
        "saved": "2026-01-01T10:09:00.000Z",
        "questions": 15,
        "order": sorted(ratings),
        "ratings": ratings,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, **changes}), "utf-8")
    return file
