"""One contender of a contest of steps, in a process of its own: questions on stdin, answers on stdout, JSON by line.

    {"do": "open", "kind": K, ...}  -> {"seconds": s, ...}   see `OPENERS`
    {"do": "step", "velocity": P}   -> {"seconds": s}        one step; P: where to save its velocity (.npy)
    {"do": "turn"}                  -> {"seconds": s}        the time of a step, see `timed_steps.turn`
    {"do": "account"}               -> {"int8_linears": n}   where the contender did not say it when it was opened
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
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..engines.errors import UserError
from .process_memory import memory_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
        raise UserError(f"{backend} has no choice of what the rest is computed in; leave out :{precision}")
    if precision == "bf16" and not _has_bf16():
        raise UserError("this CPU does not multiply bf16; leave out :bf16")
    settings = pipeline.settings(steps=question["steps"], cfg_scale=7.0)
    if question["embeds"] is not None:
        np.save(question["embeds"], pipeline._embed(question["prompt"]))
    conditioning = pipeline.condition(question["prompt"], settings, pipeline.check_seconds(question["seconds"]))
    engine = open_step_engine(pipeline, conditioning, question["threads"], precision, question["latents"])
    x, step = np.load(question["x"]), question["step"]
    return lambda: engine.run(conditioning, step, x)["velocity"], {"sigma": float(conditioning.sigmas[step])}


def _has_bf16() -> bool:
    from ..engines.base import BACKENDS

    return BACKENDS["openvino"].load().has_bf16()


def open_torch(question: Mapping) -> tuple[Step, dict]:
    """The DiT in PyTorch. variant: one of `torch_steps.VARIANTS`, or diffusers' own; model: the checkpoint; sigma: the
    step's noise level; seconds; threads; x, embeds: .npy of the model's input and the prompt's embedding.

    Answers how many Linears are int8 as `int8_linears`.
    """
    import numpy as np

    from ..exporters.checkpoint import Checkpoint
    from ..runtime.schedule import OBJECTIVES
    from .torch_steps import DIFFUSERS, VARIANTS, conditions, diffusers_step, dit_step, torch_dit

    checkpoint = Checkpoint.open(question["model"])
    dit = torch_dit(checkpoint, question["threads"])
    t = np.float32(OBJECTIVES[checkpoint.sizes.objective].time(np.float64(question["sigma"])))
    x = np.load(question["x"])
    given, inputs = conditions(checkpoint, dit, np.load(question["embeds"]), question["seconds"], t)
    if question["variant"] == DIFFUSERS:
        del dit
        return diffusers_step(checkpoint, x, given), {"int8_linears": 0}
    step, quantized = dit_step(dit, {"x": x, **inputs}, VARIANTS[question["variant"]])
    return step, {"int8_linears": quantized}


def open_peer(question: Mapping) -> tuple[Step, dict]:
    """A step graph that another quantizer wrote. peer: its name; graph: the file; reference: a float bundle of its
    backend, in whose pipeline it stands; linears: see `peers.step_linears`; the rest as in `open_bundle`.

    How many Linears are int8 is told by `account`, which may compile once more: never while memory is measured.
    """
    import numpy as np

    from ..engines.bundle import Bundle
    from ..runtime.step_engine import StepEngine
    from .peers import PEERS, PeerPipeline, int8_linears, open_step

    peer, reference, graph = PEERS[question["peer"]], Bundle(Path(question["reference"])), Path(question["graph"])
    engine = open_step(peer, graph, reference, question["threads"])
    pipeline = PeerPipeline(reference, engine)
    settings = pipeline.settings(steps=question["steps"], cfg_scale=7.0)
    conditioning = pipeline.condition(question["prompt"], settings, pipeline.check_seconds(question["seconds"]))
    x, step = np.load(question["x"]), question["step"]
    call = {"x": x, **conditioning.at(step), **conditioning.constants}
    steps = StepEngine({"step": engine})
    _ACCOUNTS.append(lambda: int8_linears(peer, graph, engine, question["linears"], call))
    return lambda: steps.run(conditioning, step, x)["velocity"], {}


_ACCOUNTS: list[Callable[[], int]] = []  # of the contender that is open, if it has one
OPENERS = {"bundle": open_bundle, "torch": open_torch, "peer": open_peer}


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer every question until `quit`, or until nobody asks."""
    step: Step | None = None
    for line in questions:
        question = json.loads(line)
        start = time.perf_counter()
        try:
            answer: dict = {}
            if question["do"] == "open":
                step, answer = OPENERS[question["kind"]](question)
                answer["seconds"] = time.perf_counter() - start
            elif question["do"] == "step":
                assert step is not None, "step before open"
                velocity = step()
                answer["seconds"] = time.perf_counter() - start
                import numpy as np

                np.save(question["velocity"], velocity)
            elif question["do"] == "turn":
                assert step is not None, "turn before open"
                from .timed_steps import turn

                answer["seconds"] = turn(step)
            elif question["do"] == "account":
                answer = {"int8_linears": _ACCOUNTS[-1]()} if _ACCOUNTS else {}
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
