"""Bundles of a few bytes, for the tests of how they are written, opened and found."""

import json

import pytest
from manifests import stamped

from dit_trt.engines.bundle import new_bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST, REQUIRED, write_manifest

FILES = {name: name.encode() for name in sorted(REQUIRED)} | {"step.onnx.data": bytes(range(256)) * 40}
SIZES = (
    *("io_channels", "embed_dim", "depth", "num_heads", "dim_heads", "cond_dim"),
    *("prompt_tokens", "context_tokens", "max_latents", "downsampling_ratio", "sample_rate"),
)
LAYER = {
    **{"name": "transformer.layers.0.ff.ff.2", "kind": "ff.ff.2", "graph": "step", "bits": "w8a8"},
    **{"in_features": 32, "out_features": 16, "float_bytes": 2048, "bytes": 592, "branch_bytes": 0},
}


def manifest(created="2026-01-01T00:00:00+00:00", method="sqs"):
    pretransform = {"type": "mel_pca", "config": {"n_fft": 256, "hop_length": 64, "griffin_lim_iterations": 4}}
    return {
        "backend": "openvino",
        "created": created,
        "model": {"name": "tiny", "source": "/x", "digest": "0" * 64, "licence": "", "pretransform": pretransform},
        "recipe": {"method": method, "bits": "w8a8"},
        "linears": 1,
        "int8_linears": 1,
        "layers": [{**LAYER, "int8": True}],
        "schedule": {"steps": 100, "sampler": "euler", "cfg": 7.0, "seed": 1, "sigma_min": 0.3, "sigma_max": 500},
        "tokenizer": {"special_tokens": False},
        "sizes": dict.fromkeys(SIZES, 7),
    }


def fill(work, files=FILES, **options):
    for name, content in files.items():
        (work / name).write_bytes(content)
    write_manifest(work, manifest(**options))


def make(folder, files=FILES, **options):
    with new_bundle(folder) as work:
        fill(work, files, **options)
    return folder


def tree(folder):
    """Every file and folder under `folder`, hidden ones too, with what the files hold."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder, change):
    """Apply `change` to the manifest of `folder`, in place, as a forger does: its own hash is right again."""
    values = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(values)
    (folder / MANIFEST).write_text(stamped(values), "utf-8")
