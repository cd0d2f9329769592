"""`dit-trt inspect`: what it tells of a bundle, against the bundle's own files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import error_of, invoke, one_object
from onnx import numpy_helper
from safetensors.numpy import load_file

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.manifest import MANIFEST, write_manifest
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.recipe_file import recipe_toml


def inspected(bundle: Bundle) -> dict:
    return one_object(invoke("inspect", bundle.folder, "--json").stdout)


def test_the_object_is_the_manifest_and_sizes(tiny_sqs: Bundle) -> None:
    value = inspected(tiny_sqs)
    added = {"bundle", "size_bytes", "size_bytes_by_part", "size_bytes_without_text", "layers"}
    manifest = json.loads((tiny_sqs.folder / MANIFEST).read_text())
    assert {key: value[key] for key in value.keys() - added} == {k: v for k, v in manifest.items() if k != "layers"}
    assert [{key: row[key] for key in fact} for row, fact in zip(value["layers"], manifest["layers"])] == manifest[
        "layers"
    ]
    assert added <= value.keys()
    assert value["bundle"] == str(tiny_sqs.folder)
    parts = value["size_bytes_by_part"]
    assert value["size_bytes"] == tiny_sqs.size_bytes == sum(parts.values())
    assert value["size_bytes_without_text"] == tiny_sqs.size_bytes - parts["text"] - parts["tokenizer"]
    on_disk = {path.name: path.stat().st_size for path in tiny_sqs.folder.iterdir()}
    assert value["size_bytes_by_part"] == {
        **{g: on_disk[f"{g}.onnx"] + on_disk[f"{g}.onnx.data"] for g in ("text", "conditioning", "step", "decoder")},
        "scales": on_disk["scales.safetensors"],
        "tokenizer": on_disk["tokenizer.json"],
    }


def test_parts_know_every_step_graph(tiny_grouped: Bundle) -> None:
    parts = inspected(tiny_grouped)["size_bytes_by_part"]
    assert sum(parts.values()) == tiny_grouped.size_bytes
    for graph in ("step", "step-1", "step-2"):
        files = (f"{graph}.onnx", f"{graph}.onnx.data", f"{graph}.scales.safetensors")
        assert parts[graph] == sum(tiny_grouped.path(name).stat().st_size for name in files)


def test_every_linear_is_what_its_files_hold(tiny_sqs: Bundle) -> None:
    layers = {layer["name"]: layer for layer in inspected(tiny_sqs)["layers"]}
    assert len(layers) == 14
    layer = layers["transformer.layers.1.ff.ff.0.proj"]
    graph = onnx.load(tiny_sqs.path("step.onnx")).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    own = [
        arrays[f"model.model.{layer['name']}.{part}.{suffix}"]
        for part in ("value", "gate")
        for suffix in ("int8", "scale", "zero_point")
    ]
    scales = load_file(tiny_sqs.path("scales.safetensors"))
    smoothing = scales[f"smoothing/{layer['name']}"]
    assert layer == {
        "name": "transformer.layers.1.ff.ff.0.proj",
        "kind": "ff.ff.0.proj",
        "graph": "step",
        "in_features": 128,
        "out_features": own[0].shape[1] + own[3].shape[1],
        "bits": "w8a8",
        "float_bytes": 4 * 128 * (own[0].shape[1] + own[3].shape[1]),
        "bytes": sum(array.nbytes for array in own),
        "branch_bytes": 0,
        "int8": True,
        "activation_scale": float(scales[f"activation_scale/{layer['name']}"][0]),
        "smoothing_min": float(smoothing.min()),
        "smoothing_max": float(smoothing.max()),
    }
    assert layer["activation_scale"] == pytest.approx(
        float(arrays[f"model.model.{layer['name']}.value.x_scale"]), rel=1e-6
    )


def test_a_float_bundle_has_float_linears(tiny_float: Bundle) -> None:
    layers = inspected(tiny_float)["layers"]
    assert {layer["bits"] for layer in layers} == {"fp32"}
    assert {layer["activation_scale"] for layer in layers} == {None}
    assert all(layer["bytes"] == 4 * layer["in_features"] * layer["out_features"] for layer in layers)
    assert (layers[0]["in_features"], layers[0]["out_features"]) == (128, 384)


def test_what_a_person_reads(tiny_sqs: Bundle) -> None:
    result = invoke("inspect", tiny_sqs.folder)
    assert result.stderr == ""
    for line in (
        "recipe       sqs (smoothing static, activation range static), w8a8, alpha 0.95",
        "linears      14 asked for, 14 in int8",
        "licence      CC0: a test model.",
        "calibration  3 prompts x 8 steps, dpmpp-3m-sde, cfg 7",
        "schedule     100 steps, dpmpp-3m-sde, cfg 7, sigma 500 to 0.3",
    ):
        assert line in result.stdout.splitlines()
    assert re.search(r"^files +\d\.\d MB, every byte matches", result.stdout, re.MULTILINE)
    kinds = [line.split() for line in result.stdout.splitlines()][-7:]
    assert kinds[0][:5] == ["self_attn.to_qkv", "128", "384", "2", "w8a8"]
    assert sum(int(row[-1].replace(",", "")) for row in kinds) == sum(x["bytes"] for x in inspected(tiny_sqs)["layers"])
    factors = np.concatenate(
        [
            s
            for name, s in load_file(tiny_sqs.path("scales.safetensors")).items()
            if re.match(r"smoothing.*to_qkv", name)
        ]
    )
    assert kinds[0][6] == f"{factors.min():.3g}..{factors.max():.3g}"


def test_layers_are_rows_of_their_own(tiny_sqs: Bundle) -> None:
    rows = invoke("inspect", tiny_sqs.folder, "--layers").stdout.splitlines()[-14:]
    assert [row.split()[0] for row in rows] == [layer["name"] for layer in inspected(tiny_sqs)["layers"]]


def test_patterns_are_told(tiny_sqs: Bundle, tmp_path: Path) -> None:
    folder = rewritten(tiny_sqs, tmp_path, lambda manifest: manifest["recipe"].update(exclude=["ff.*", "*to_q"]))
    assert "             exclude ff.*, *to_q" in invoke("inspect", folder).stdout.splitlines()


def test_options_are_told_that_are_not_the_default(tiny_sqs: Bundle, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        changed = Recipe("sqd", alpha="auto", sqd_weights="grouped:2", lora_rank=8, bits_for=(("ff.*", "w4a8"),))
        manifest["recipe"] = changed.to_dict()
        manifest["layers"][0]["branch_bytes"] = 4096

    lines = invoke("inspect", rewritten(tiny_sqs, tmp_path, change)).stdout.splitlines()
    told = [line for line in lines if line.startswith(("recipe ", "   "))]
    assert told == [
        "recipe       sqd (smoothing static, activation range step), w8a8, alpha auto",
        "             weights grouped:2, low rank 8 (svdquant), ff.* w4a8",
    ]
    head, *kinds = lines[-8:]
    assert head.split()[-2:] == ["bytes", "branch"]
    assert [kind.split()[-1] for kind in kinds] == ["4,096", *["0"] * 6]


def test_the_recipe_alone(tiny_sqs: Bundle) -> None:
    assert invoke("inspect", tiny_sqs.folder, "--recipe").stdout == recipe_toml(Recipe())
    assert "give one of them" in error_of("inspect", tiny_sqs.folder, "--recipe", "--json", code=2)


# -------------------- bad bundles


def rewritten(bundle: Bundle, tmp_path: Path, change) -> Path:
    """A copy of a bundle with another manifest, written as a build would: only what it says is wrong."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_manifest(folder, manifest)
    return folder


def test_every_byte_is_compared(tiny_sqs: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "copy"))
    content = bytearray((folder / "scales.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "scales.safetensors").write_bytes(content)
    assert "scales.safetensors does not match its sha256" in error_of("inspect", folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["recipe"].pop("smoothing"),
        lambda manifest: manifest.update(recipe=[]),
        lambda manifest: manifest.update(schedule={}),
        lambda manifest: manifest["sizes"].pop("depth"),
        lambda manifest: manifest["model"].update(licence=None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_line(tiny_sqs: Bundle, tmp_path: Path, change) -> None:
    message = error_of("inspect", rewritten(tiny_sqs, tmp_path, change))
    assert re.search("manifest.* lacks or misstates", message)


def test_scales_that_are_none(tiny_sqs: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "copy"))
    (folder / "scales.safetensors").write_bytes(b"\xff" * 9)
    write_manifest(folder, json.loads((folder / MANIFEST).read_text()))
    assert "scales.safetensors cannot be read" in error_of("inspect", folder)


def test_without_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "empty"))
    assert "dit-trt build" in error_of("inspect")
    assert "no bundle 'nope'" in error_of("inspect", "nope")
