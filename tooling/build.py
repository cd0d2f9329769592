"""A recipe becomes a bundle: checkpoint, calibration table, smoothing, Q/DQ graphs, engine check, manifest."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..engines.base import BACKENDS, INT8, Dialect, open_engine
from ..engines.bundle import Bundle, bundles_folder, new_bundle
from ..engines.errors import UserError
from ..engines.home import home
from ..engines.manifest import write_manifest
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import export_topologies
from ..exporters.linears import Linear
from ..exporters.lint import lint
from ..exporters.qdq import write_graph
from ..exporters.quantized import Activation, QuantizedLinear, Weight
from ..runtime.pipeline import Settings, graph_shapes
from .layers import layers
from .recipe import Recipe
from .smoothing import Smoothing, activation_scale, fold
from .tables import load_absmax, table_facts
from .weights import quantize_weight

Float = NDArray[np.float32]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Built:
    """A finished build: the bundle, and how many Linears were asked for and really run in int8.

    It is a path (`os.PathLike`) and prints as one, that of the bundle's folder: `Pipeline.open(built)`, `Path(built)`.
    """

    bundle: Bundle
    linears: int
    int8_linears: int

    def __fspath__(self) -> str:
        return str(self.bundle.folder)

    __str__ = __fspath__


def quantize_model(
    checkpoint: Checkpoint, recipe: Recipe, absmax: Mapping[str, Float]
) -> tuple[Smoothing, dict[str, QuantizedLinear]]:
    """Smoothing and quantized Linears of a checkpoint; weights are read (and read again) one Linear at a time.

    absmax: by Linear name, absmax of its input channels at every calibrated step, [steps, in].
    """
    chosen = recipe.chosen(checkpoint.linears)
    missing = [linear.name for linear in chosen if linear.name not in absmax]
    if missing:
        raise UserError(f"the calibration table lacks {missing[0]}; calibrate again with --recalibrate")

    def absmax_w(linear: Linear) -> Float:
        return np.abs(checkpoint.tensor(linear.key())).max(axis=0)

    smoothing = fold(checkpoint.linears, chosen, checkpoint.sizes.dit, absmax, absmax_w, recipe.alpha)
    scales = {linear.name: activation_scale(absmax[linear.name], smoothing.factor[linear.name]) for linear in chosen}

    def quantized(linear: Linear) -> QuantizedLinear:
        def weight(part: str) -> Weight:
            """Quantized under its own s; the row fold leaves the integers as they are and scales the scales."""
            original = checkpoint.tensor(linear.graph_name(part)) * smoothing.factor[linear.name]
            if not np.isfinite(original).all():
                raise UserError(f"the checkpoint's {linear.key()} holds NaN or infinity")
            found = quantize_weight(original)
            rows = smoothing.rows.get(linear.name)
            return found if rows is None else Weight(found.integers, found.scale * rows[linear.rows(part)])

        return QuantizedLinear(linear, Activation("static", float(scales[linear.name])), weight)

    return smoothing, {linear.name: quantized(linear) for linear in chosen}


def folded_weights(checkpoint: Checkpoint, smoothing: Smoothing) -> Callable[[str], NDArray]:
    """The float weights of the smoothed model by graph name: equal to the original as a function, not as numbers."""
    parts = {linear.graph_name(part): (linear, part) for linear in checkpoint.linears for part in linear.parts}

    def weight(name: str) -> NDArray:
        value = checkpoint.tensor(name)
        if name in parts:
            return smoothing.weight(*parts[name], value)
        return smoothing.vector(name, value)

    return weight


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    smoothing: Smoothing | None = None,
    quantized: Mapping[str, QuantizedLinear] | None = None,
    say: Say = lambda message: None,
    dialect: Dialect = INT8,
) -> None:
    """Write the graphs with float, folded or quantized weights into `folder`, and lint them."""
    weights = folded_weights(checkpoint, smoothing or Smoothing())
    for name, topology in export_topologies(checkpoint.config, home() / "graphs").items():
        say(f"writing {name}.onnx")
        write_graph(topology, folder / f"{name}.onnx", weights, quantized, dialect)
        lint(folder / f"{name}.onnx", dialect)


def bundle_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    sizes, dit = checkpoint.sizes, checkpoint.sizes.dit
    return {
        "io_channels": dit.io_channels,
        "embed_dim": dit.embed_dim,
        "depth": dit.depth,
        "num_heads": dit.num_heads,
        "dim_heads": dit.dim_heads,
        "cond_dim": dit.cond_token_dim,
        "prompt_tokens": sizes.prompt_tokens,
        "context_tokens": sizes.context_tokens,
        "max_latents": sizes.max_latents,
        "downsampling_ratio": sizes.downsampling_ratio,
        "sample_rate": sizes.sample_rate,
        **sizes.tiling,
    }


def build_bundle(
    checkpoint: Checkpoint,
    recipe: Recipe,
    backend: str,
    target: Path | None = None,
    table: Path | None = None,
    say: Say = lambda message: None,
    device: str | None = None,
    allow_float: bool = False,
) -> Built:
    """Build one bundle and prove it: every Linear asked for runs in int8, by the runtime's own account.

    table: the calibration table (see calibrate); needed unless the method is `none`.
    device: whose kernels are looked at (default: the backend's CPU). allow_float: count lost Linears, do not refuse.
    Raises UserError for a bad model or recipe, and when a Linear lost its int8 kernel. Nothing is left behind then.
    """
    chosen = recipe.chosen(checkpoint.linears)
    if chosen and table is None:
        raise UserError(f"method {recipe.method} needs a calibration table")
    absmax = load_absmax(table, checkpoint) if table is not None else {}
    calibration = table_facts(table) if table is not None and chosen else None
    target = target or bundles_folder() / bundle_name(checkpoint, recipe, backend, calibration, device)
    with new_bundle(target) as folder:
        say(f"quantizing {len(chosen)} Linears" if chosen else "float weights, nothing quantized")
        smoothing, quantized = quantize_model(checkpoint, recipe, absmax)
        write_graphs(checkpoint, folder, smoothing, quantized, say, BACKENDS[backend].dialect)
        save_file(_scales(smoothing, quantized), folder / "scales.safetensors")
        shutil.copyfile(checkpoint.tokenizer_file, folder / "tokenizer.json")
        say(f"compiling with {backend}, reading back its kernels")
        lost = lost_linears(folder, backend, bundle_sizes(checkpoint), chosen, device)
        if lost and not allow_float:
            raise UserError(
                f"{len(lost)} of {len(chosen)} Linears do not run in int8 with {backend}: {', '.join(lost[:6])}; "
                "exclude them with --exclude, choose another backend, or accept them with --allow-float-gemm"
            )
        write_manifest(folder, _manifest(checkpoint, recipe, backend, device, chosen, lost, calibration))
    return Built(Bundle(target), len(chosen), len(chosen) - len(lost))


def bundle_name(
    checkpoint: Checkpoint, recipe: Recipe, backend: str, calibration: dict | None, device: str | None = None
) -> str:
    """`<model>-<method>-<bits>-<backend>-<hash>`; the hash is of the recipe, the model and its calibration table.

    A device other than the default is part of it: what is proven on one says nothing of another.
    """
    facts = [recipe.to_dict(), checkpoint.digest, calibration, *([] if device is None else [device.lower()])]
    text = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{checkpoint.name}-{recipe.method}-{recipe.bits}-{backend}-{digest}"


def lost_linears(
    folder: Path, backend: str, sizes: dict[str, int], chosen: Sequence[Linear], device: str | None = None
) -> list[str]:
    """Compile all graphs as a run would; names of the Linears of which any MatMul does not run as int8 x int8."""
    found: set[str] = set()
    for graph, shapes in graph_shapes(sizes).items():
        engine = open_engine(backend, folder / f"{graph}.onnx", shapes, device)
        if any(linear.graph == graph for linear in chosen):
            try:
                found |= engine.int8_matmuls()
            except RuntimeError as error:
                raise UserError(f"{backend} does not tell its kernels of {graph}.onnx: {error}") from error
    return [
        linear.name
        for linear in chosen
        if any(linear.graph_name(part).removesuffix(".weight") not in found for part in linear.parts)
    ]


def _scales(smoothing: Smoothing, quantized: Mapping[str, QuantizedLinear]) -> dict[str, NDArray]:
    tensors: dict[str, NDArray] = {f"smoothing/{name}": s for name, s in smoothing.factor.items()}
    for name, item in quantized.items():
        tensors[f"activation_scale/{name}"] = np.array([item.activation.scale], np.float32)
    return tensors


def _manifest(
    checkpoint: Checkpoint,
    recipe: Recipe,
    backend: str,
    device: str | None,
    chosen: Sequence[Linear],
    lost: Sequence[str],
    calibration: dict | None,
) -> dict:
    in_int8 = {linear.name for linear in chosen} - set(lost)
    settings = Settings()
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "backend": backend,
        "device": device,
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "linears": len(chosen),
        "int8_linears": len(in_int8),
        "layers": [
            {**asdict(layer), "int8": layer.name in in_int8}
            for layer in layers(checkpoint.linears, chosen, recipe.bits)
        ],
        "model": {
            "name": checkpoint.name,
            "source": checkpoint.source,
            "digest": checkpoint.digest,
            "licence": checkpoint.licence,
            "pretransform": checkpoint.config["model"]["pretransform"],
        },
        "sizes": bundle_sizes(checkpoint),
        "schedule": {
            "steps": settings.steps,
            "sampler": settings.sampler,
            "cfg": settings.cfg_scale,
            "seed": settings.seed,
            "sigma_min": settings.sigma_min,
            "sigma_max": settings.sigma_max,
        },
        "versions": {
            **{name: version(name) for name in ("dit-trt", "onnx", "torch")},
            backend: BACKENDS[backend].load().runtime_version(),
        },
    }
