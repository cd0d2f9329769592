"""`dit-trt build`: a recipe in, a bundle out."""

from __future__ import annotations

import click

from .common import dit_command, megabytes, path_option, progress, say, usage

EPILOG = """\b
Examples:
  dit-trt build --method sqs --bits w8a8      SmoothQuant static, INT8
  dit-trt build --method none                 FP32, to listen to or time (diff makes its own)
  dit-trt build --exclude ff.ff.2             leave one kind of Linear in float
  dit-trt build --prompts captions.csv --num-prompts 20 --recalibrate
"""


@click.command(epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help="demo, or a folder in stable-audio-tools' layout.")
@click.option("--method", default="sqs", show_default=True, help="none (FP32) or sqs (SmoothQuant static).")
@click.option("--bits", default="w8a8", show_default=True, help="w8a8.")
@click.option("--backend", default="auto", show_default=True, help="auto or openvino.")
@click.option("--output", metavar="DIR", help="Where to put the bundle (default: in the home folder).")
@click.option("--alpha", default=0.95, show_default=True, help="Smoothing strength, 0..1 (eq. 3).")
@click.option("--include", multiple=True, metavar="GLOB", help="Quantize only these Linears (name or kind).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these Linears in float (name or kind).")
@click.option("--prompts", metavar="FILE", help="Calibration prompts: one a line, or an AudioCaps CSV.")
@click.option(
    "--num-prompts", type=click.IntRange(1), default=50, show_default=True, help="How many prompts calibrate."
)
@click.option("--prompt-seed", default=0, show_default=True, help="Which prompts are drawn when there are more.")
@click.option(
    "--calib-steps",
    type=click.IntRange(1, 1000),
    default=100,
    show_default=True,
    help="Sampling steps of the calibration runs.",
)
@click.option("--recalibrate", is_flag=True, help="Calibrate afresh instead of using a shipped or cached table.")
@dit_command
def command(
    model: str,
    method: str,
    bits: str,
    backend: str,
    output: str | None,
    alpha: float,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    prompts: str | None,
    num_prompts: int,
    prompt_seed: int,
    calib_steps: int,
    recalibrate: bool,
) -> dict:
    """Quantize a model and build its engine bundle.

    The last line says how many Linears were asked for in int8 and how many the engine really runs so; a build in
    which the two differ fails.
    """
    from ...engines.base import choose_backend
    from ..recipe import Recipe

    with usage():
        recipe = Recipe(method, bits, alpha, include or ("*",), exclude)
        chosen = choose_backend(backend)
    if backend == "auto":
        say(f"backend {chosen}: the best of those installed that can run here")

    from ..workflow import CalibrationOptions, build

    options = CalibrationOptions(prompts, num_prompts, prompt_seed, calib_steps, recalibrate)
    built = build(recipe, model, chosen, path_option(output), options, progress, say)
    bundle = built.bundle
    say(f"{built.linears} Linears asked for, {built.int8_linears} in int8")
    say(f"bundle {bundle.folder} ({megabytes(bundle.size_bytes)})")
    return {
        "bundle": str(bundle.folder),
        "backend": bundle.backend,
        "linears": built.linears,
        "int8_linears": built.int8_linears,
        "size_bytes": bundle.size_bytes,
    }
