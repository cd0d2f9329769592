"""A recipe becomes a bundle: checkpoint, calibration table, smoothing, Q/DQ graphs, engine check, manifest."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import BACKENDS, choose_trunk, open_proof, precision_of
from ..engines.bundle import Bundle, bundles_folder, graph_digest, new_bundle
from ..engines.errors import UserError
from ..engines.home import save_tensors
from ..engines.manifest import write_manifest
from ..engines.tensorrt_build import PlanOptions
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import attention_names
from ..exporters.linears import Linear
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Settings
from ..runtime.step_engine import cfg_halves
from .layers import layers
from .quantize import QuantizedRange, quantize_model
from .recipe import Recipe
from .smoothing import Smoothing
from .tables import load_calibration, table_facts
from .write_graphs import write_graphs

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
    plan: PlanOptions | None = None,
) -> Built:
    """Build one bundle and prove it: every Linear asked for runs in int8, by the runtime's own account.

    Where the trunk is in half precision and the backend fuses attention, every attention is fused, too.

    table: the calibration table (see calibrate); needed unless the method is `none`.
    device: whose kernels are looked at (default: the backend's CPU). allow_float: count lost Linears, do not refuse.
    plan: of a TensorRT bundle.
    Raises UserError for a bad model or recipe, and when a Linear lost its int8 kernel. Nothing is left behind then.
    """
    chosen = recipe.chosen(checkpoint.linears)
    trunk = trunk_of(recipe, backend)
    plan_facts = {} if plan is None else plan.to_dict()
    if chosen and table is None:
        raise UserError(f"method {recipe.method} needs a calibration table")
    ranges = _quantized(checkpoint, recipe, table)
    calibration = table_facts(table) if table is not None and chosen else None
    target = target or bundles_folder() / bundle_name(checkpoint, recipe, backend, calibration, device, plan_facts)
    with new_bundle(target) as folder:
        if recipe.groups:
            say(f"{recipe.sqd_weights} keeps {recipe.groups} sets of step weights: the bundle grows with them")
        say(f"quantizing {len(chosen)} Linears" if chosen else "float weights, nothing quantized")
        written = write_graphs(checkpoint, folder, ranges, say, BACKENDS[backend].dialects[trunk], recipe.halves)
        sizes = bundle_sizes(checkpoint)
        if written.step_scales:
            sizes["step_scales"] = written.step_scales
        save_tensors(_scales(ranges), folder / "scales.safetensors")
        shutil.copyfile(checkpoint.tokenizer_file, folder / "tokenizer.json")
        say(f"compiling with {backend}, reading back its kernels")
        arithmetic = {"trunk": trunk, "int16_sums": recipe.int16_sums(chosen)}
        settings = Settings.of_objective(checkpoint.sizes.objective)
        batch = cfg_halves(settings.cfg_scale, recipe.cfg_pair == "difference")
        short = recipe.cfg_pair != "difference"  # which needs both halves of whatever a Linear reads
        shapes = graph_shapes(sizes, step_sigmas=written.step_sigmas, batch=batch, context=1 if short else batch)
        proven = prove(folder, backend, shapes, chosen, arithmetic, device, plan_facts, say)
        lost = proven.lost
        if lost and not allow_float:
            raise UserError(
                f"{len(lost)} of {len(chosen)} Linears do not run in int8 with {backend}: {', '.join(lost[:6])}; "
                + _fix(recipe, chosen, lost, BACKENDS[backend].saturates(device))
            )
        if proven.unfused and not allow_float:
            raise UserError(
                f"{len(proven.unfused)} of {proven.attentions} attentions are not fused with {backend}: "
                f"{', '.join(proven.unfused[:6])}; try another --trunk, or accept them with --allow-float-gemm"
            )
        if len(lost) < len(chosen):
            for note in _notes(recipe, chosen, backend, device):
                say(note)
        facts = _manifest(checkpoint, recipe, backend, device, chosen, lost, calibration)
        facts |= {**arithmetic, "plan": plan_facts, "short_context": short}
        if proven.attentions:
            facts |= {"attentions": proven.attentions, "fused_attentions": proven.attentions - len(proven.unfused)}
        if written.step_sigmas:
            facts["step_sigmas"] = written.step_sigmas
        write_manifest(folder, {**facts, "sizes": sizes})
    return Built(Bundle(target), len(chosen), len(chosen) - len(lost))


def _quantized(checkpoint: Checkpoint, recipe: Recipe, table: Path | None) -> list[QuantizedRange]:
    if recipe.method == "none" or table is None:
        settings = Settings.of_objective(checkpoint.sizes.objective)
        return [QuantizedRange({}, Smoothing(), settings.sigmas[:-1])]
    return quantize_model(checkpoint, recipe, load_calibration(table, checkpoint, recipe.needs_rows))


def trunk_of(recipe: Recipe, backend: str) -> str:
    """The trunk of a recipe's step on a backend. Raises UserError when the backend has not got it."""
    unasked = recipe.trunk == "auto" and recipe.method == "none"  # FP32 is FP32
    return choose_trunk(backend, "fp32" if unasked else recipe.trunk)


def bundle_name(
    checkpoint: Checkpoint,
    recipe: Recipe,
    backend: str,
    calibration: dict | None,
    device: str | None = None,
    plan: Mapping | None = None,
) -> str:
    """`<model>-<method>-<bits>-<backend>-<hash>`; the hash is of the recipe, the model and its calibration table.

    A device other than the default, or a plan's options, are part of it: what is proven of one says nothing of another.
    """
    more = [*([] if device is None else [device.lower()]), *([plan] if plan else [])]
    facts = [recipe.to_dict(), checkpoint.digest, calibration, *more]
    text = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{checkpoint.name}-{recipe.method}-{recipe.bits}-{backend}-{digest}"


@dataclass(frozen=True)
class Proven:
    """What compiled graphs say of themselves. lost: Linears of which any MatMul does not run as int8 x int8.

    attentions: how many were to be fused; unfused: those that were not, as `transformer.layers.0.self_attn`.
    """

    lost: list[str]
    attentions: int = 0
    unfused: tuple[str, ...] = ()


def prove(
    folder: Path,
    backend: str,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    chosen: Sequence[Linear],
    facts: Mapping[str, Any] = MappingProxyType({"trunk": "fp32"}),
    device: str | None = None,
    plan: Mapping | None = None,
    say: Say = lambda message: None,
) -> Proven:
    """Compile all graphs as a run would, one at a time, and ask them. With several step graphs all of them count.

    facts: see `precision_of`.
    """
    kind, attentions = BACKENDS[backend], 0
    lost: set[str] = set()
    unfused: dict[str, None] = {}
    for graph, inputs in shapes.items():
        path, is_step = folder / f"{graph}.onnx", graph.partition("-")[0] == "step"
        precision = precision_of(backend, facts, graph)
        digest = graph_digest(path) if kind.proof else None  # where the run uses what the build compiled
        proof = open_proof(backend, path, inputs, device, digest, precision, plan or None, say)
        asked = [linear for linear in chosen if linear.graph == ("step" if is_step else graph)]
        softmaxes = (
            attention_names(path) if is_step and facts["trunk"] != "fp32" and hasattr(proof, "fused_nodes") else {}
        )
        try:
            found = proof.int8_matmuls() if asked else set()
            fused = proof.fused_nodes() if softmaxes else set()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise UserError(f"{backend} does not tell its kernels of {graph}.onnx: {error}") from error
        del proof  # before the next is compiled beside it
        for linear in asked:
            if any(linear.graph_name(part).removesuffix(".weight") not in found for part in linear.parts):
                lost.add(linear.name)
        attentions = max(attentions, len(softmaxes))
        unfused |= {name: None for node, name in softmaxes.items() if node not in fused}
    return Proven([linear.name for linear in chosen if linear.name in lost], attentions, tuple(unfused))


def _notes(recipe: Recipe, chosen: Sequence[Linear], backend: str, device: str | None) -> Iterator[str]:
    """What a user should know of 16 bits in which this CPU adds int8 products, or does not."""
    saturates, gains = BACKENDS[backend].saturates(device), BACKENDS[backend].gains_from_int16(device)
    wide = [linear for linear in chosen if not recipe.fits_int16(linear)]
    asked = any(recipe.bits_of(linear) == "w7a8" for linear in chosen)
    if saturates and wide:
        bits = {recipe.bits_of(linear) for linear in wide} - ({"w8a8"} if recipe.requantizes else set())
        fits = {"w8a8": "w7a8", "w4a8": "--group-size channel"}
        better = " with ".join(fits[each] for each in sorted(bits, reverse=True))
        does_not = f"--backend onnxruntime does not{better and f', nor does {better}'}"
        yield (
            f"note: this CPU has no VNNI, so {backend} adds int8 products in 16 bits that saturate: "
            f"{does_not} (dit-trt diff tells what it costs)"
        )
    if asked and wide and gains and not saturates:
        yield f"note: {len(wide)} of {len(chosen)} Linears need more than w7a8, so {backend} takes its slower kernels"
    if asked and not gains:
        yield "note: w7a8 gains nothing here, where int8 products are added in 32 bits: w8a8 is more exact"


def _fix(recipe: Recipe, chosen: Sequence[Linear], lost: Sequence[str], saturates: bool) -> str:
    """What a user can do about lost Linears."""
    of_memory = recipe.w4 == "memory" and all(
        recipe.bits_of(linear) == "w4a8" for linear in chosen if linear.name in lost
    )
    if of_memory:
        why = (
            "this CPU has no VNNI, which --w4 memory needs there"
            if saturates
            else "activations are not quantized beside weights that stay in 4 bits there"
        )
        return f"{why}: take --w4 expanded, another backend, or accept them with --allow-float-gemm"
    return "exclude them with --exclude, choose another backend, or accept them with --allow-float-gemm"


def _scales(ranges: Sequence[QuantizedRange]) -> dict[str, NDArray]:
    """What `inspect` shows: the smoothing and the scale of every Linear's input, of the first range of steps."""
    tensors: dict[str, NDArray] = {f"smoothing/{name}": s for name, s in ranges[0].smoothing.factor.items()}
    for name, item in ranges[0].linears.items():
        tensors[f"smoothing/{name}"] = item.s
        if item.activation.range in ("static", "step") and not item.by_step:  # others have none, or one a step
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
    told = layers(checkpoint.linears, recipe, BACKENDS[backend].dialect.int4_block)
    settings = Settings.of_objective(checkpoint.sizes.objective)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "backend": backend,
        "device": device,
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "linears": len(chosen),
        "int8_linears": len(in_int8),
        "layers": [{**asdict(layer), "int8": layer.name in in_int8} for layer in told],
        "model": {
            "name": checkpoint.name,
            "source": checkpoint.source,
            "text_encoder": checkpoint.text_encoder,
            "digest": checkpoint.digest,
            "licence": checkpoint.licence,
            "pretransform": checkpoint.config["model"]["pretransform"],
        },
        "tokenizer": {"special_tokens": checkpoint.sizes.conditioning.special_tokens},
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
