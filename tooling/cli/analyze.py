"""`dit-trt analyze`: a bundle and a prompt in, figures and one report out."""

from __future__ import annotations

import shlex
from typing import Any

import click

from ...engines.home import expanded
from .common import dit_command, progress, say, tell, usage
from .completion import bundles, files
from .recipe_options import given

EPILOG = """\b
Examples:
  dit-trt analyze                             the newest quantized bundle
  dit-trt analyze BUNDLE --prompt "rain on a roof" --output rain/
  dit-trt analyze --linear self_attn.to_qkv --block 0 --step 50
  dit-trt analyze --no-audio --json
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", required=False, shell_complete=bundles)
@click.option("--prompt", metavar="TEXT", default="dog barking", show_default=True, help="What is sampled.")
@click.option("--step", metavar="N", type=int, help="The step whose input is mapped (default: the last).")
@click.option("--block", metavar="N", type=int, help="The block that is looked at (default: the last).")
@click.option("--linear", metavar="NAME", default="ff.ff.2", show_default=True, help="The Linear of that block.")
@click.option("--steps", metavar="N", type=int, help="Sampling steps (default: the model's own, 100 or 8).")
@click.option(
    "--steps-sampled",
    metavar="N",
    type=click.IntRange(1),
    default=25,
    show_default=True,
    help="Steps at which every Linear is simulated, first to last.",
)
@click.option("--no-audio", is_flag=True, help="No clips in the report: saves sampling with the bundle.")
@click.option(
    "--output",
    metavar="DIR",
    shell_complete=files,
    help="Where to write (default: here, BUNDLE-analysis and what is looked at).",
)
@dit_command
def command(
    bundle: str | None,
    prompt: str,
    step: int | None,
    block: int | None,
    linear: str,
    steps: int | None,
    steps_sampled: int,
    no_audio: bool,
    output: str | None,
) -> dict:
    """Draw what a bundle's activations look like, and where it loses accuracy.

    FP32 samples one prompt; its inputs are mapped, every Linear is simulated on them, and the bundle's velocities are
    compared. Writes figures (PNG, SVG), report.html, which needs no other file, and analysis.json.
    """
    from ..plots import check_matplotlib

    check_matplotlib("figures need")

    from ...engines.bundle import find_bundle
    from ...runtime.pipeline import Pipeline
    from ...runtime.settings import Settings, check_clips
    from ..figures.folder import check_folder

    chosen: dict[str, Any] = {} if steps is None else {"steps": steps}
    with usage():
        check_clips([prompt], Settings(**chosen))
    found = find_bundle(bundle, quantized=True).verify()
    looked_at = given(linear=linear, block=block, step=step)
    named = "-".join(f"{'' if name == 'linear' else name + '-'}{value}" for name, value in looked_at.items())
    target = expanded(output or "-".join(filter(None, [found.folder.name, "analysis", named])))
    check_folder(target)
    settings = Pipeline(found).settings(**chosen)

    from ..figures.analysis import Choice, analyze
    from ..figures.write import write_analysis

    say(f"analyzing {found.folder.name}")
    choice = Choice(linear, block, step)
    analysis = analyze(found, prompt, settings, choice, steps_sampled, not no_audio, progress, say)
    options = {"--prompt": prompt, "--step": analysis.step, "--block": analysis.linear.block, "--linear": linear}
    options |= {"--steps": analysis.settings.steps, "--steps-sampled": steps_sampled}
    words = [str(word) for pair in options.items() for word in pair] + ["--no-audio"] * no_audio
    result = write_analysis(analysis, target, shlex.join(["dit-trt", "analyze", found.folder.name, *words]))
    for path in result["files"]:
        tell(path)
    return result
