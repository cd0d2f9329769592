"""`dit-trt run`: prompts in, WAV files out."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...engines.errors import UserError
from ...engines.home import expanded
from ..clip_names import clip_name
from .common import dit_command, note_unused, progress, say, tell, usage
from .completion import bundles, files, samplers

if TYPE_CHECKING:
    from ...runtime.settings import Settings

EPILOG = """\b
Examples:
  dit-trt run "dog barking"
  dit-trt run "rain" "a rooster crows" --seconds 2 --output clips/
  dit-trt run "dog barking" --num-variations 4 --seed 7 --batch 4
  dit-trt run "a big dog" --init-audio small.wav --init-noise-level 2
"""


@click.command(epilog=EPILOG)
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--bundle", metavar="DIR|NAME", shell_complete=bundles, help="Which bundle (default: the newest).")
@click.option("--steps", type=int, help="Sampling steps (default: the model's own, 100 or 8).")
@click.option(
    "--sampler",
    metavar="NAME",
    shell_complete=samplers,
    help="dpmpp-3m-sde (default), dpmpp-2m-sde or dpmpp-2m; of flows pingpong (default) or euler.",
)
@click.option("--cfg", type=float, help="Classifier-free guidance scale (default: the model's own, 7 or 1).")
@click.option("--seed", default=1000, show_default=True, help="Clip i uses seed + i.")
@click.option("--sigma-min", type=float, help="Last noise level (default: 0.3).")
@click.option("--sigma-max", type=float, help="First noise level (default: 500; of flows 1).")
@click.option("--seconds", type=float, help="Length (default: 10, or the model's longest).")
@click.option("--short-window", is_flag=True, help="Compute no longer than --seconds: faster, less faithful.")
@click.option("--init-audio", metavar="FILE", shell_complete=files, help="A recording to begin from.")
@click.option(
    "--init-noise-level", metavar="S", type=float, help="How far it is noised first (default: 1; of flows 0.5)."
)
@click.option("--negative-prompt", metavar="TEXT", help="What it should not sound like.")
@click.option(
    "--num-variations", type=click.IntRange(1, 1000), default=1, show_default=True, help="Clips of every prompt."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Clips computed at once: less time a clip, more memory.",
)
@click.option("--device", metavar="D", help="The backend's device (default: CPU).")
@click.option("--rebuild", is_flag=True, help="Build TensorRT plans of another version or GPU anew.")
@click.option("--stop-after", metavar="N", type=click.IntRange(1), help="Benchmarks only: N steps and no sound.")
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
    steps: int | None,
    sampler: str | None,
    cfg: float | None,
    seed: int,
    sigma_min: float | None,
    sigma_max: float | None,
    seconds: float | None,
    short_window: bool,
    init_audio: str | None,
    init_noise_level: float | None,
    negative_prompt: str | None,
    num_variations: int,
    batch: int,
    device: str | None,
    rebuild: bool,
    stop_after: int | None,
    output: str | None,
) -> dict:
    """Generate sound from prompts with an engine bundle."""
    from ...runtime.init_audio import InitAudio
    from ...runtime.pipeline import Pipeline
    from ...runtime.settings import check_clips
    from ...runtime.wav import write_wav

    given = {
        **{"steps": steps, "sampler": sampler, "cfg_scale": cfg},
        **{"sigma_min": sigma_min, "sigma_max": sigma_max, "seed": seed},
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with usage():  # what no model takes is told before one is opened
        check_clips(prompts, of_some_model(chosen), num_variations, negative_prompt)
        paths = _paths(prompts, num_variations, seed, output)
        if init_noise_level is not None and init_audio is None:
            raise UserError("--init-noise-level belongs to --init-audio; give both")
        if stop_after is not None and batch > 1:
            raise UserError("--stop-after times the steps of one clip; leave --batch out")
    if stop_after is None:
        _check_writable(paths[0].parent)
    start = None if init_audio is None else InitAudio.read(expanded(init_audio), init_noise_level)
    pipeline = Pipeline.open(bundle, device, rebuild)
    with usage():
        settings = pipeline.settings(**chosen)
        pipeline.check_sampler(settings)
    seconds = pipeline.check_seconds(seconds)
    if bundle is None:
        say(f"bundle {pipeline.bundle.folder.name}")
    note_unused(negative_prompt, settings)
    if start is not None and start.seconds > (kept := seconds if short_window else pipeline.max_seconds):
        say(f"note: the first {kept:.1f} s of {start.seconds:.1f} s of --init-audio are used")
    if short_window and pipeline.window(seconds) < pipeline.sizes["max_latents"]:
        say(f"note: this model was trained on windows of {pipeline.max_seconds:.1f} s; a shorter one may sound worse")
    if batch > (most := pipeline.max_batch or batch):
        say(f"note: this bundle codes the guidance pair; it takes {most} clip at a time")
    for prompt in prompts:
        if cut := pipeline.count_cut_tokens(prompt):
            say(f"note: the last {cut} tokens of the prompt {prompt[:40]!r}... are not seen by this model")
    steps = settings.steps
    times: list[float] = []
    written: list[str] = []
    with progress("sampling", min(len(paths) * steps, stop_after or sys.maxsize)) as done:
        begun, count = time.perf_counter(), 0

        def on_step(clip: int, step: int) -> None:
            nonlocal begun, count
            count += step >= 0
            done(count)
            if stop_after is not None:
                now = time.perf_counter()
                times.extend([now - begun] * (step >= 0))
                begun = now
                if len(times) == stop_after:
                    raise _Stopped

        clips = pipeline.generate(
            prompts, settings, seconds, negative_prompt, num_variations, on_step, short_window, start, batch
        )
        with contextlib.suppress(_Stopped):
            for path, clip in zip(paths, clips):
                if stop_after is not None:
                    continue
                write_wav(path, clip.audio, clip.sample_rate)
                times += clip.step_seconds
                written.append(str(path))
                tell(str(path))
    if stop_after is not None:
        tell(
            f"stopped after {len(times)} steps, {statistics.median(times):.3f} s a step (median); no sound was written"
        )
    return {
        "bundle": str(pipeline.bundle.folder),
        "seed": seed,
        "files": written,
        "steps": steps,
        "seconds": seconds,
        "step_ms": round(1000 * statistics.median(times), 3) if times else None,
    }


def of_some_model(chosen: dict[str, Any]) -> Settings:
    """Raises UserError for what is out of every model's range: a flow's noise levels are not those of other models."""
    from ...runtime.settings import Settings

    try:
        return Settings(**chosen)
    except UserError:
        if "sampler" not in chosen:
            with contextlib.suppress(UserError):
                return Settings(sampler="pingpong", **chosen)
        raise


class _Stopped(Exception):
    """--stop-after is reached."""


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
    return [folder / clip_name(prompt, seed + i) for i, prompt in enumerate(names)]


def _check_writable(folder: Path) -> None:
    """Before the sampling rather than after it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write into {folder}; choose another place with --output")
