"""One contender of a contest of steps, in a process of its own: questions on stdin, answers on stdout, JSON by line.

    {"do": "open", ...}             -> {"seconds": s, ...}   see `open_bundle`, `open_torch`
    {"do": "step", "velocity": P}   -> {"seconds": s}        one step; P: where to save its velocity (.npy), or null
    {"do": "memory"}                -> {"rss_anon": bytes, "rss_file": bytes, "peak_rss": bytes}
    {"do": "quit"}                  -> {}

What goes wrong is answered as {"error": "..."}. Nothing heavy is imported before `open`, so that its time and the
memory after it are those of the contender alone; what libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from ..engines.errors import UserError
from .process_memory import memory_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..exporters.checkpoint import Checkpoint
    from ..exporters.dit import DiffusionTransformer

    Float = NDArray[np.float32]
Step = Callable[[], "Float"]


def open_bundle(question: Mapping) -> tuple[Step, dict]:
    """bundle: its folder; precision, threads: see `open_engine`; latents; steps, step: of how many steps which;
    prompt, seconds; x: .npy of the model's input [2, channels, latents]; embeds: where to save the prompt's embedding.

    Answers the noise level of the step as `sigma`. Both CFG halves are computed, whatever the model's own guidance.
    """
    import numpy as np

    from ..runtime.pipeline import Pipeline
    from .timed_steps import open_step_engine

    pipeline = Pipeline.open(question["bundle"])
    backend, precision = pipeline.bundle.backend, question["precision"]
    if precision is not None and backend != "openvino":
        raise UserError(f"{backend} has no choice of precision; leave out :{precision}")
    if precision == "bf16" and not _has_bf16():
        raise UserError("this CPU does not multiply bf16; leave out :bf16")
    settings = pipeline.settings(steps=question["steps"], cfg_scale=7.0)
    if question["embeds"] is not None:
        np.save(question["embeds"], pipeline._embed(question["prompt"]))
    conditioning = pipeline.condition(question["prompt"], settings, pipeline.check_seconds(question["seconds"]))
    engine = open_step_engine(pipeline, question["threads"], precision, question["latents"])
    x, step = np.load(question["x"]), question["step"]
    return lambda: engine.run(conditioning, step, x)["velocity"], {"sigma": float(conditioning.sigmas[step])}


def _has_bf16() -> bool:
    from ..engines.base import BACKENDS

    return BACKENDS["openvino"].load().has_bf16()


def open_torch(question: Mapping) -> tuple[Step, dict]:
    """The DiT in PyTorch, eager, fp32. model: the checkpoint; sigma: the step's noise level; seconds; threads;
    x, embeds: .npy of the model's input and the prompt's embedding.
    """
    import numpy as np

    from ..exporters.checkpoint import Checkpoint
    from ..runtime.schedule import OBJECTIVES
    from .bench import dit_step, torch_dit

    checkpoint = Checkpoint.open(question["model"])
    dit = torch_dit(checkpoint, question["threads"])
    t = np.float32(OBJECTIVES[checkpoint.sizes.objective].time(np.float64(question["sigma"])))
    embeds = np.load(question["embeds"])
    inputs = {"x": np.load(question["x"]), **torch_conditioning(checkpoint, dit, embeds, question["seconds"], t)}
    return dit_step(dit, inputs), {}


def torch_conditioning(
    checkpoint: Checkpoint, dit: DiffusionTransformer, embeds: Float, seconds: float, t: np.float32
) -> dict[str, Float]:
    """What a bundle's conditioning graph computes, in PyTorch: the step's inputs but for x, the prompt's half first.

    embeds [1, tokens, cond_dim]: of the prompt.
    """
    import torch

    from ..exporters.float_graphs import context_names
    from .simulate import conditioning_module

    values = {"seconds_start": 0.0, "seconds_total": seconds}
    numbers = [torch.full((2,), values[name]) for name in checkpoint.sizes.conditioning.numbers]
    with torch.inference_mode():
        graph = conditioning_module(checkpoint, dit)
        both = torch.from_numpy(embeds).repeat(2, 1, 1)
        global_embed, time_embed, *context = graph(both, *numbers, torch.tensor([1.0, 0.0]), torch.tensor([t]))
    found = {"global_embed": global_embed, "time_embed": time_embed[0]}
    found |= dict(zip(context_names(checkpoint.sizes.dit.depth), context, strict=True))
    return {name: value.numpy() for name, value in found.items()}


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer every question until `quit`, or until nobody asks."""
    step: Step | None = None
    for line in questions:
        question = json.loads(line)
        start = time.perf_counter()
        try:
            answer: dict = {}
            if question["do"] == "open":
                step, answer = open_torch(question) if "model" in question else open_bundle(question)
                answer["seconds"] = time.perf_counter() - start
            elif question["do"] == "step":
                assert step is not None, "step before open"
                velocity = step()
                answer["seconds"] = time.perf_counter() - start
                if question["velocity"] is not None:
                    import numpy as np

                    np.save(question["velocity"], velocity)
            elif question["do"] == "memory":
                answer = asdict(memory_of())  # type: ignore[arg-type]
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            answer = {"error": f"{error}" or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)
        if question["do"] == "quit":
            return


if __name__ == "__main__":
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, stdout)
