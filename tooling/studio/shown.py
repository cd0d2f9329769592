"""Takes and comparisons as the page shows them: HTML, every word of a user escaped."""

from __future__ import annotations

import base64
from html import escape

from .takes import Comparison, Model, Progress, Take

MB = 1e6
NBSP = "\N{NO-BREAK SPACE}"


def status(message: str, now: bool = False) -> str:
    """now: something runs, and the line will be another."""
    return f'<p role="status"{" class=now" * now}>{escape(message)}</p>'


def error(message: str) -> str:
    return f'<p role="alert" class="error">{escape(message)}</p>'


def about(model: Model) -> str:
    """A line below the bundle."""
    words = f"Model {model.name}, {model.backend}, clips up to {model.longest_seconds:.2f}{NBSP}s."
    if model.other is None:
        words += " There is no other bundle of it to compare with; FP32's is made by: dit-trt build --method none"
    return f"<p>{escape(words)}</p>"


def progress(now: Progress, picture: bytes | None) -> str:
    """A bar, words, and the latest picture of the estimate."""
    words = f"{now.bundle}: step {now.done} of {now.steps}"
    if now.seconds_left is not None and now.done < now.steps:
        words += f", about {now.seconds_left:.0f} s left"
    shown = "" if picture is None else _image(picture, "Spectrogram of the estimate so far", 640, 160)
    bar = f'<progress aria-label="Sampling" max="{now.steps}" value="{now.done}"></progress>'
    return f"{bar}<p>{escape(words)}</p>{shown}"


def result(made: Take | Comparison) -> str:
    if isinstance(made, Take):
        return f'<div class="takes">{_take(made)}</div>'
    a, b = made.takes
    worst = int(made.cosine.argmin())
    cosine = f"{made.cosine[worst]:.4f}, at step {worst + 1}"
    rows = (
        ("bundle, MB", *(f"{take.size_bytes / MB:.1f}" for take in made.takes), _times(a.size_bytes, b.size_bytes)),
        ("one step, ms", *(f"{take.step_ms:.1f}" for take in made.takes), _times(a.step_ms, b.step_ms)),
        (
            "all steps, s",
            *(f"{take.sampling_seconds:.1f}" for take in made.takes),
            _times(a.sampling_seconds, b.sampling_seconds),
        ),
    )
    table = "".join("<tr><th scope=row>" + "<td>".join(map(escape, row)) for row in rows)
    words = (
        f"Of the denoised latents, B differs from A by {100 * made.relative[-1]:.1f} % at the end and "
        f"{100 * made.relative.max():.1f} % at most; the lowest cosine is {cosine}."
    )
    return (
        f'<div class="takes">{_take(a, "A: ")}{_take(b, "B: ")}</div>'
        '<p><button type="button" onclick="hearOther(this)">Hear A and B in turn</button></p>'
        f"<table><thead><tr><th><th scope=col>A<th scope=col>B<th scope=col>A / B</thead>{table}</table>"
        f"<p>{escape(words)}</p>" + _image(made.picture, "Difference and cosine of B and A by step", 720, 461)
    )


def label(made: Take | Comparison) -> str:
    """One line of the history."""
    take = made if isinstance(made, Take) else made.takes[1]
    what = take.recipe if isinstance(made, Take) else f"A/B {made.takes[0].recipe} and {take.recipe}"
    return f"{take.wish.prompt[:60]}, seed {take.wish.seed}, {take.steps} steps, {what}"


def _take(take: Take, side: str = "") -> str:
    address = f"clips/{take.file.parent.name}/{take.file.name}"
    name = take.file.name
    if side:  # the two are of one prompt and one seed
        name = f"{take.file.stem}-{take.recipe.lower().replace(' ', '-')}{take.file.suffix}"
    name = escape(name)
    cost = (
        f"{escape(take.recipe)}, {take.size_bytes / MB:.1f}{NBSP}MB<br>"
        f"{take.step_ms:.1f}{NBSP}ms a step, {take.sampling_seconds:.1f}{NBSP}s"
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in take.notes)
    return (
        f'<div class="take"><h2>{escape(side + take.wish.prompt)}</h2>'
        f"<p>{cost}</p>{notes}"
        f'<audio controls preload="auto" src="{escape(address)}" aria-label="{escape(side)}the sound"></audio>'
        + _image(take.picture, f"Waveform and spectrogram of {take.wish.prompt}", 720, 490)
        + f'<p><a class="download" href="{escape(address)}" download="{name}" aria-label="Download {name}">'
        "Download WAV</a></p></div>"
    )


def _times(a: float, b: float) -> str:
    return f"{a / b:.2f}"


def _image(png: bytes, words: str, width: int, height: int) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(words)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
