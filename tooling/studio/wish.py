"""The page's fields become a wish, which is also a `dit-trt run` command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engines.errors import UserError

NUMBERS: dict[str, tuple[str, type, str]] = {  # field -> its label, its type, an example
    "seconds": ("length", float, "2.5"),
    "steps": ("steps", int, "50"),
    "cfg": ("guidance", float, "7"),
    "seed": ("seed", int, "1000"),
    "init_noise_level": ("noise level", float, "2"),
}


@dataclass(frozen=True)
class Wish:
    """One clip as the page asks for it, in the words of `dit-trt run`; None leaves a value to the model.

    bundle: a name in the home folder, or a folder. seconds: of sound. init_noise_level: the sigma that a run with
    `init_audio` begins at.
    """

    prompt: str
    bundle: str
    seconds: float | None = None
    steps: int | None = None
    cfg: float | None = None
    seed: int = 1000
    negative_prompt: str | None = None
    init_audio: Path | None = None
    init_noise_level: float | None = None
    device: str | None = None

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Wish:
        """Fields as a page sends them, numbers or text. Raises UserError that names every one that is none."""
        values: dict[str, Any] = {
            "prompt": (fields["prompt"] or "").strip(),
            "bundle": fields["bundle"],
            "device": fields.get("device"),
            "negative_prompt": (fields.get("negative_prompt") or "").strip() or None,
            "init_audio": Path(fields["init_audio"]) if fields.get("init_audio") else None,
        }
        faults = []
        if not values["prompt"]:
            faults.append('the prompt is empty; say what to hear, for example "dog barking"')
        if not values["bundle"]:
            faults.append("no bundle is chosen; choose one in the list")
        for name, (label, kind, example) in NUMBERS.items():
            given = fields.get(name)
            if given is None or not str(given).strip():
                if name == "seed":
                    faults.append(f"the seed is empty; give a whole number, for example {example}")
                continue
            try:
                values[name] = _number(str(given).strip(), kind)
            except ValueError:
                wanted = "whole number" if kind is int else "number"
                faults.append(f"the {label} {str(given)[:40]!r} is no {wanted}; give one, for example {example}")
        if faults:
            raise UserError("; ".join(faults))
        if values["init_audio"] is None:
            values.pop("init_noise_level", None)
        return cls(**values)

    @property
    def command(self) -> str:
        """The shell's line that makes the same clip; a recording has the name it was given on the page."""
        options = {
            "bundle": self.bundle,
            "device": self.device,
            "seconds": self.seconds,
            "steps": self.steps,
            "cfg": self.cfg,
            "seed": self.seed,
            "negative-prompt": self.negative_prompt,
            "init-audio": self.init_audio and self.init_audio.name,
            "init-noise-level": self.init_noise_level,
        }
        words = [f"--{name}={_text(value)}" for name, value in options.items() if value is not None]
        return shlex.join(["dit-trt", "run", *words, *["--"] * self.prompt.startswith("-"), self.prompt])


def _text(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _number(text: str, kind: type) -> float | int:
    """Raises ValueError for text that is no finite number, or no whole one where that is asked for."""
    if kind is int and text.lstrip("-").isdigit():
        return int(text)
    number = float(text)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError(text)
    return kind(number)
