"""The `dit-trt` command: one module a subcommand, loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem

COMMANDS = {
    "build": "Quantize a model and build its engine bundle.",
    "run": "Generate sound from prompts.",
    "batch": "A clip of every caption of a list, here or on a Ray cluster.",
    "serve": "Serve bundles over HTTP.",
    "diff": "Compare a quantized bundle with FP32, step by step.",
    "analyze": "Draw activations, ranges, smoothing and errors of a bundle.",
    "sensitivity": "Rank Linears by the error they cause; choose bits for each.",
    "evaluate": "Clips of a caption list, scored: the paper's Table 1.",
    "listen": "A blind listening test as one page; score what raters said.",
    "studio": "A page to make sound with, and to compare bundles.",
    "bench": "Time one step by every means there is here.",
    "profile": "Where the time of a step goes, by layer kind.",
    "list": "List the bundles in the home folder.",
    "inspect": "Show what a bundle is made of.",
    "completion": "Print the shell completion script.",
}
# A submodule called `list` would hide the builtin in this module as soon as it is imported.
MODULES = {"list": "list_"}


class LazyGroup(click.Group):
    """Knows its commands' names and one-line helps without importing them: `--help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f".{MODULES.get(name, name)}", __package__).command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dit-trt", prog_name="dit-trt")
def main() -> None:
    """Compile an audio diffusion transformer into INT8 engines and make sound with them.

    \b
    dit-trt build --method sqs --bits w8a8
    dit-trt run "dog barking"
    dit-trt diff
    """
