"""`dit-trt batch`: a caption list in, a folder of clips and their index out, here or on a Ray cluster."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import click

from ...engines.home import expanded
from .common import UsageError, dit_command, progress, say, tell, usage
from .completion import bundles, files, folders, samplers

EPILOG = """\b
Examples:
  dit-trt batch captions.csv --output clips
  dit-trt batch captions.jsonl --output clips --batch 8 --seconds 5
  dit-trt batch captions.csv --output clips --ray auto --workers 4
  dit-trt batch captions.csv --output s3://bucket/clips
"""
NAMED = 20  # failed clips that are named at the end; all are in the index


@click.command(epilog=EPILOG)
@click.argument("captions", metavar="CAPTIONS", shell_complete=files)
@click.option(
    "--output",
    metavar="DIR|URI",
    required=True,
    shell_complete=folders,
    help="Where clips and clips.jsonl go: a folder, or a URI as s3://bucket/clips (fsspec); resumes.",
)
@click.option("--bundle", metavar="DIR|NAME", shell_complete=bundles, help="Which bundle (default: the newest).")
@click.option("--steps", type=int, help="Sampling steps (default: the model's own, 100 or 8).")
@click.option("--sampler", metavar="NAME", shell_complete=samplers, help="As in `run` (default: the model's own).")
@click.option("--cfg", type=float, help="Classifier-free guidance scale (default: the model's own, 7 or 1).")
@click.option(
    "--seed", type=int, default=1000, show_default=True, help="Each clip's own seed is made of it and its id."
)
@click.option("--seconds", type=float, help="Length (default: 10, or the model's longest).")
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Clips computed at once by each worker: less time a clip, more memory.",
)
@click.option("--ray", metavar="auto|ADDRESS", help="Workers of that Ray cluster make them (default: this process).")
@click.option(
    "--workers",
    type=click.IntRange(1, 10_000),
    help="With --ray: at most so many, which share the processors (default: one a node, or a GPU).",
)
@dit_command
def command(
    captions: str,
    output: str,
    bundle: str | None,
    steps: int | None,
    sampler: str | None,
    cfg: float | None,
    seed: int,
    seconds: float | None,
    batch: int,
    ray: str | None,
    workers: int | None,
) -> dict:
    """Generate one clip for every caption of a list: a CSV with `caption` and `id`, JSON lines of both, or plain lines.

    A caption that fails is named at the end and stops no other. Killed or stopped at any moment, the same command goes
    on where it was. With --ray every machine needs dit-trt and the bundle; the clips are the same bytes as without.
    """
    from ...calib_data.reader import read_captions
    from ...engines.bundle import find_bundle
    from ..batch.batch import generate_batch
    from ..batch.cluster import check_address
    from ..batch.store import open_store
    from .run import of_some_model

    given = {"steps": steps, "sampler": sampler, "cfg_scale": cfg, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with usage():
        of_some_model(chosen)
        if ray is not None:
            check_address(ray)
    if workers is not None and ray is None:
        raise UsageError("--workers belongs to --ray; give both")
    if ray is not None:
        import_module("ray")  # missing, that is told before anything is read
    texts = read_captions(expanded(captions))
    found = find_bundle(bundle)
    if bundle is None:
        say(f"bundle {found.folder.name}")
    store = open_store(output)
    result = generate_batch(
        found.verify(), texts, store, seconds, chosen, batch, ray, workers, partial(progress, unit="clips"), say
    )
    rate = result.made / result.seconds if result.made else 0.0
    tell(f"{result.clips} of {len(texts)} clips in {store.place}, {result.made} of them now ({rate:.3g} clips/s)")
    for each in result.failed[:NAMED]:
        say(f"failed: {each.id} ({each.caption[:60]!r}): {each.error}")
    if len(result.failed) > NAMED:
        say(f"failed: {len(result.failed) - NAMED} more, see clips.jsonl; the same command tries them again")
    return {
        "passed": not result.failed,
        "bundle": str(found.folder),
        "output": store.place,
        "clips": result.clips,
        "made": result.made,
        "failed": {each.id: each.error for each in result.failed},
        "clips_per_second": round(rate, 4),
        "workers": [*result.workers],
    }
