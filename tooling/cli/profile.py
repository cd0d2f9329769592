"""`dit-trt profile`: where the time of a step goes, by layer kind."""

from __future__ import annotations

import click

from .common import dit_command, path_option, progress, say, show, show_table
from .completion import bundles

EPILOG = """\b
Examples:
  dit-trt profile                             the newest bundle
  dit-trt profile BUNDLE --layers             every layer, slowest first
  dit-trt profile --threads 1 --plot step.png
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", required=False, shell_complete=bundles)
@click.option("--steps", type=click.IntRange(2, 999), default=20, show_default=True, help="Steps that are averaged.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: the backend's choice).")
@click.option("--layers", is_flag=True, help="A row for every layer instead of one for every kind.")
@click.option("--plot", metavar="FILE", help="Bars, as .png or .svg.")
@dit_command
def command(bundle: str | None, steps: int, threads: int | None, layers: bool, plot: str | None) -> dict:
    """Tell where the time of a step goes, by the runtime's own counters: products by Linear, attention, norms, layout.

    What is left is between the layers, or outside the engine: sampler, guidance, copies.
    """
    picture = path_option(plot)
    if picture is not None:
        from ..sensitivity_plot import check_plot

        check_plot(picture)
    from ...engines.bundle import find_bundle
    from ..profile import group_of, profile
    from ..profile import plot as draw

    found = find_bundle(bundle).verify()
    say(f"profiling {found.folder.name}")
    with progress("sampling", steps + 1) as done:
        result = profile(found, steps, threads, done)
    show(f"{result.step_ms:.2f} ms a step, {result.engine_ms:.2f} of it in the engine ({result.backend})")
    if layers:
        slowest = sorted(result.layers, key=lambda layer: -layer.seconds)
        rows = [(one.nodes[0], group_of(one), one.kernel, f"{1000 * one.seconds:.3f}") for one in slowest]
        show_table([("layer", "group", "kernel", "ms"), *rows], left=3)
    else:
        rows_of = [(g.name, g.layers or "", f"{g.milliseconds:.3f}", f"{g.share:.1%}") for g in result.groups]
        show_table([("group", "layers", "ms", "share"), *rows_of])
    if result.int8_products is not None:
        show(f"int8 products: {result.int8_products}")
    if picture is not None:
        draw(picture, result)
        say(f"drawn to {picture}")
    return result.to_dict()
