"""A bundle and a prompt become sound: tokens, conditioning, the sampling loop, the decoder. numpy only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import UserError, last_line
from ..engines.manifest import SCALES, step_graphs
from .denoiser import GuidedDenoiser, Observer
from .graph_shapes import TIME_ROWS
from .griffin_lim import griffin_lim
from .init_audio import InitAudio
from .open_bundle import OpenBundle
from .samplers import SAMPLERS
from .scale_tables import ScaleTables, load_scales
from .settings import Settings, check_clips
from .step_engine import ByGraph, ByStep, Conditioning, cfg_halves
from .tiles import decode_tiles, encode_tiles
from .tokens import PromptTokenizer
from .wav import finish

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One finished clip: audio float32 [2, n] in -1..1, and what made it.

    step_seconds: of each step; of a batch each clip's share of it.
    """

    prompt: str
    seed: int
    audio: Float
    sample_rate: int
    step_seconds: tuple[float, ...]


class Pipeline(OpenBundle):
    """An open bundle, from a prompt to sound. Not thread-safe.

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

    def __call__(
        self,
        prompt: str,
        seconds: float | None = None,
        negative_prompt: str | None = None,
        short_window: bool = False,
        init_audio: InitAudio | None = None,
        **settings: object,
    ) -> tuple[Float, int]:
        """One prompt -> audio float32 [2, samples] in -1..1 and its sample rate.

        Settings are those of `Settings`, the rest as in `generate`.
        """
        chosen = self.settings(**settings)
        more: dict[str, Any] = {"short_window": short_window, "init_audio": init_audio}
        clip = next(iter(self.generate([prompt], chosen, seconds, negative_prompt, **more)))
        return clip.audio, clip.sample_rate

    def generate(
        self,
        prompts: Sequence[str],
        settings: Settings | None = None,
        seconds: float | None = None,
        negative_prompt: str | None = None,
        num_variations: int = 1,
        on_step: Callable[[int, int], object] = lambda clip, step: None,
        short_window: bool = False,
        init_audio: InitAudio | None = None,
        batch: int = 1,
        seeds: Sequence[int] | None = None,
        on_denoised: Callable[[int, int, Float], object] = lambda clip, step, denoised: None,
    ) -> Iterator[Clip]:
        """Clips of every prompt and variation, in order; the i-th has seed + i and, on a CPU, equals its single run.

        on_step(clip, step) is called before the first step with -1 and after every step; before that, as a part of the
        step, on_denoised(clip, step, the denoised estimate [channels, latents]). Raises UserError before the first clip
        for a bad argument.
        batch: so many clips go through the step graphs at once (`max_batch` at most), which costs less a clip and more
        memory; on the CPU backends no bit of them changes. seeds: of the clips, in place of seed + i.
        short_window: compute no more latents than `seconds` needs, which is faster, though the model was trained on
        windows of its full length; by default that is computed and trimmed. init_audio: see InitAudio.
        """
        settings = settings or self.settings()
        seconds = self.check_seconds(seconds)
        check_clips(prompts, settings, num_variations, negative_prompt)
        texts = [prompt for prompt in prompts for _ in range(num_variations)]
        seeds = range(settings.seed, settings.seed + len(texts)) if seeds is None else seeds
        if len(seeds) != len(texts):
            raise UserError(f"{len(seeds)} seeds for {len(texts)} clips; give one for each")
        for seed in seeds:
            replace(settings, seed=seed)
        if batch < 1:
            raise UserError(f"batch {batch} is less than 1")
        size = batch_size(len(texts), min(batch, self.max_batch or batch))
        self.check_sampler(settings)
        window = self.window(seconds) if short_window else None
        start = None
        if init_audio is not None:
            settings = init_audio.settings(settings)
            with self._fitting():
                start = init_audio.encoded(self, window or self.sizes["max_latents"])
        known: dict[str, Conditioning] = {}
        for begin in range(0, len(texts), size):
            clips = range(begin, min(begin + size, len(texts)))
            with self._fitting():
                wanted = dict.fromkeys(texts[clip] for clip in clips)
                known = {t: known.get(t) or self.condition(t, settings, seconds, negative_prompt) for t in wanted}
            times: list[float] = []

            def stepped(step: int, clips: range = clips, times: list[float] = times) -> None:
                times.append(time.perf_counter())
                for clip in clips:
                    on_step(clip, step)

            def denoised(step: int, estimates: Float, clips: range = clips) -> None:
                for clip, estimate in zip(clips, estimates):
                    on_denoised(clip, step, estimate)

            # A smaller last batch is filled up, since engines have a fixed one: its last clip is made several times.
            filled = [min(begin + i, clips[-1]) for i in range(size)]
            together = Conditioning.together([known[texts[clip]] for clip in filled])
            drawn = [seeds[clip] for clip in filled]
            latents = self.sample_batch(
                together, settings, drawn, stepped, window=window, start=start, on_denoised=denoised
            )
            elapsed = tuple((np.diff(times) / len(clips)).tolist())
            for clip, each in zip(clips, latents):
                with self._fitting():
                    audio = finish(self.decode(each), round(seconds * self.sample_rate))
                self._release("decoder")
                yield Clip(texts[clip], seeds[clip], audio, self.sample_rate, elapsed)

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

    def count_cut_tokens(self, prompt: str) -> int:
        """How many tokens of a prompt the model will not see."""
        return self._tokenizer(prompt)[2]

    def condition(
        self, prompt: str, settings: Settings, seconds: float, negative_prompt: str | None = None
    ) -> Conditioning:
        """Run the text and conditioning graphs for one prompt and a whole schedule.

        With a guidance scale of 1 it is that of the prompt's half alone, unless the step graph takes pairs only.
        Raises UserError for a sampler of models of another objective.
        """
        self.check_sampler(settings)
        sigmas = settings.sigmas[:-1]
        embeds = [self._embed(prompt)]
        embeds.append(embeds[0] if negative_prompt is None else self._embed(negative_prompt))
        self._release("text")
        t = settings.objective.time(sigmas).astype(np.float32)
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
        self._release("conditioning")
        steps: dict[str, ByStep] = {"time_embed": outputs["time_embed"][: len(t)]}
        if self._scale_tables:
            scales = [tables.at(sigmas) for tables in self._scale_tables]
            steps["step_scales"] = ByGraph(scales, sigmas, self.step_sigmas)
        constants = {name: value for name, value in outputs.items() if name.startswith(("global_embed", "context_"))}
        found = Conditioning(constants, steps, sigmas, contexts=1 if negative_prompt is None else 2)
        return found if cfg_halves(settings.cfg_scale, self.always_pairs) == 2 else found.prompt_half()

    def sample(
        self,
        conditioning: Conditioning,
        settings: Settings,
        on_step: Callable[[int], object] = lambda step: None,
        observe: Observer | None = None,
        window: int | None = None,
        start: tuple[Float, Float] | None = None,
    ) -> Float:
        """The sampling loop -> latents float32 [channels, latents]. All noise comes from the seed, on the CPU.

        window: latents to compute (default: the model's full length). start: mean and standard deviation of the latents
        to begin at, each [channels, window].
        Raises ValueError when the conditioning was made for other noise levels than those of `settings`.
        """
        return self.sample_batch(conditioning, settings, [settings.seed], on_step, observe, window, start)[0]

    def sample_batch(
        self,
        conditioning: Conditioning,
        settings: Settings,
        seeds: Sequence[int],
        on_step: Callable[[int], object] = lambda step: None,
        observe: Observer | None = None,
        window: int | None = None,
        start: tuple[Float, Float] | None = None,
        on_denoised: Callable[[int, Float], object] = lambda step, denoised: None,
    ) -> Float:
        """`sample` for one clip a seed at once, of their conditionings `together` -> [clips, channels, latents].

        on_denoised(step, the denoised estimates [clips, channels, latents]) is called before on_step.
        """
        if conditioning.clips != len(seeds):
            raise ValueError(f"the conditioning is of {conditioning.clips} clips, not {len(seeds)}")
        engine = self.step_engine_for(conditioning, window)
        sigmas = settings.sigmas
        if not np.array_equal(sigmas[:-1], conditioning.sigmas):
            raise ValueError("the conditioning is that of another schedule")
        shape = engine.latent_shape
        generators = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

        def noise(step: int) -> Float:
            drawn = np.empty((len(generators), *shape), np.float32)
            for rng, own in zip(generators, drawn):
                rng.standard_normal(dtype=np.float32, out=own)
            return drawn

        guided = GuidedDenoiser(engine, conditioning, settings.cfg_scale, settings.objective, observe)

        def denoise(x: Float, sigma: float, step: int) -> Float:
            with self._fitting():  # what on_step raises is the caller's own
                return guided(x, sigma, step)

        x = noise(0) * np.float32(sigmas[0])
        if start is not None:
            mean, stdev = start
            own = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1]))) for seed in seeds]
            latents = np.stack([mean + stdev * rng.standard_normal(shape, np.float32) for rng in own])
            x = x + latents * np.float32(1 - sigmas[0] if settings.objective.interpolates else 1)

        def stepped(step: int, sigma: float, denoised: Float) -> None:
            on_denoised(step, denoised)
            on_step(step)

        on_step(-1)
        return SAMPLERS[settings.sampler](denoise, x, sigmas, noise, stepped)

    def decode(self, latents: Float) -> Float:
        """latents [channels, latents] -> audio float32 [1 or 2, samples], not yet normalised."""
        engine = self.engine("decoder", latents=latents.shape[1])
        if "audio" in engine.outputs:
            _, overlap, ratio = self._tiling()
            tile = engine.inputs["latents"][2]
            return decode_tiles(
                lambda part: engine.run({"latents": part[None]})["audio"][0], latents, tile, overlap, ratio
            )
        outputs = engine.run({"latents": latents[None]})
        config = self.bundle.manifest["model"]["pretransform"]["config"]
        audio = griffin_lim(
            outputs["magnitude"][0],
            config["n_fft"],
            config["hop_length"],
            config["griffin_lim_iterations"],
        )
        return audio[None]

    @property
    def audio_channels(self) -> int:
        """Of the sound that `encode` takes. Raises UserError when the model has no encoder."""
        if "encoder_channels" not in self.sizes:
            raise UserError(f"the model {self.bundle.manifest['model']['name']} has no encoder: it cannot take audio")
        return self.sizes["encoder_channels"]

    def encode(self, audio: Float) -> tuple[Float, Float]:
        """audio float32 [channels, n] in -1..1 at `sample_rate` -> mean, stdev of its latents, [channels, latents].

        There are ceil(n / downsampling_ratio) latents, those of the audio followed by silence. Raises UserError when
        the model has no encoder, and for other channels or a longer sound than the model's.
        """
        channels, samples = self.audio_channels, audio.shape[1]
        tile, overlap, ratio = self._tiling()
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
        self._release("encoder")
        return mean[:, :latents], stdev[:, :latents]

    def _tiling(self) -> tuple[int, int, int]:
        """tile and overlap in latents, samples a latent"""
        return self.sizes["tile_latents"], self.sizes["tile_overlap"], self.sizes["downsampling_ratio"]

    @property
    def max_batch(self) -> int | None:
        """How many clips fit into one batch: any number, or one, where the step graph codes the CFG pair."""
        return 1 if self.always_pairs else None

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


def batch_size(clips: int, most: int) -> int:
    """The smallest batch, of `most` at most, that makes so many clips in as few turns: 9 by 8 are 5 and 4."""
    turns = -(-clips // most)
    return -(-clips // turns) if turns else 1
