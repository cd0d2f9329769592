"""`dit-trt run`: prompts in, WAV files out."""

from __future__ import annotations

import os
import re
import statistics
from pathlib import Path

import click

from ...engines.errors import UserError
from ...engines.home import expanded
from .common import dit_command, progress, say, tell, usage
from .completion import bundles, files, samplers

EPILOG = """\b
Examples:
  dit-trt run "dog barking"
  dit-trt run "rain" "a rooster crows" --seconds 2 --output clips/
  dit-trt run "dog barking" --num-variations 4 --seed 7
"""


@click.command(epilog=EPILOG)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--bundle", metavar="DIR|NAME", shell_complete=bundles, help="Which bundle (default: the newest).")
@click.option("--steps", default=100, show_default=True, help="Sampling steps.")
@click.option(
    "--sampler",
    default="dpmpp-3m-sde",
    show_default=True,
    shell_complete=samplers,
    help="dpmpp-3m-sde, dpmpp-2m-sde or dpmpp-2m.",
)
@click.option("--cfg", default=7.0, show_default=True, help="Classifier-free guidance scale.")
@click.option("--seed", default=1000, show_default=True, help="Clip i uses seed + i.")
@click.option("--sigma-min", default=0.3, show_default=True, help="Last noise level.")
@click.option("--sigma-max", default=500.0, show_default=True, help="First noise level.")
@click.option("--seconds", type=float, help="Length (default: 10, or the model's longest).")
@click.option("--negative-prompt", metavar="TEXT", help="What it should not sound like.")
@click.option(
    "--num-variations", type=click.IntRange(1, 1000), default=1, show_default=True, help="Clips of every prompt."
)
@click.option("--device", metavar="D", help="The backend's device (default: CPU).")
@click.option(
    "--output",
    metavar="FILE|DIR",
    shell_complete=files,
    help="A .wav file for one clip, else a folder (default: here).",
)
@dit_command
def command(
    prompts: tuple[str, ...],
    bundle: str | None,
    steps: int,
    sampler: str,
    cfg: float,
    seed: int,
    sigma_min: float,
    sigma_max: float,
    seconds: float | None,
    negative_prompt: str | None,
    num_variations: int,
    device: str | None,
    output: str | None,
) -> dict:
    """Generate sound from prompts with an engine bundle."""
    from ...runtime.pipeline import Pipeline, Settings, check_clips
    from ...runtime.wav import write_wav

    with usage():
        settings = Settings(steps, sampler, cfg, seed, sigma_min, sigma_max)
        check_clips(prompts, settings, num_variations, negative_prompt)
        paths = _paths(prompts, num_variations, seed, output)
    _check_writable(paths[0].parent)
    pipeline = Pipeline.open(bundle, device)
    seconds = pipeline.check_seconds(seconds)
    if bundle is None:
        say(f"bundle {pipeline.bundle.folder.name}")
    for prompt in prompts:
        if cut := pipeline.count_cut_tokens(prompt):
            say(f"note: the last {cut} tokens of the prompt {prompt[:40]!r}... are not seen by this model")
    times: list[float] = []
    with progress("sampling", len(paths) * steps) as done:

        def on_step(clip: int, step: int) -> None:
            done(clip * steps + step + 1)

        clips = pipeline.generate(prompts, settings, seconds, negative_prompt, num_variations, on_step)
        for path, clip in zip(paths, clips):
            write_wav(path, clip.audio, clip.sample_rate)
            times += clip.step_seconds
            tell(str(path))
    return {
        "bundle": str(pipeline.bundle.folder),
        "seed": seed,
        "files": [str(path) for path in paths],
        "steps": steps,
        "seconds": seconds,
        "step_ms": round(1000 * statistics.median(times), 3) if times else None,
    }


def _paths(prompts: tuple[str, ...], variations: int, seed: int, output: str | None) -> list[Path]:
    """Where each clip goes: `<prompt>-<seed>.wav`, or the one file that was named."""
    count = len(prompts) * variations
    folder = expanded(output or ".")
    if output and folder.suffix.lower() == ".wav" and not folder.is_dir():
        if count != 1:
            raise UserError(f"--output {output} is one file, but {count} clips are asked for; give a folder")
        return [folder]
    if output and folder.suffix and not folder.is_dir():
        raise UserError(f"--output {output}: only .wav is written; give a .wav file or a folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {output} is a file; give a .wav file or a folder")
    names = [prompt for prompt in prompts for _ in range(variations)]
    return [folder / f"{_slug(prompt)}-{seed + i}.wav" for i, prompt in enumerate(names)]


def _check_writable(folder: Path) -> None:
    """Before the sampling rather than after it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write into {folder}; choose another place with --output")


def _slug(prompt: str) -> str:
    """60 letters at most, and 180 bytes, so that any script fits a file name."""
    letters = re.sub(r"[^\w]+", "-", prompt.lower())[:60].encode()[:180].decode(errors="ignore")
    return letters.strip("-") or "clip"
