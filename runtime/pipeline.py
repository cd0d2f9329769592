"""A bundle and a prompt become sound: tokens, conditioning, the sampling loop, the decoder. numpy only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, choose_backend, open_engine
from ..engines.bundle import Bundle, find_bundle
from ..engines.errors import UserError, last_line
from ..engines.manifest import SCALES, step_graphs
from .denoiser import GuidedDenoiser, Observer
from .griffin_lim import griffin_lim
from .samplers import SAMPLERS
from .scale_tables import ScaleTables, load_scales
from .schedule import polyexponential_sigmas, sigma_to_t
from .step_engine import ByGraph, ByStep, Conditioning, StepEngine
from .tiles import decode_tiles, encode_tiles
from .tokens import PromptTokenizer
from .wav import finish

Float = NDArray[np.float32]
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
TIME_ROWS = 128  # the conditioning graph embeds so many timesteps at once: one engine for every --steps up to it
MAX_SIGMA = 1e6  # what lies above would only leave float32


@dataclass(frozen=True)
class Settings:
    """How to sample. Defaults are Stable Audio Open's model card and the paper's: 100 steps, cfg 7, seed 1000.

    >>> import dit_trt
    >>> dit_trt.Settings(steps=4).sigmas.round(2).tolist()
    [500.0, 42.17, 3.56, 0.3, 0.0]
    >>> dit_trt.Settings(steps=0)
    Traceback (most recent call last):
    dit_trt.engines.errors.UserError: steps 0 is outside 1..1000

    Raises UserError naming every setting that is out of range.
    """

    steps: int = 100
    sampler: str = "dpmpp-3m-sde"
    cfg_scale: float = 7.0
    seed: int = 1000
    sigma_min: float = 0.3
    sigma_max: float = 500.0

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.steps <= MAX_STEPS:
            faults.append(f"steps {self.steps} is outside 1..{MAX_STEPS}")
        if self.sampler not in SAMPLERS:
            faults.append(f"unknown sampler {self.sampler!r} (one of: {', '.join(SAMPLERS)})")
        if not 0 <= self.cfg_scale <= 100:
            faults.append(f"cfg {self.cfg_scale} is outside 0..100")
        if not 0 <= self.seed <= MAX_SEED:
            faults.append(f"seed {self.seed} is outside 0..{MAX_SEED}")
        if not 0 < self.sigma_min < self.sigma_max <= MAX_SIGMA:
            faults.append(f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must be 0 < min < max <= 1e6")
        if faults:
            raise UserError("; ".join(faults))

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """[steps + 1]"""
        return polyexponential_sigmas(self.steps, self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Clip:
    """One finished clip: audio float32 [2, n] in -1..1, and what made it."""

    prompt: str
    seed: int
    audio: Float
    sample_rate: int
    step_seconds: tuple[float, ...]


class Pipeline:
    """An open bundle. Engines are compiled when first used and stay open; not thread-safe.

    >>> import dit_trt
    >>> pipeline = dit_trt.Pipeline.open()  # the newest bundle
    >>> audio, sample_rate = pipeline("a puppy woofs", seconds=1.5, steps=20)
    >>> audio.dtype, audio.shape, sample_rate
    (dtype('float32'), (2, 66150), 44100)

    Several clips, as they are finished:

    >>> for clip in pipeline.generate(["rain", "a cat meows"], dit_trt.Settings(steps=20), seconds=1, num_variations=2):
    ...     dit_trt.write_wav(f"{clip.prompt}-{clip.seed}.wav", clip.audio, clip.sample_rate)
    ...     print(clip.prompt, clip.seed, clip.audio.shape)
    rain 1000 (2, 44100)
    rain 1001 (2, 44100)
    a cat meows 1002 (2, 44100)
    a cat meows 1003 (2, 44100)
    """

    def __init__(self, bundle: Bundle, device: str | None = None):
        self.bundle = bundle
        self.sizes: dict[str, int] = bundle.manifest["sizes"]
        self.step_sigmas: list[float] = bundle.manifest.get("step_sigmas", [])
        self._backend = choose_backend(bundle.backend)
        self._device = device
        self._engines: dict[tuple[str, int], Engine] = {}

    @classmethod
    def open(cls, bundle: str | os.PathLike[str] | None = None, device: str | None = None) -> Pipeline:
        """A bundle by folder (or what `build` returned) or name; without one the newest. Every byte is checked first.

        Raises UserError when there is none, or it is damaged or cannot run here.
        """
        return cls(find_bundle(None if bundle is None else os.fspath(bundle)).verify(), device)

    @property
    def sample_rate(self) -> int:
        return self.sizes["sample_rate"]

    @property
    def max_seconds(self) -> float:
        return self.sizes["max_latents"] * self.sizes["downsampling_ratio"] / self.sample_rate

    def __call__(self, prompt: str, seconds: float | None = None, **settings: object) -> tuple[Float, int]:
        """One prompt -> audio float32 [2, samples] in -1..1 and its sample rate. Settings are those of `Settings`."""
        clip = next(iter(self.generate([prompt], Settings(**settings), seconds)))  # type: ignore[arg-type]
        return clip.audio, clip.sample_rate

    def generate(
        self,
        prompts: Sequence[str],
        settings: Settings | None = None,
        seconds: float | None = None,
        negative_prompt: str | None = None,
        num_variations: int = 1,
        on_step: Callable[[int, int], object] = lambda clip, step: None,
    ) -> Iterator[Clip]:
        """Clips of every prompt and variation, in order; the i-th has seed + i and equals its single run exactly.

        on_step(clip, step) is called before the first step with -1 and after every step. Raises UserError before the
        first clip for a bad argument.
        """
        settings = settings or Settings()
        seconds = self.check_seconds(seconds)
        check_clips(prompts, settings, num_variations, negative_prompt)
        index = 0
        for prompt in prompts:
            with self._fitting():
                conditioning = self.condition(prompt, settings, seconds, negative_prompt)
            for _ in range(num_variations):
                one = replace(settings, seed=settings.seed + index)
                times: list[float] = []

                def stepped(step: int, clip: int = index, times: list[float] = times) -> None:
                    times.append(time.perf_counter())
                    on_step(clip, step)

                latents = self.sample(conditioning, one, stepped)
                with self._fitting():
                    audio = finish(self.decode(latents), round(seconds * self.sample_rate))
                elapsed = tuple(np.diff(times).tolist())
                yield Clip(prompt, one.seed, audio, self.sample_rate, elapsed)
                index += 1

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """All arguments were checked: what an engine still refuses is a size the manifest misstates."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"{self._backend} stopped ({last_line(error)}); free memory, or build again") from error
        except ValueError as error:
            raise UserError(
                f"the parts of the bundle {self.bundle.folder.name} do not fit together ({error}); build it again"
            ) from error

    def check_seconds(self, seconds: float | None) -> float:
        """The length to make: by default 10 s or the model's longest."""
        if seconds is None:
            return min(10.0, self.max_seconds)
        if not 0.1 <= seconds <= self.max_seconds + 0.005:
            raise UserError(f"seconds {seconds:g} is outside 0.1..{self.max_seconds:.2f}, this model's longest")
        return min(seconds, self.max_seconds)

    def count_cut_tokens(self, prompt: str) -> int:
        """How many tokens of a prompt the model will not see."""
        return self._tokenizer(prompt)[2]

    def condition(
        self, prompt: str, settings: Settings, seconds: float, negative_prompt: str | None = None
    ) -> Conditioning:
        """Run the text and conditioning graphs for one prompt and a whole schedule."""
        sigmas = settings.sigmas[:-1]
        texts = [prompt, prompt if negative_prompt is None else negative_prompt]
        embeds = [self._embed(text) for text in texts]
        t = sigma_to_t(sigmas).astype(np.float32)
        rows = -(-len(t) // TIME_ROWS) * TIME_ROWS
        engine = self.engine("conditioning", rows)
        numbers = {"seconds_start": np.zeros(2, np.float32), "seconds_total": np.full(2, seconds, np.float32)}
        outputs = engine.run(
            {
                "prompt_embeds": np.concatenate(embeds),
                **{name: value for name, value in numbers.items() if name in engine.inputs},
                "keep": np.array([1, negative_prompt is not None], np.float32),
                "t": np.pad(t, (0, rows - len(t)), mode="edge"),
            }
        )
        steps: dict[str, ByStep] = {"time_embed": outputs["time_embed"][: len(t)]}
        if self._scale_tables:
            scales = [tables.at(sigmas) for tables in self._scale_tables]
            steps["step_scales"] = ByGraph(scales, sigmas, self.step_sigmas)
        constants = {name: value for name, value in outputs.items() if name.startswith(("global_embed", "context_"))}
        return Conditioning(constants, steps, sigmas)

    def sample(
        self,
        conditioning: Conditioning,
        settings: Settings,
        on_step: Callable[[int], object] = lambda step: None,
        observe: Observer | None = None,
    ) -> Float:
        """The sampling loop -> latents float32 [channels, latents]. All noise comes from the seed, on the CPU.

        Raises ValueError when the conditioning was made for other noise levels than those of `settings`.
        """
        engine = self.step_engine
        sigmas = settings.sigmas
        if not np.array_equal(sigmas[:-1], conditioning.sigmas):
            raise ValueError("the conditioning is that of another schedule")
        shape = engine.latent_shape
        rng = np.random.Generator(np.random.PCG64(settings.seed))

        def noise(step: int) -> Float:
            return rng.standard_normal(shape, np.float32)

        guided = GuidedDenoiser(engine, conditioning, settings.cfg_scale, observe)

        def denoise(x: Float, sigma: float, step: int) -> Float:
            with self._fitting():  # what on_step raises is the caller's own
                return guided(x, sigma, step)

        x = noise(0) * np.float32(sigmas[0])
        on_step(-1)
        return SAMPLERS[settings.sampler](denoise, x, sigmas, noise, lambda step, sigma, denoised: on_step(step))

    def decode(self, latents: Float) -> Float:
        """latents [channels, latents] -> audio float32 [1 or 2, samples], not yet normalised."""
        engine = self.engine("decoder")
        if "audio" in engine.outputs:
            return decode_tiles(lambda part: engine.run({"latents": part[None]})["audio"][0], latents, *self._tiling())
        outputs = engine.run({"latents": latents[None]})
        config = self.bundle.manifest["model"]["pretransform"]["config"]
        audio = griffin_lim(
            outputs["magnitude"][0],
            config["n_fft"],
            config["hop_length"],
            config["griffin_lim_iterations"],
        )
        return audio[None]

    def encode(self, audio: Float) -> tuple[Float, Float]:
        """audio float32 [channels, n] in -1..1 at `sample_rate` -> mean, stdev of its latents, [channels, latents].

        There are ceil(n / downsampling_ratio) latents, those of the audio followed by silence. Raises UserError when
        the model has no encoder, and for other channels or a longer sound than the model's.
        """
        if "tile_latents" not in self.sizes:
            raise UserError(f"the model {self.bundle.manifest['model']['name']} has no encoder: it cannot take audio")
        tile, overlap, ratio = self._tiling()
        channels, samples = self.sizes["encoder_channels"], audio.shape[1]
        if audio.shape[0] != channels or not 1 <= samples <= self.sizes["max_latents"] * ratio:
            most = f"{channels} channels and at most {self.max_seconds:.2f} s"
            raise UserError(f"the model takes audio of {most}, not {audio.shape[0]} channels of {samples} samples")
        latents = -(-samples // ratio)
        padded = np.pad(audio, ((0, 0), (0, max(latents, tile) * ratio - samples)))
        engine = self.engine("encoder")

        def encode(part: Float) -> tuple[Float, ...]:
            outputs = engine.run({"audio": part[None]})
            return outputs["mean"][0], outputs["stdev"][0]

        mean, stdev = encode_tiles(encode, padded, tile, overlap, ratio)
        return mean[:, :latents], stdev[:, :latents]

    def _tiling(self) -> tuple[int, int, int]:
        """tile and overlap in latents, samples a latent"""
        return self.sizes["tile_latents"], self.sizes["tile_overlap"], self.sizes["downsampling_ratio"]

    @cached_property
    def step_engine(self) -> StepEngine:
        """All step graphs of the bundle, compiled."""
        return StepEngine({graph: self.engine(graph) for graph in step_graphs(self.step_sigmas)}, self.step_sigmas)

    def engine(self, graph: str, steps: int = 0) -> Engine:
        """The compiled engine of one of the bundle's graphs (steps: the conditioning graph's rows of t)."""
        if (graph, steps) not in self._engines:
            self._engines[graph, steps] = self._open(graph, steps)
        return self._engines[graph, steps]

    def _open(self, graph: str, steps: int) -> Engine:
        if Bundle(self.bundle.folder).manifest["created"] != self.bundle.manifest["created"]:
            raise UserError(f"the bundle {self.bundle.folder.name} was built again while it was open; start over")
        shapes = graph_shapes(self.sizes, steps, self.step_sigmas)[graph]
        files = self.bundle.manifest["files"]
        digest = "".join(files[name]["sha256"] for name in (f"{graph}.onnx", f"{graph}.onnx.data"))
        return open_engine(self._backend, self.bundle.path(f"{graph}.onnx"), shapes, self._device, digest)

    @cached_property
    def _scale_tables(self) -> list[ScaleTables]:
        """Those of every step graph; none where the steps differ by their time alone."""
        if "step_scales" not in self.sizes:
            return []
        files = [self.bundle.path(SCALES.format(graph)) for graph in step_graphs(self.step_sigmas)]
        return [load_scales(file, self.sizes["step_scales"]) for file in files]

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        special = self.bundle.manifest["tokenizer"]["special_tokens"]
        return PromptTokenizer(self.bundle.path("tokenizer.json"), self.sizes["prompt_tokens"], special)

    def _embed(self, text: str) -> Float:
        ids, mask, _ = self._tokenizer(text)
        return self.engine("text").run({"input_ids": ids, "attention_mask": mask})["prompt_embeds"]


def check_clips(
    prompts: Sequence[str], settings: Settings, num_variations: int = 1, negative_prompt: str | None = None
) -> None:
    """Raises UserError for what no model could make clips of."""
    if num_variations < 1:
        raise UserError(f"num_variations {num_variations} must be 1 or more")
    if settings.seed + len(prompts) * num_variations - 1 > MAX_SEED:
        raise UserError(f"seed {settings.seed} leaves no seeds for all clips; give a smaller one")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError('the prompt is empty; say what to hear, for example "dog barking"')
    for text in (*prompts, negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of argv that are not UTF-8 become these
            raise UserError(f"the prompt {text[:40]!r} is not UTF-8 text; set your terminal to UTF-8")


def graph_shapes(
    sizes: dict[str, int], steps: int = TIME_ROWS, step_sigmas: Sequence[float] = ()
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Input shapes of every graph for one clip: the CFG pair is the batch of 2; the autoencoder sees one tile.

    steps: rows of t; step_sigmas: the manifest's, there is a step graph more than these.
    """
    s = sizes
    key = (2, s["num_heads"], s["context_tokens"], s["dim_heads"])
    context = {f"context_{kind}.{i}": key for i in range(s["depth"]) for kind in ("k", "v")}
    latents = s["max_latents"]
    tile = s.get("tile_latents")
    step = {
        "x": (2, s["io_channels"], latents),
        "global_embed": (2, s["embed_dim"]),
        "time_embed": (s["embed_dim"],),
        **({"step_scales": (s["step_scales"],)} if "step_scales" in s else {}),
        **context,
    }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "text": {"input_ids": (1, s["prompt_tokens"]), "attention_mask": (1, s["prompt_tokens"])},
        "conditioning": {
            "prompt_embeds": (2, s["prompt_tokens"], s["cond_dim"]),
            **({"seconds_start": (2,)} if s["context_tokens"] - s["prompt_tokens"] > 1 else {}),
            "seconds_total": (2,),
            "keep": (2,),
            "t": (steps,),
        },
        **dict.fromkeys(step_graphs(step_sigmas), step),
        "decoder": {"latents": (1, s["io_channels"], tile or latents)},
    }
    if tile:
        shapes["encoder"] = {"audio": (1, s["encoder_channels"], tile * s["downsampling_ratio"])}
    return shapes
