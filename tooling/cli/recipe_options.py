"""The options that say a recipe, one for every field of `Recipe`, and what they make of their words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from . import completion as complete
from .grouped import GroupedOption

F = TypeVar("F", bound=Callable[..., object])


class Alpha(click.ParamType):
    """A number, or `auto`; whether the number will do is the recipe's to say."""

    name = "alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        try:
            return "auto" if value == "auto" else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto.", param, ctx)


class GroupSize(click.ParamType):
    """A whole number, or `channel`, which the recipe calls 0."""

    name = "group size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return 0 if value == "channel" else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor channel.", param, ctx)


class BitsFor(click.ParamType):
    """`GLOB=BITS` -> (glob, bits)."""

    name = "glob and bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        pattern, equals, bits = str(value).rpartition("=")
        if not (pattern and equals):
            self.fail(f"{value!r} is not GLOB=BITS, as in ff.ff.2=w8a8.", param, ctx)
        return pattern, bits


def recipe_options(function: F) -> F:
    """Adds --recipe (as `file`) and an option for every field, by its name; help is given in this order."""
    what, how, branch, four = (
        partial(click.option, cls=GroupedOption, group=group)
        for group in ("Recipe", "Smoothing and ranges", "Low-rank branch", "4-bit weights")
    )

    def one(option: Callable[..., Callable[[F], F]], flag: str, metavar: str, default: object, text: str, **more: Any):
        """An option with one value, whose default --help tells."""
        return option(flag, metavar=metavar, default=default, show_default=True, help=text, **more)

    options = [
        what(
            "--recipe", "file", metavar="FILE", shell_complete=complete.files, help="Read all of it from a TOML file."
        ),
        one(what, "--method", "NAME", "sqs", "none, sqs, sqd or sqt.", shell_complete=complete.methods),
        one(what, "--bits", "BITS", "w8a8", "w8a8, w7a8 or w4a8.", shell_complete=complete.bits_names),
        what("--include", multiple=True, metavar="GLOB", help="Quantize only these Linears (name or kind)."),
        what("--exclude", multiple=True, metavar="GLOB", help="Leave these Linears in float (name or kind)."),
        what(
            "--bits-for",
            multiple=True,
            metavar="GLOB=BITS",
            type=BitsFor(),
            shell_complete=complete.bits_for,
            help="These in w8a8, w7a8, w4a8 or float.",
        ),
        one(what, "--decoder-bits", "16|32", 16, "Float type of decoder and text.", type=int),
        one(what, "--trunk", "TYPE", "auto", "Not quantized work: fp32, bf16, fp16.", shell_complete=complete.trunks),
        one(how, "--alpha", "X|auto", 0.95, "Strength, 0..1 (eq. 3).", type=Alpha(), shell_complete=complete.alphas),
        how("--smoothing/--no-smoothing", "smooth", default=True, help="Move outliers into the weights."),
        how(
            "--sqd-weights",
            metavar="KIND",
            default="shared",
            shell_complete=complete.sqd_weights,
            help="shared (the default), requantize, grouped:G.",
        ),
        how("--clip/--no-clip", default=False, help="Ranges of least error, not largest value."),
        one(how, "--cfg-pair", "FORM", "halves", "halves or their difference.", shell_complete=complete.cfg_pairs),
        one(branch, "--lora-rank", "N", 0, "Rank of the FP16 branch; 0: none.", type=int),
        one(branch, "--lora-form", "FORM", "svdquant", "svdquant or residual.", shell_complete=complete.lora_forms),
        one(four, "--w4", "FORM", "expanded", "expanded (to int8) or memory.", shell_complete=complete.w4_forms),
        one(
            four,
            "--group-size",
            "N|channel",
            64,
            "Inputs that share a scale.",
            type=GroupSize(),
            shell_complete=complete.group_sizes,
        ),
        one(four, "--rounding", "KIND", "nearest", "nearest or gptq.", shell_complete=complete.roundings),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def given(**options: object) -> dict[str, Any]:
    """Those of the options that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    return {name: value for name, value in options.items() if source(name) is not ParameterSource.DEFAULT}
