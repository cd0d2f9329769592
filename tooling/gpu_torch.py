"""One step of a checkpoint's DiT by PyTorch on an NVIDIA GPU: what a TensorRT plan is to be faster than.

    python -m dit_trt.tooling.gpu_torch --model FOLDER

Fused attention, both guidance halves, the step as one captured CUDA graph, so that Python is not what is timed. Inputs
are random: only the time is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch import Tensor

from ..exporters.checkpoint import Checkpoint
from .cli.common import dit_command, show, show_table
from .gpu_gemm import gpu_name, milliseconds
from .torch_steps import torch_dit

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def graph_of(checkpoint: Checkpoint, kind: torch.dtype) -> Callable[[], object]:
    """A launch of one step, [2, io_channels, latents] at the model's own length, in that arithmetic."""
    sizes = checkpoint.sizes
    c = sizes.dit
    dit = torch_dit(checkpoint, torch.get_num_threads())
    cos, sin = (table.to("cuda", kind) for table in dit.transformer.rotary_pos_emb.tables(sizes.max_latents + 1))
    dit = dit.to("cuda", kind)
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(kind)

    x, prepend = drawn(2, c.io_channels, sizes.max_latents), drawn(2, 1, c.embed_dim)
    key = (2, c.num_heads, sizes.context_tokens, c.dim_heads)
    pairs = [(drawn(*key), drawn(*key)) for _ in range(c.depth)]
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # which draws the inputs
        with torch.cuda.stream(side):
            for _ in range(3):
                dit.step(x, prepend, pairs, cos, sin)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dit.step(x, prepend, pairs, cos, sin)
    held = dit, x, prepend, pairs, cos, sin  # the graph knows their addresses, and does not keep them

    def launch(held: object = held) -> None:
        graph.replay()

    return launch


@click.command()
@click.option("--model", metavar="DIR", default="demo", show_default=True, help="The checkpoint.")
@click.option("--rounds", type=click.IntRange(1, 9999), default=30, show_default=True, help="All take turns so often.")
@dit_command
def command(model: str, rounds: int) -> dict:
    """Time a step of a checkpoint's DiT by PyTorch on the GPU: fp32, bf16 and fp16."""
    name = gpu_name()
    checkpoint = Checkpoint.open(model)
    works = {name: graph_of(checkpoint, kind) for name, kind in KINDS.items()}
    found = milliseconds(works, rounds, torch.cuda.synchronize)
    show(f"{name}, torch {torch.__version__}; a step of {model}, both halves, by PyTorch; medians of {rounds} rounds")
    rows = [[kind, f"{value:.3f} ms", f"{found['fp32'] / value:.2f}"] for kind, value in found.items()]
    show_table([["arithmetic", "step", "times fp32"], *rows])
    return {"gpu": name, "torch": torch.__version__, "model": model, "step_ms": found}


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.gpu_torch")
