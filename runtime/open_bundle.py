"""A bundle whose graphs are compiled when they are first used: one engine for each graph and shape."""

from __future__ import annotations

import os
from typing import Self

from ..engines.base import BACKENDS, Engine, choose_backend, open_engine, precision_of
from ..engines.bundle import Bundle, find_bundle
from ..engines.errors import UserError
from ..engines.manifest import step_graphs
from .bundle_facts import BundleFacts
from .graph_shapes import graph_shapes
from .step_engine import Conditioning, StepEngine

HEAVY = 64_000_000  # bytes of weights from which on a graph that runs once a clip does not stay open


class OpenBundle(BundleFacts):
    """Engines are compiled when first used and stay open; not thread-safe."""

    def __init__(self, bundle: Bundle, device: str | None = None, rebuild: bool = False, threads: int | None = None):
        """threads: of a CPU's, for backends that run on one (default: the backend's choice)."""
        super().__init__(bundle)
        self._rebuild, self._threads = rebuild, threads
        self.step_sigmas: list[float] = bundle.manifest.get("step_sigmas", [])
        self._backend = choose_backend(bundle.backend, device)
        self._device = device
        self._engines: dict[tuple[str, int, int, int, int], Engine] = {}
        self._step_engines: dict[tuple[int, int, int], StepEngine] = {}

    @classmethod
    def open(
        cls, bundle: str | os.PathLike[str] | None = None, device: str | None = None, rebuild: bool = False
    ) -> Self:
        """A bundle by folder (or what `build` returned) or name; without one the newest. Every byte is checked first.

        rebuild: TensorRT plans of another version or GPU are built anew, which is refused otherwise.
        Raises UserError when there is none, or it is damaged or cannot run here.
        """
        return cls(find_bundle(None if bundle is None else os.fspath(bundle)).verify(), device, rebuild)

    @property
    def always_pairs(self) -> bool:
        """Whether the step graph takes both CFG halves or none: it rounds their difference."""
        recipe = self.bundle.manifest["recipe"]
        return recipe.get("cfg_pair") == "difference"

    def context_rows(self, conditioning: Conditioning) -> int:
        """How many rows of context its step engine takes: those that are not zeros, where the step graph can do so."""
        short = self.bundle.manifest.get("short_context", False) and not self.always_pairs
        return conditioning.context_rows if short else conditioning.batch

    def step_engine_for(self, conditioning: Conditioning, window: int | None = None) -> StepEngine:
        """All step graphs of the bundle, compiled as `conditioning` needs them and for so many latents."""
        return self.step_engine_of(conditioning.batch, window, self.context_rows(conditioning))

    def step_engine_of(self, batch: int = 2, window: int | None = None, context: int | None = None) -> StepEngine:
        """The same for so many CFG halves and latents (default: all), and so many of the halves with a context."""
        key = batch, window or self.sizes["max_latents"], context or batch
        if key not in self._step_engines:
            engines = {graph: self.engine(graph, 0, key[1], batch, key[2]) for graph in step_graphs(self.step_sigmas)}
            self._step_engines[key] = StepEngine(engines, self.step_sigmas)
        return self._step_engines[key]

    def engine(
        self, graph: str, steps: int = 0, latents: int | None = None, batch: int = 2, context: int | None = None
    ) -> Engine:
        """The compiled engine of one of the bundle's graphs.

        steps: the conditioning graph's rows of t; latents: of a clip (default: the model's full length), which the step
        graphs and the decoder see; batch: CFG halves of the step graphs, of all clips; context: how many of these have
        one (default: all).
        """
        key = graph, steps, latents or self.sizes["max_latents"], batch, context or batch
        if key not in self._engines:
            self._engines[key] = self._open(*key)
        return self._engines[key]

    def _release(self, graph: str) -> None:
        """Free a heavy graph that is not needed for a while: opening it again costs less than keeping it."""
        if self.bundle.manifest["files"][f"{graph}.onnx.data"]["bytes"] >= HEAVY:
            for key in [key for key in self._engines if key[0] == graph]:
                del self._engines[key]

    def _open(self, graph: str, steps: int, latents: int, batch: int, context: int) -> Engine:
        if Bundle(self.bundle.folder).manifest["created"] != self.bundle.manifest["created"]:
            raise UserError(f"the bundle {self.bundle.folder.name} was built again while it was open; start over")
        shapes = graph_shapes(self.sizes, steps, self.step_sigmas, latents, batch, context)[graph]
        files = self.bundle.manifest["files"]
        digest = "".join(files[name]["sha256"] for name in (f"{graph}.onnx", f"{graph}.onnx.data"))
        manifest = self.bundle.manifest
        return open_engine(
            self._backend,
            self.bundle.path(f"{graph}.onnx"),
            shapes,
            self._device,
            digest,
            self._threads if BACKENDS[self._backend].proof is None else None,
            precision=precision_of(self._backend, manifest, graph),
            plan=manifest.get("plan") or None,
            rebuild=self._rebuild,
        )
