"""Shell completion: the command that prints the script, and what the other commands' options complete to.

The script asks `dit-trt` itself at every Tab (click's protocol), so nothing here may import anything heavy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import click
from click.shell_completion import CompletionItem, get_completion_class

from .common import UsageError, dit_command, show

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "dit-trt", "_DIT_TRT_COMPLETE"
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

EPILOG = """\b
Examples:
  dit-trt completion bash >> ~/.bashrc          bash 4.4 or newer
  dit-trt completion zsh >> ~/.zshrc            after the line with compinit
  dit-trt completion fish > ~/.config/fish/completions/dit-trt.fish
  eval "$(dit-trt completion bash)"             this shell only
"""


def _one_of(names: Callable[[], Iterable[str]]) -> Complete:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]

    return complete


def _of_recipe(names: Callable[[ModuleType], Iterable[str]]) -> Complete:
    """Names that the recipe module has, which is loaded when they are asked for."""
    return _one_of(lambda: names(import_module("..recipe", __package__)))


def _backends() -> Iterable[str]:
    from ...engines.base import BACKENDS

    return ("auto", *BACKENDS)


def _samplers() -> Iterable[str]:
    from ...runtime.samplers import SAMPLERS

    return SAMPLERS


def bits_for(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What stands behind the last `=`; the pattern is the user's."""
    from ..recipe import LAYER_BITS

    pattern, equals, begun = incomplete.rpartition("=")
    return [CompletionItem(f"{pattern}={bits}") for bits in LAYER_BITS if equals and bits.startswith(begun)]


methods = _of_recipe(lambda recipe: recipe.METHODS)
bits_names = _of_recipe(lambda recipe: recipe.BITS)
trunks = _of_recipe(lambda recipe: recipe.TRUNKS)
cfg_pairs = _of_recipe(lambda recipe: recipe.CFG_PAIRS)
lora_forms = _of_recipe(lambda recipe: recipe.LORA_FORMS)
w4_forms = _of_recipe(lambda recipe: recipe.W4)
roundings = _of_recipe(lambda recipe: recipe.ROUNDINGS)
sqd_weights = _one_of(lambda: ("shared", "requantize", "grouped:"))
alphas, group_sizes = _one_of(lambda: ["auto"]), _one_of(lambda: ["channel"])
backends, samplers = _one_of(_backends), _one_of(_samplers)


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return folders(ctx, param, incomplete) + _one_of(lambda: ["demo"])(ctx, param, incomplete)


def bundles(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names in the home folder, and any folder. Manifests are not read: a broken bundle is the command's to name."""
    from ...engines.bundle import bundles_folder
    from ...engines.manifest import MANIFEST

    found = sorted(manifest.parent.name for manifest in bundles_folder().glob(f"[!.]*/{MANIFEST}"))
    return folders(ctx, param, incomplete) + _one_of(lambda: found)(ctx, param, incomplete)


@click.command(epilog=EPILOG)
@click.argument("shell", required=False, metavar="[bash|zsh|fish]", shell_complete=_one_of(lambda: SHELLS))
@dit_command
def command(shell: str | None) -> dict:
    """Print the shell completion script (default: of the shell in $SHELL).

    Commands, options and their choices, and the names of bundles are completed.
    """
    from . import main

    chosen = Path(os.environ.get("SHELL", "")).name if shell is None else shell
    if chosen not in SHELLS:
        fault = f"no completion for the shell {chosen!r}" if chosen else "$SHELL is not set: name the shell"
        raise UsageError(f"{fault} (one of: {', '.join(SHELLS)})")
    kind = get_completion_class(chosen)
    assert kind is not None
    script = kind(main, {}, PROGRAM, VARIABLE).source()
    show(script.strip())
    return {"shell": chosen, "script": script}
