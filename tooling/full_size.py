"""What a build takes, and what a step takes, at a model's full size: time, memory and error, measured from outside.

    python -m dit_trt.tooling.full_size build --output build.md -- dit-trt build --model FOLDER --method sqs
    python -m dit_trt.tooling.full_size steps --output steps.md --model FOLDER --bundle BUNDLE --latents 216

Both write a Markdown table, and all numbers as JSON beside it. docs/full-size.md has their results.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from ..engines.errors import UserError
from .cli.common import dit_command, path_option, progress, say, show
from .process_memory import Measured, measure
from .step_contest import Contender, Task, contest_table, run_contest
from .timed_steps import cores

output_option = click.option(
    "--output", metavar="FILE.md", required=True, help="Write the table here, and the numbers beside it as .json."
)


@click.group()
def commands() -> None:
    """Measure a build or a step at a model's full size."""


@commands.command()
@click.argument("command", nargs=-1, required=True)
@output_option
@dit_command
def build(command: tuple[str, ...], output: str) -> dict:
    """Run COMMAND (after --) in a process of its own: time, and peaks of memory by phase.

    A phase begins with a line that the command says on stderr. `dit-trt` is the one of this package.
    """
    path = _report(output)
    measured = measure(command, say)
    return _write(path, measured_table(measured), asdict(measured))


@commands.command()
@click.option("--model", metavar="DIR", required=True, help="The checkpoint: PyTorch's weights, and what is exact.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    required=True,
    metavar="[NAME=]DIR[:bf16]",
    help="A contender; may be repeated. :bf16 or :f32 is the precision of what is not quantized.",
)
@click.option("--latents", type=click.IntRange(1), help="Length of the clip (default: the model's longest).")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="All take turns so often.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads of every contender (default: all cores).")
@click.option("--prompt", default="dog barking", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=100, show_default=True, help="Of the schedule.")
@click.option("--step", type=click.IntRange(0), default=50, show_default=True, help="Which of them, from 0.")
@click.option("--seed", type=click.IntRange(0), default=1000, show_default=True, help="Of the noise.")
@output_option
@dit_command
def steps(
    model: str,
    bundles: tuple[str, ...],
    latents: int | None,
    rounds: int,
    threads: int | None,
    prompt: str,
    steps: int,
    step: int,
    seed: int,
    output: str,
) -> dict:
    """Time one step of bundles and of PyTorch fp32 in turn, each in a process of its own."""
    path = _report(output)
    contenders = [Contender.parse(text) for text in bundles]
    if step >= steps:
        raise UserError(f"--step {step} is not one of --steps {steps}; give one below")
    from ..engines.bundle import Bundle

    sizes = Bundle(contenders[0].folder).manifest["sizes"]
    latents = latents or sizes["max_latents"]
    if latents > sizes["max_latents"]:
        raise UserError(f"--latents {latents} is more than this model's {sizes['max_latents']}; give fewer")
    seconds = latents * sizes["downsampling_ratio"] / sizes["sample_rate"]
    task = Task(prompt, latents, seconds, steps, step, seed, threads or cores())
    contest = run_contest(model, contenders, task, rounds, progress, say)
    return _write(path, contest_table(contest), asdict(contest))


def _report(output: str) -> Path:
    """Where the table goes. Raises UserError before any work when it cannot."""
    path = path_option(output)
    assert path is not None
    if path.suffix == ".json" or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --output a file like full-size.md in a folder that exists")
    return path


def _write(path: Path, table: str, numbers: dict) -> dict:
    from .bench import machine  # PyTorch comes with it: only now, when nothing is measured any more

    numbers = {"machine": machine(), **numbers}
    path.write_text(f"{numbers['machine']}\n\n{table}\n", "utf-8")
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    show(table)
    say(f"written to {path} and {path.with_suffix('.json')}")
    return numbers


def measured_table(measured: Measured) -> str:
    """A measured command as Markdown: its phases, and a line on the whole."""
    lines = [
        f"`{shlex.join(measured.command)}`",
        "",
        "| phase | s | peak RSS | peak RssAnon | peak RssFile |",
        "|---|---|---|---|---|",
    ]
    for phase in measured.phases:
        peaks = " | ".join(_mb(size) for size in (phase.rss, phase.rss_anon, phase.rss_file))
        lines.append(f"| {phase.name} | {phase.seconds:.1f} | {peaks} |")
    lines += [
        "",
        f"{measured.seconds:.1f} s; user {measured.user_seconds:.1f} s, system {measured.system_seconds:.1f} s; "
        f"maximum resident set size {_mb(measured.peak_rss)}",
    ]
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    commands(prog_name="python -m dit_trt.tooling.full_size")
