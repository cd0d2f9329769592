"""`dit-trt build`: a recipe in, a bundle out."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from .common import dit_command, megabytes, path_option, progress, say, tell, usage
from .completion import backends, bits_names, files, folders, methods, models
from .dry_run import show_plan

EPILOG = """\b
Examples:
  dit-trt build --method sqs --bits w8a8      SmoothQuant static, INT8
  dit-trt build --method none                 FP32, to listen to or time (diff makes its own)
  dit-trt build --exclude ff.ff.2             leave one kind of Linear in float
  dit-trt build --prompts captions.csv --num-prompts 20 --recalibrate
  dit-trt build --exclude ff.ff.2 --dry-run   what it would cost, without building
  dit-trt inspect --recipe > recipe.toml      a bundle's recipe as a file,
  dit-trt build --recipe recipe.toml          built again, on any machine

\b
A recipe file holds any of method, bits, alpha, include, exclude, as in
  method = "sqs"
  exclude = ["ff.ff.2", "transformer.layers.0.*"]
An option that is given takes the place of the file's value; lists are not joined.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--model",
    default="demo",
    show_default=True,
    shell_complete=models,
    help="demo, or a folder in stable-audio-tools' layout.",
)
@click.option(
    "--recipe", "file", metavar="FILE", shell_complete=files, help="Read the recipe from a TOML file (see below)."
)
@click.option(
    "--method",
    default="sqs",
    show_default=True,
    shell_complete=methods,
    help="none (FP32) or sqs (SmoothQuant static).",
)
@click.option("--bits", default="w8a8", show_default=True, shell_complete=bits_names, help="w8a8.")
@click.option(
    "--backend", default="auto", show_default=True, shell_complete=backends, help="auto, openvino or onnxruntime."
)
@click.option(
    "--output", metavar="DIR", shell_complete=folders, help="Where to put the bundle (default: in the home folder)."
)
@click.option("--alpha", default=0.95, show_default=True, help="Smoothing strength, 0..1 (eq. 3).")
@click.option("--include", multiple=True, metavar="GLOB", help="Quantize only these Linears (name or kind).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these Linears in float (name or kind).")
@click.option(
    "--prompts", metavar="FILE", shell_complete=files, help="Calibration prompts: one a line, or an AudioCaps CSV."
)
@click.option(
    "--num-prompts", type=click.IntRange(1), help="How many prompts calibrate (default: 50, or all of a shorter file)."
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
@click.option("--device", metavar="D", help="Whose kernels are proven (default: the backend's CPU).")
@click.option("--allow-float-gemm", is_flag=True, help="Accept Linears that the backend does not run in int8.")
@click.option("--dry-run", is_flag=True, help="Tell what each Linear would cost and write nothing.")
@dit_command
def command(
    model: str,
    file: str | None,
    method: str,
    bits: str,
    backend: str,
    output: str | None,
    alpha: float,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    prompts: str | None,
    num_prompts: int | None,
    prompt_seed: int,
    calib_steps: int,
    recalibrate: bool,
    device: str | None,
    allow_float_gemm: bool,
    dry_run: bool,
) -> dict:
    """Quantize a model and build its engine bundle.

    The last line says how many Linears were asked for in int8 and how many the engine really runs so; a build in
    which the two differ fails.
    """
    from ...engines.base import choose_backend, explain_auto
    from ...engines.home import expanded
    from ..recipe import Recipe
    from ..recipe_file import read_recipe

    values = {} if file is None else read_recipe(expanded(file))
    values |= given(method=method, bits=bits, alpha=alpha, include=include, exclude=exclude)
    with usage():
        recipe = Recipe(**values)
        chosen = choose_backend(backend)
    if backend == "auto":
        say(explain_auto(chosen))

    from ..workflow import CalibrationOptions, build

    options = CalibrationOptions(prompts, num_prompts, prompt_seed, calib_steps, recalibrate)
    if dry_run:
        from ..plan import plan_build

        return show_plan(plan_build(recipe, model, chosen, path_option(output), options, device), options)
    built = build(recipe, model, chosen, path_option(output), options, progress, say, device, allow_float_gemm)
    bundle = built.bundle
    tell(f"{built.linears} Linears asked for, {built.int8_linears} in int8")
    tell(f"bundle {bundle.folder} ({megabytes(bundle.size_bytes)})")
    return {
        "bundle": str(bundle.folder),
        "backend": bundle.backend,
        "linears": built.linears,
        "int8_linears": built.int8_linears,
        "size_bytes": bundle.size_bytes,
    }


def given(**options: object) -> dict[str, Any]:
    """Those of the options that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    return {name: value for name, value in options.items() if source(name) is not ParameterSource.DEFAULT}
