"""Our DiT's step in torch, quantized by nvidia-modelopt: a checkpoint and recorded calls in, its ONNX with Q/DQ out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.dit import split_fused
from ..exporters.float_graphs import OPSET, StepGraph, context_names, quiet
from ..exporters.linears import Linear
from .peers import Call
from .simulate import float_dit, step_module

# As modelopt's own presets: INT8_DEFAULT_CFG, INT8_SMOOTHQUANT_CFG (alpha 1 is its default), and of SVDQuant, which has
# a preset for 4 bits only, the same on INT8_DEFAULT_CFG with the rank that ours is compared at.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "max": {"method": "max"},
    "smoothquant": {"method": "smoothquant", "alpha": 1.0},
    "svdquant": {"method": "svdquant", "lowrank": 32},
}
VERSION = "0.47"  # the one that this was written for
SEARCH_CALLS = 16  # svdquant tries eleven smoothings on each, at 20 s a call for the demo; ranges are of all calls


def quantize_step(checkpoint: Checkpoint, algorithm: str, calls: Sequence[Call]) -> StepGraph:
    """The step in torch with fake-quantized Linears, those of the blocks and no other; fused ones are split.

    calls: every input of the step graph, as peers.calibration_calls records them.
    Raises UserError when modelopt is not installed, or is of a version that does otherwise.
    """
    mtq = _modelopt()
    step = step_module(checkpoint, float_dit(checkpoint))
    split_fused(step)

    names = [f"{linear.name}.{part}".rstrip(".") for linear in step_linears(checkpoint) for part in linear.parts]

    def loop(model: nn.Module, calls: Sequence[Call] = calls) -> None:
        with torch.inference_mode():
            for call in calls:
                model(*arguments(call))

    config = {
        "quant_cfg": [
            *copy.deepcopy(mtq.INT8_DEFAULT_CFG["quant_cfg"]),
            {"quantizer_name": "*", "enable": False},
            *({"quantizer_name": f"*{name}.*_quantizer", "enable": True} for name in names),
            {"quantizer_name": "*output_quantizer", "enable": False},
        ],
        "algorithm": ALGORITHMS[algorithm],
    }
    with quiet():
        if algorithm == "svdquant":
            few = calls[:: -(-len(calls) // SEARCH_CALLS)]
            mtq.quantize(step, config, lambda model: loop(model, few))
            mtq.calibrate(step, "max", loop)
        else:
            mtq.quantize(step, config, loop)
    for side in ("weight", "input"):
        suffix = f".{side}_quantizer"
        on = {name.removesuffix(suffix) for name, item in step.named_modules() if name.endswith(suffix) and _on(item)}
        if on != {f"dit.{name}" for name in names}:
            raise UserError(f"nvidia-modelopt quantized {len(on)} of {len(names)} products; install {VERSION} of it")
    return step


def step_linears(checkpoint: Checkpoint) -> list[Linear]:
    return [linear for linear in checkpoint.linears if linear.graph == "step"]


def arguments(call: Call) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """StepGraph's, of one recorded call."""
    x, global_embed, time_embed, *context = (torch.from_numpy(call[name]) for name in input_names(call))
    return x, global_embed, time_embed, context


def input_names(call: Mapping[str, object]) -> list[str]:
    """Of the step graph, in order."""
    depth = sum(name.startswith("context_k.") for name in call)
    return ["x", "global_embed", "time_embed", *context_names(depth)]


def export_step(step: StepGraph, call: Call, path: Path) -> None:
    """Write the fake-quantized step as ONNX, batch and latents dynamic.

    By torch's older exporter: modelopt's quantizers do not go through torch.export.
    """
    names = input_names(call)
    axes = {name: {0: "batch"} for name in (*names, "velocity") if name != "time_embed"}
    for name in ("x", "velocity"):
        axes[name][2] = "latents"
    with quiet():
        torch.onnx.export(
            step,
            arguments(call),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=["velocity"],
            dynamic_axes=axes,
        )


def _on(quantizer: nn.Module) -> bool:
    return bool(getattr(quantizer, "is_enabled", False))


def _modelopt() -> ModuleType:
    """modelopt.torch.quantization. It needs requests and huggingface_hub too, which its own metadata do not tell."""
    try:
        with quiet():
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise UserError(f'nvidia-modelopt cannot be imported ({error}): pip install -e ".[modelopt]"') from None
    return mtq
