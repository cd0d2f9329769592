"""Stable Audio Open's matrix products by PyTorch on an NVIDIA GPU: INT8 against FP16 and BF16. Not our engine's.

    python -m dit_trt.tooling.gpu_gemm

For a GPU on which TensorRT does not run: what its integer units would give for the products of a block, at both
guidance halves of the longest clip and of ten seconds. INT8 is `torch._int_mm` and what a Linear needs behind it, the
scale of each output channel and FP16, by a kernel of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import click
import torch
from torch import Tensor

from ..engines.errors import UserError
from .cli.common import dit_command, show, show_table
from .timed_steps import turns

WIDTH, INNER, CONTEXT_WIDTH = 1536, 6144, 768
PRODUCTS = {  # in -> out features of a block's Linears (cross attention's keys and values run once a prompt)
    "to_qkv": (WIDTH, 3 * WIDTH),
    "to_out": (WIDTH, WIDTH),
    "cross to_q": (WIDTH, WIDTH),
    "cross to_out": (WIDTH, WIDTH),
    "ff.0": (WIDTH, 2 * INNER),
    "ff.2": (INNER, WIDTH),
}
TOKENS = (2 * 1025, 2 * 217)
ROUNDS, WARM_UP = 30, 5


def products(tokens: int, k: int, n: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """x [tokens, k] by w [n, k] -> [tokens, n], in each arithmetic; seeded."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, k, generator=generator, device=device)
    w = torch.randn(n, k, generator=generator, device=device)
    scale_x, scale_w = x.abs().max() / 127, w.abs().amax(1) / 127
    x8 = (x / scale_x).round().to(torch.int8)
    w8 = (w / scale_w[:, None]).round().to(torch.int8).t()
    scale = (scale_x * scale_w).float()
    half, brain = (x.half(), w.half().t()), (x.bfloat16(), w.bfloat16().t())

    def int8() -> Tensor:
        return (torch._int_mm(x8, w8) * scale).half()

    return {"fp16": lambda: half[0] @ half[1], "bf16": lambda: brain[0] @ brain[1], "int8": int8}


def milliseconds(
    works: Mapping[str, Callable[[], object]], rounds: int, wait: Callable[[], object]
) -> dict[str, float]:
    """Medians; all take turns, each waited for."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for order in turns([*works], rounds + WARM_UP):
        for name in order:
            wait()
            start = time.perf_counter()
            works[name]()
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}


def gpu_name() -> str:
    """PyTorch's GPU. Raises UserError where it sees none."""
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no NVIDIA GPU here; it takes one, its driver and a CUDA build of torch")
    return torch.cuda.get_device_name()


@click.command()
@click.option("--rounds", type=click.IntRange(1, 9999), default=ROUNDS, show_default=True)
@dit_command
def command(rounds: int) -> dict:
    """Time INT8, FP16 and BF16 products of Stable Audio Open's shapes by PyTorch."""
    name = gpu_name()
    show(f"{name}, torch {torch.__version__}; products by PyTorch, not by our engine; medians of {rounds} rounds, ms")
    rows: list[list[object]] = [["product", "tokens", "fp16", "bf16", "int8", "fp16/int8"]]
    for tokens in TOKENS:
        for product, (k, n) in PRODUCTS.items():
            found = milliseconds(products(tokens, k, n, "cuda"), rounds, torch.cuda.synchronize)
            ratio = found["fp16"] / found["int8"]
            cells = [f"{found[kind]:.3f}" for kind in ("fp16", "bf16", "int8")]
            rows.append([f"{product} {k}x{n}", str(tokens), *cells, f"{ratio:.2f}"])
    show_table(rows)
    return {"gpu": name, "torch": torch.__version__, "rows": [dict(zip(map(str, rows[0]), row)) for row in rows[1:]]}


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.gpu_gemm")
