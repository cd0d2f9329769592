"""dit-trt: a quantizing compiler for audio diffusion transformers.

>>> import dit_trt
>>> built = dit_trt.build(dit_trt.Recipe("sqs", bits="w8a8"))  # the demo model; needs the build extra
>>> built.linears, built.int8_linears
(56, 56)
>>> pipeline = dit_trt.Pipeline.open(built)  # or a bundle's folder or name, or nothing for the newest
>>> audio, sample_rate = pipeline("dog barking", seconds=2)
>>> audio.dtype, audio.shape, sample_rate
(dtype('float32'), (2, 88200), 44100)

What a user can mend raises `UserError`, whose message is one line that names the fix. Every name below is loaded when
first asked for, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engines.errors import UserError as UserError
    from .runtime.pipeline import Pipeline as Pipeline
    from .runtime.pipeline import Settings as Settings
    from .runtime.wav import write_wav as write_wav
    from .tooling.diff import compare as compare
    from .tooling.recipe import Recipe as Recipe
    from .tooling.workflow import CalibrationOptions as CalibrationOptions
    from .tooling.workflow import build as build

__version__ = "0.1.0"

_LAZY = {
    "CalibrationOptions": "dit_trt.tooling.workflow",
    "Pipeline": "dit_trt.runtime.pipeline",
    "Recipe": "dit_trt.tooling.recipe",
    "Settings": "dit_trt.runtime.pipeline",
    "UserError": "dit_trt.engines.errors",
    "build": "dit_trt.tooling.workflow",
    "compare": "dit_trt.tooling.diff",
    "write_wav": "dit_trt.runtime.wav",
}
__all__ = ["CalibrationOptions", "Pipeline", "Recipe", "Settings", "UserError", "build", "compare", "write_wav"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            hint = "it comes with the build extra: pip install -c constraints.txt -e '.[build]' in a clone of dit-trt"
            raise ModuleNotFoundError(f"dit_trt.{name} needs {error.name}; {hint}", name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
