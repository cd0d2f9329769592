"""The report: an `Analysis` and its drawn figures in, one HTML file out that asks for nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template

import soundfile

from ...runtime.wav import pcm16
from ..contents import bundle_parts
from ..recipe_text import options_of
from .analysis import Analysis, Clip
from .captions import captions

WORST = 10


def write_report(analysis: Analysis, folder: Path, name: str, command: str) -> None:
    """`name` in `folder`, where the figures are (see draw_all). command: that which made it, for the reader."""
    told = captions(analysis)
    parts = [
        _facts(analysis, command),
        *_sound(analysis),
        *(_figure(folder, figure, title, text) for figure, (title, text) in told.items()),
        _section("Input ranges by kind of Linear", _ranges(analysis)),
        _section("The Linears that lose most", _worst(analysis)),
        _section("Sizes", _sizes(analysis)),
    ]
    title = f"What {analysis.bundle.folder.name} does to “{analysis.prompt}”"
    page = Template(files(__package__).joinpath("report.html").read_text("utf-8"))
    text = page.substitute(title=escape(title), body="\n".join(parts))
    (folder / name).write_text(text, "utf-8")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _facts(analysis: Analysis, command: str) -> str:
    manifest, recipe, settings = analysis.bundle.manifest, analysis.recipe, analysis.settings
    model, table = manifest["model"], manifest["calibration"]
    options = [f"alpha {recipe.alpha}" if recipe.smooth else "", *options_of(recipe)]
    ran = table["settings"]
    rows = [
        ("recipe", ", ".join(filter(None, [recipe.method, recipe.bits, *dict.fromkeys(options)]))),
        ("quantized", f"{len(analysis.errors)} of {len(analysis.linears)} Linears"),
        ("model", f"{model['name']} ({model['digest'][:12]})"),
        ("licence", (model["licence"].strip() or "none given").splitlines()[0]),
        ("backend", manifest["backend"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())),
        ("sampled", f"{settings.steps} steps, {settings.sampler}, cfg {settings.cfg_scale:g}, seed {settings.seed}"),
        ("calibration", f"{len(table['prompts'])} prompts x {ran['steps']} steps, cfg {ran['cfg_scale']:g}"),
        ("made by", command),
    ]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="facts"><tbody>\n{cells}</tbody></table>'


def _sound(analysis: Analysis) -> list[str]:
    if not analysis.clips:
        return []
    players = "".join(f"<p>{escape(clip.label)}</p>{_player(clip)}\n" for clip in analysis.clips)
    note = (
        "Each sampled by itself from the same noise. Small errors of the velocity add up over the steps: where a "
        "recipe is coarse the two are different takes, where it is fine one take."
    )
    return [_section("Hear it", f'{players}<p class="soft">{note}</p>')]


def _player(clip: Clip) -> str:
    encoded = BytesIO()
    soundfile.write(encoded, pcm16(clip.audio), clip.sample_rate, format="FLAC", subtype="PCM_16")
    return f'<audio controls preload="metadata" src="{_data(encoded.getvalue(), "audio/flac")}"></audio>'


def _figure(folder: Path, name: str, title: str, caption: str) -> str:
    """As SVG, the surface as PNG: its points are an image in either."""
    kind, mime = ("png", "image/png") if name == "activations" else ("svg", "image/svg+xml")
    source = _data((folder / f"{name}.{kind}").read_bytes(), mime)
    picture = f'<img src="{source}" alt="{escape(title)}">'
    return _section(title, f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")


def _data(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _ranges(analysis: Analysis) -> str:
    head = ("kind", "first step", "last step", "last / first", "largest ever", "largest / median channel")
    rows = [
        (
            row["kind"],
            f"{row['first']:.3g}",
            f"{row['last']:.3g}",
            "-" if row["growth"] is None else f"{row['growth']:.2f}",
            f"{row['largest']:.3g}",
            f"{row['standing_out']:.1f}",
        )
        for row in analysis.range_rows()
    ]
    note = "Largest |X| over tokens, prompts and channels, as calibration saw it: medians over the blocks (the largest "
    note += "ever: of all blocks)."
    return f'{_table(head, rows)}<p class="soft">{note}</p>'


def _worst(analysis: Analysis) -> str:
    rows = [(name, f"{100 * mean:.2f} %", step) for name, mean, step in analysis.worst()[:WORST]]
    note = (
        "Error of the output relative to itself, mean over the sampled steps. What that does to the sound depends on "
    )
    note += "the Linear: dit-trt sensitivity measures it."
    return f'{_table(("Linear", "mean error", "worst step"), rows)}<p class="soft">{note}</p>'


def _sizes(analysis: Analysis) -> str:
    ours, float_parts = bundle_parts(analysis.bundle), bundle_parts(analysis.reference)
    rows = [(part, _megabytes(float_parts.get(part, 0)), _megabytes(size)) for part, size in ours.items()]
    rows.append(("all", _megabytes(sum(float_parts.values())), _megabytes(sum(ours.values()))))
    return _table(("part", "FP32, MB", "bundle, MB"), rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
