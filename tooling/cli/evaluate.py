"""`dit-trt evaluate`: clips of a caption list from any bundles, their metrics, and the paper's Table 1."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from ...engines.errors import UserError
from ...engines.home import expanded
from .common import UsageError, dit_command, progress, say, show, usage
from .completion import bundles, files

EPILOG = """\b
Examples:
  dit-trt evaluate                                 newest bundle, our captions
  dit-trt evaluate A B --variations 8 --floor --metrics birdnet,aisfx
  dit-trt evaluate A --metrics birdnet,aisfx --reference recordings \\
      --captions audiocaps.csv
  dit-trt evaluate A --metrics clap,openl3 --weights clap=clap --weights \\
      openl3=openl3.onnx --reference openl3-audiocaps.npz
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", nargs=-1, shell_complete=bundles)
@click.option(
    "--captions",
    metavar="FILE",
    shell_complete=files,
    help="One a line, or a CSV with `caption` and `id` (default: 24 of ours).",
)
@click.option("--num-captions", type=click.IntRange(1), help="Only so many, from the first on.")
@click.option("--variations", type=click.IntRange(1, 1000), default=1, show_default=True, help="Clips a caption.")
@click.option("--seconds", type=float, help="Length of each clip (default: 10, or the model's longest).")
@click.option("--steps", type=int, help="Sampling steps (default: the model's own).")
@click.option("--cfg", type=float, help="Classifier-free guidance scale (default: the model's own).")
@click.option(
    "--seed", type=int, default=1000, show_default=True, help="Each clip's own seed is made of it and its id."
)
@click.option(
    "--metrics",
    metavar="LIST",
    default="",
    help="Networks that score the clips, by commas (default: none): birdnet, birdnet-embedding, aisfx, clap, openl3, "
    "passt, onnx:FILE.",
)
@click.option("--weights", multiple=True, metavar="NAME=PATH", help="Where a network's weights are.")
@click.option(
    "--reference",
    metavar="PATH",
    help="What --metrics compares with: recordings named by caption id, or an .npz (default: FP32's clips).",
)
@click.option("--floor", is_flag=True, help="FP32 with other seeds, too: how far apart two good clips are.")
@click.option(
    "--velocity-clips",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Captions on which every step's velocity is compared with FP32's; 0: none.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Clips generated at once: less time a clip, more memory.",
)
@click.option("--device", metavar="D", help="The backends' device (default: CPU).")
@click.option("--one-by-one", is_flag=True, help="One bundle open at a time; the times are then not comparable.")
@click.option("--output", metavar="DIR", default="evaluation", show_default=True, help="Clips and tables; resumes.")
@dit_command
def command(
    bundle: tuple[str, ...],
    captions: str | None,
    num_captions: int | None,
    variations: int,
    seconds: float | None,
    steps: int | None,
    cfg: float | None,
    seed: int,
    metrics: str,
    weights: tuple[str, ...],
    reference: str | None,
    floor: bool,
    velocity_clips: int,
    batch: int,
    device: str | None,
    one_by_one: bool,
    output: str,
) -> dict:
    """Generate clips for captions, score them, and print the paper's Table 1.

    FP32 of the same model is always a row. Killed or stopped at any moment, the same command goes on where it was.
    """
    from ...calib_data.reader import heldout_captions, read_captions
    from ...engines.bundle import find_bundle
    from ...engines.home import write_whole
    from ...runtime.settings import Settings

    given = {"steps": steps, "cfg_scale": cfg, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with usage():
        Settings(**chosen)
    found = [find_bundle(each) for each in bundle] or [find_bundle(None, quantized=True)]
    real = None if reference is None else _reference(reference)
    if real is not None and not metrics.strip(", "):
        raise UsageError("--reference is for networks to compare with; name some with --metrics, as birdnet,aisfx")
    from ..evaluation.embedders import open_embedder

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    places = _weights(weights, names)
    embedders = [open_embedder(name, places.get(name)) for name in names]
    for embedder in embedders:
        if embedder.notice:
            say(f"note: {embedder.notice}")
    from ..evaluation.evaluate import evaluate

    texts = heldout_captions() if captions is None else read_captions(expanded(captions))
    if num_captions is not None and num_captions > len(texts):
        raise UsageError(f"--num-captions {num_captions} is more than the {len(texts)} there are")
    folder = expanded(output)
    result = evaluate(
        found,
        texts[:num_captions],
        folder,
        embedders,
        variations,
        seconds,
        chosen,
        real,
        floor,
        one_by_one,
        batch,
        velocity_clips,
        device,
        progress,
        say,
    )
    from ..bench import machine
    from ..evaluation.table import csv_text, markdown, records

    text = markdown(result, _line(), machine())
    rows = records(result)
    write_whole(folder / "table.md", text)
    write_whole(folder / "table.csv", csv_text(result))
    write_whole(folder / "table.json", json.dumps(rows, indent=1) + "\n")
    show(text)
    say(f"tables in {folder}: table.md, table.csv, table.json")
    return {"output": str(folder), "clips": result.clips, "silent": result.silent, "rows": rows}


def _reference(text: str) -> Path:
    path = expanded(text)
    if not path.is_dir() and not (path.suffix == ".npz" and path.is_file()):
        raise UserError(f"--reference {text} is neither a folder of recordings nor an .npz file of statistics")
    return path


def _weights(given: tuple[str, ...], names: list[str]) -> dict[str, Path]:
    found = {}
    for each in given:
        name, _, path = each.partition("=")
        if not path or name not in names:
            raise UsageError(f"--weights {each} is not NAME=PATH of a network in --metrics")
        if not expanded(path).exists():
            raise UserError(f"--weights {each}: there is no {path}")
        found[name] = expanded(path)
    return found


def _line() -> str:
    """The command as it was given."""
    import sys

    return shlex.join(["dit-trt", *sys.argv[1:]])
