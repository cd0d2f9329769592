"""dit-trt: a quantizing compiler for audio diffusion transformers.

`Pipeline` (a bundle becomes sound) and `build` (a recipe becomes a bundle) are loaded when first asked for, so that
importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline as Pipeline
    from .tooling.recipe import Recipe as Recipe
    from .tooling.workflow import build as build

__version__ = "0.1.0"

_LAZY = {
    "Pipeline": "dit_trt.runtime.pipeline",
    "Recipe": "dit_trt.tooling.recipe",
    "build": "dit_trt.tooling.workflow",
}
__all__ = ["Pipeline", "Recipe", "build"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            hint = "it comes with the build extra: pip install -c constraints.txt -e '.[build]' in a clone of dit-trt"
            raise ModuleNotFoundError(f"dit_trt.{name} needs {error.name}; {hint}", name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
