"""`dit-trt sensitivity`: what a recipe costs where, and which bits to give what under a budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...engines.errors import UserError
from .common import UsageError, dit_command, megabytes, path_option, progress, say, show_table, tell, usage
from .completion import files, models
from .grouped import GroupedCommand, GroupedOption
from .recipe_options import given, recipe_options

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..sensitivity_study import Allocation, Ranking

EPILOG = """\b
Examples:
  dit-trt sensitivity                    every Linear, the worst first
  dit-trt sensitivity --by kind --plot kinds.svg
  dit-trt sensitivity --top 5 --output recipe.toml
  dit-trt build --recipe recipe.toml     with the worst five in float
  dit-trt sensitivity --method sqt --budget-mb 6 --output mixed.toml
  dit-trt sensitivity --by kind --target-cosine 0.98 --output mixed.toml
"""

option = partial(click.option, cls=GroupedOption, group="Sensitivity")
choice = partial(click.option, cls=GroupedOption, group="What to make of it")


@click.command(epilog=EPILOG, cls=GroupedCommand)
@option("--model", metavar="M", default="demo", show_default=True, shell_complete=models, help="demo or a folder.")
@option(
    "--by",
    type=click.Choice(["layer", "kind", "block"]),
    default="layer",
    show_default=True,
    help="What is quantized alone.",
)
@option("--prompts", metavar="N", type=click.IntRange(1), default=3, show_default=True, help="Held-out prompts.")
@option(
    "--steps-sampled",
    metavar="N",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Of 100 steps, first to last.",
)
@option("--plot", metavar="FILE", shell_complete=files, help="Draw the errors: .png or .svg.")
@option("--recalibrate", is_flag=True, help="Use no shipped or cached table.")
@choice("--top", metavar="N", type=click.IntRange(1), help="Leave the N worst in float.")
@choice("--exclude-above", metavar="X", type=click.FloatRange(0), help="Leave relative errors above X in float.")
@choice(
    "--budget-mb",
    metavar="MB",
    type=click.FloatRange(0, min_open=True),
    help="Choose bits: least error in so many MB of DiT weights.",
)
@choice(
    "--target-cosine",
    metavar="X",
    type=click.FloatRange(0, 1),
    help="Choose bits: fewest bytes with this worst-step cosine.",
)
@choice("--output", metavar="FILE", shell_complete=files, help="Write the recipe that comes of it, for build.")
@recipe_options
@dit_command
def command(
    model: str,
    file: str | None,
    by: str,
    prompts: int,
    steps_sampled: int,
    top: int | None,
    exclude_above: float | None,
    budget_mb: float | None,
    target_cosine: float | None,
    output: str | None,
    plot: str | None,
    recalibrate: bool,
    **recipe_fields: Any,
) -> dict:
    """Rank Linears by the error that quantizing each alone causes.

    The error is that of the guided velocity on FP32's own trajectories, in a plain simulation of the recipe. With
    --budget-mb or --target-cosine every Linear is measured at w4a8 and at w8a8, and gets one of these or float.
    """
    goals = {"--top": top, "--exclude-above": exclude_above, "--budget-mb": budget_mb, "--target-cosine": target_cosine}
    goal = [name for name, value in goals.items() if value is not None]
    if len(goal) > 1:
        raise UsageError(f"{' and '.join(goal)} exclude each other")
    target = path_option(output)
    if target is not None and not goal:
        raise UsageError(f"--output needs one of {', '.join(goals)}: a ranking alone makes no recipe")

    from ...calib_data.reader import heldout_prompts
    from ...engines.home import expanded
    from ..recipe_file import read_recipe

    texts = heldout_prompts()
    if prompts > len(texts):
        raise UsageError(f"--prompts {prompts} is outside 1..{len(texts)}")
    values = {} if file is None else read_recipe(expanded(file))
    values |= given(**recipe_fields)
    with usage():
        recipe = _recipe(values)
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise UserError(f"cannot write {target}; give --output a file in a folder that exists")
    picture = path_option(plot)
    if picture is not None:
        from ..sensitivity_plot import check_plot

        check_plot(picture)

    from ..sensitivity_study import Study
    from ..workflow import CalibrationOptions

    calibration = CalibrationOptions(recalibrate=recalibrate)
    study = Study(recipe, model, by, texts[:prompts], steps_sampled, calibration, progress, say)
    found: Ranking | Allocation
    if budget_mb is not None or target_cosine is not None:
        found = study.allocate(None if budget_mb is None else round(budget_mb * 1e6), target_cosine)
        _show_allocation(found)
    else:
        found = study.rank(top, exclude_above)
        _show_ranking(found)
        if exclude_above is not None and not found.left_out:
            tell(f"no relative error is above {exclude_above:g}: the recipe stays as it is")
    if picture is not None:
        from ..sensitivity_plot import plot_errors

        plot_errors(picture, *found.bars(), title=f"{study.checkpoint.name}, {recipe.method}, by {by}")
        say(f"drawn to {picture}")
    if target is not None:
        _write(target, found.recipe)
    return {**found.to_dict(), "recipe_file": None if target is None else str(target)}


def _recipe(values: dict[str, Any]) -> Recipe:
    from ..recipe import Recipe

    recipe = Recipe(**values)
    if recipe.method == "none":
        raise UserError("method none quantizes nothing that could be measured; choose sqs, sqd or sqt")
    return recipe


def _write(path: Path, recipe: Recipe) -> None:
    from ..recipe_file import recipe_toml

    path.write_text(recipe_toml(recipe), "utf-8")
    tell(f"recipe written to {path}; dit-trt build --recipe {path}")


def _show_ranking(found: Ranking) -> None:
    head = ("quantized alone", "rel. error", "worst cosine", "step", "share", "float bytes", "bytes")
    rows = [
        (
            row.part.name,
            f"{row.error.relative_error:.4%}",
            f"{row.error.worst_step_cosine:.6f}",
            row.error.worst_step,
            f"{row.share:.1%}",
            row.float_bytes,
            row.bytes,
        )
        for row in found.rows
    ]
    show_table([head, *rows])
    tell(f"all together: relative error {found.whole.relative_error:.4%}, {_worst(found.whole)}")
    tell(f"the root of the sum of the squares above: {found.predicted_error:.4%} (errors that are independent add so)")
    if found.spared is not None:
        tell("left in float: " + ", ".join(found.left_out))
        tell(f"then: relative error {found.spared.relative_error:.4%}, {_worst(found.spared)}")


def _show_allocation(found: Allocation) -> None:
    tried = list(found.errors)
    head = ("part", *(f"rel. error {bits}" for bits in tried), "chosen", "bytes")
    rows = [
        (name, *(f"{found.errors[bits][number].relative_error:.4%}" for bits in tried), choice.bits, choice.bytes)
        for number, (name, choice) in enumerate(found.mix.choices.items())
    ]
    show_table([head, *rows])
    tell(
        f"{megabytes(found.bytes)} of the DiT's weights ({megabytes(found.float_bytes)} in float): Linears "
        f"{megabytes(found.bytes - found.rest_bytes)}, the rest, in float, {megabytes(found.rest_bytes)}"
    )
    tell(f"predicted relative error {found.predicted_error:.4%} (if errors are independent)")
    tell(f"simulated relative error {found.error.relative_error:.4%}, {_worst(found.error)}")


def _worst(error: Any) -> str:
    return f"worst-step cosine {error.worst_step_cosine:.4f} (step {error.worst_step})"
