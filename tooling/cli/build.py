"""`dit-trt build`: a recipe in, a bundle out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ...engines.errors import UserError
from .common import dit_command, megabytes, path_option, progress, say, tell, usage
from .completion import backends, files, folders, models
from .dry_run import show_plan
from .grouped import GroupedCommand, GroupedOption
from .recipe_options import given, recipe_options

if TYPE_CHECKING:
    from ...engines.tensorrt_build import PlanOptions

EPILOG = """\b
Methods: none is FP32; ranges are static (sqs), by step (sqd), by token (sqt).

\b
Examples:
  dit-trt build --method sqs --bits w8a8      SmoothQuant static, INT8
  dit-trt build --method sqd --lora-rank 32   dynamic, with a low-rank branch
  dit-trt build --method sqd --sqd-weights grouped:4
  dit-trt build --method sqt --bits w4a8 --rounding gptq --group-size 128
  dit-trt build --bits w4a8 --bits-for "ff.ff.2=w8a8" --alpha auto
  dit-trt build --method none                 FP32 (diff makes its own)
  dit-trt build --trunk bf16                  faster float work, where it is
  dit-trt build --backend tensorrt            proven here, run on a GPU
  dit-trt build --model stabilityai/stable-audio-open-1.0 \\
      --num-prompts 4 --calib-steps 20        hours; the defaults take days
  dit-trt build --exclude ff.ff.2 --dry-run   what it would cost
  dit-trt build --prompts captions.csv --num-prompts 20 --recalibrate
  dit-trt inspect --recipe > recipe.toml      a bundle's recipe as a file,
  dit-trt build --recipe recipe.toml          built again, on any machine

\b
A recipe file holds any of the recipe's options, with _ for -, as in
  method = "sqs"
  alpha = "auto"                              --no-smoothing: smooth = false
  exclude = ["ff.ff.2", "transformer.layers.0.*"]
  bits_for = {"ff.ff.0.proj" = "float"}
An option that is given takes the place of the file's; lists are not joined.
"""

option = partial(click.option, cls=GroupedOption, group="Build")
calibration = partial(click.option, cls=GroupedOption, group="Calibration")
tensorrt = partial(click.option, cls=GroupedOption, group="TensorRT")


@click.command(epilog=EPILOG, cls=GroupedCommand)
@option(
    "--model", metavar="M", default="demo", show_default=True, shell_complete=models, help="demo, folder, file, hub id."
)
@option("--text-encoder", metavar="DIR", shell_complete=folders, help="T5, if it is not beside the model.")
@option(
    "--backend", metavar="B", default="auto", shell_complete=backends, help="auto, openvino, onnxruntime or tensorrt."
)
@option("--device", metavar="D", help="Whose kernels are proven (default: the backend's CPU).")
@option("--output", metavar="DIR", shell_complete=folders, help="The bundle's place (default: in the home folder).")
@option("--allow-float-gemm", is_flag=True, help="Accept Linears that do not run in int8.")
@option("--dry-run", is_flag=True, help="Tell what each Linear would cost and write nothing.")
@recipe_options
@tensorrt("--profile", metavar="MIN,OPT,MAX", help="Latents one plan runs (default: the longest).")
@tensorrt("--target", multiple=True, metavar="SM", help="Compute capabilities, as sm89; current.")
@tensorrt("--workspace-mb", metavar="N", type=click.IntRange(1), help="Scratch memory of one kernel.")
@tensorrt("--weight-streaming-mb", metavar="N", type=click.IntRange(1), help="Weights kept on the device.")
@calibration("--prompts", metavar="FILE", shell_complete=files, help="One prompt a line, or an AudioCaps CSV.")
@calibration("--num-prompts", metavar="N", type=click.IntRange(1), help="How many calibrate (default: 50).")
@calibration("--prompt-seed", metavar="N", default=0, show_default=True, help="Which, if there are more.")
@calibration(
    "--calib-steps",
    metavar="N",
    type=click.IntRange(1, 1000),
    help="Sampling steps of every run (default: 100).",
)
@calibration("--recalibrate", is_flag=True, help="Use no shipped or cached table.")
@dit_command
def command(
    model: str,
    text_encoder: str | None,
    backend: str,
    device: str | None,
    output: str | None,
    allow_float_gemm: bool,
    dry_run: bool,
    file: str | None,
    profile: str | None,
    target: tuple[str, ...],
    workspace_mb: int | None,
    weight_streaming_mb: int | None,
    prompts: str | None,
    num_prompts: int | None,
    prompt_seed: int,
    calib_steps: int | None,
    recalibrate: bool,
    **recipe_fields: Any,
) -> dict:
    """Quantize a model and build its engine bundle.

    The last line says how many Linears were asked for in int8 and how many the engine really runs so; a build in
    which the two differ fails.
    """
    from ...engines.base import choose_backend, explain_auto
    from ...engines.home import expanded
    from ..recipe import Recipe
    from ..recipe_file import read_recipe
    from ..recipe_text import options_of

    values = {} if file is None else read_recipe(expanded(file))
    values |= given(**recipe_fields)
    with usage():
        recipe = Recipe(**values)
        chosen = choose_backend(backend, to_build=True)
        plan = _plan(chosen, profile, target, workspace_mb, weight_streaming_mb)
    if backend == "auto":
        say(explain_auto(chosen))

    from ..workflow import CalibrationOptions, build

    options = CalibrationOptions(prompts, num_prompts, prompt_seed, calib_steps, recalibrate)
    if dry_run:
        from ..plan import plan_build

        foretold = plan_build(recipe, model, chosen, path_option(output), options, device, text_encoder, plan)
        return show_plan(foretold, options)
    where = path_option(output)
    built = build(recipe, model, chosen, where, options, progress, say, device, allow_float_gemm, text_encoder, plan)
    bundle = built.bundle
    more = "".join(f", {words}" for words in options_of(recipe))
    tell(f"{built.linears} Linears asked for, {built.int8_linears} in int8{more}")
    if (attentions := bundle.manifest.get("attentions")) is not None:
        tell(f"{attentions} attentions, {bundle.manifest['fused_attentions']} fused")
    tell(f"bundle {bundle.folder} ({megabytes(bundle.size_bytes)})")
    return {
        "bundle": str(bundle.folder),
        "backend": bundle.backend,
        "linears": built.linears,
        "int8_linears": built.int8_linears,
        "size_bytes": bundle.size_bytes,
    }


def _plan(
    backend: str, profile: str | None, targets: tuple[str, ...], workspace_mb: int | None, streaming_mb: int | None
) -> PlanOptions | None:
    """The options of a TensorRT plan. Raises UserError for one that is wrong, or of no use to the backend."""
    from ...engines.tensorrt_build import PlanOptions, check_targets

    bounds = None
    if profile is not None:
        numbers = profile.split(",")
        if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
            raise UserError(f"--profile {profile} is not MIN,OPT,MAX, as in 64,216,1024")
        bounds = int(numbers[0]), int(numbers[1]), int(numbers[2])
    in_bytes = (None if size is None else size * 1_000_000 for size in (workspace_mb, streaming_mb))
    options = PlanOptions(tuple(target.lower() for target in targets), bounds, *in_bytes)
    if backend != "tensorrt":
        if options != PlanOptions():
            raise UserError(f"--profile, --target, --workspace-mb and --weight-streaming-mb are not for {backend}")
        return None
    check_targets(options.targets)
    return options
