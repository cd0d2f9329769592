"""`dit-trt profile`: every layer is counted once, under what it is; the roof is a loop whose bytes are the manual's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import error_of, invoke, one_object

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.cpu import cpu_flags
from dit_trt.engines.layers import Layer
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling import profile as profiling
from dit_trt.tooling import vnni_peak
from dit_trt.tooling.build import build_bundle
from dit_trt.tooling.profile import BETWEEN, OUTSIDE, Roof, group_of, profile
from dit_trt.tooling.recipe import Recipe

LINEARS = {
    *("self_attn.to_qkv, int8", "self_attn.to_out, int8", "cross_attn.to_q, int8", "cross_attn.to_out, int8"),
    *("ff.ff.0.proj, int8", "ff.ff.2, int8"),
}


@pytest.fixture(scope="module")
def on_onnxruntime(tiny: Path, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("ort") / "sqs"
    return build_bundle(Checkpoint.open(str(tiny)), Recipe("sqs"), "onnxruntime", target, tiny_table_file).bundle


@pytest.mark.parametrize("which", ["tiny_sqs", "on_onnxruntime"])
def test_the_layers_of_a_step(which: str, request: pytest.FixtureRequest) -> None:
    found = profile(request.getfixturevalue(which), 4, 1)
    groups = {group.name: group for group in found.groups}
    assert groups.keys() >= LINEARS | {"attention", BETWEEN, OUTSIDE}
    # a product for each of q, k, v and of value, gate, in two blocks
    layers = {name.removesuffix(", int8"): groups[name].layers for name in LINEARS}
    assert layers["self_attn.to_qkv"] == 6 and layers["ff.ff.0.proj"] == 4
    assert {layers[name] for name in ("self_attn.to_out", "cross_attn.to_q", "cross_attn.to_out", "ff.ff.2")} == {2}
    assert sum(group.share for group in found.groups) == pytest.approx(1)
    assert sum(group.milliseconds for group in found.groups) == pytest.approx(found.step_ms)
    assert 0 < found.engine_ms < found.step_ms
    assert found.int8_products is not None and found.int8_products.macs == macs(request.getfixturevalue(which))


def macs(bundle: Bundle) -> int:
    """Of the Linears, from their published shapes: q, k, v; out; value, gate; ff.2, of both halves; q; out of the one
    that has a context; in two blocks.
    """
    d, inner = bundle.manifest["sizes"]["embed_dim"], 2 * bundle.manifest["sizes"]["embed_dim"]
    return (24 + 1) * 2 * (2 * (3 * d * d + d * d + 2 * d * inner + inner * d) + d * d + d * d)


def test_of_several_step_graphs_each_counts_for_its_steps(tiny_grouped: Bundle, tiny_float: Bundle) -> None:
    found, plain = ({g.name: g for g in profile(each, 7, 1).groups} for each in (tiny_grouped, tiny_float))
    assert found["ff.ff.2, float"].layers == plain["ff.ff.2, float"].layers == 2  # of either graph
    assert sum(group.share for group in found.values()) == pytest.approx(1)


def test_nothing_of_a_float_bundle_is_int8(tiny_float: Bundle) -> None:
    found = profile(tiny_float, 3, 1)
    assert found.int8_products is None
    assert {name.replace("int8", "float") for name in LINEARS} <= {group.name for group in found.groups}
    assert not [group.name for group in found.groups if group.name.endswith("int8")]


def test_what_a_layer_is() -> None:
    def layer(kind: str, *nodes: str, int8: bool = False, weight: bool = False) -> str:
        return group_of(Layer(nodes, kind, "k", int8, weight, 1e-6))

    block = "model.model.transformer.layers.11"
    assert layer("FullyConnected", "Multiply_3", f"{block}.ff.ff.2", int8=True) == "ff.ff.2, int8"
    assert layer("MatMul", f"{block}.cross_attn.to_q/Dequantization", weight=True) == "cross_attn.to_q, float"
    assert layer("MatMul", f"{block}.self_attn.to_qkv.v") == "self_attn.to_qkv, float"
    assert layer("MatMul", "node_matmul") == "attention"
    assert layer("MatMul", "node_linear", weight=True) == "other products"
    assert layer("Subgraph", f"{block}.ff.ff.2.x_q") == "quantizing"
    assert layer("Subgraph", "node_mul", "node_softmax_1") == "attention"
    assert layer("MVN", "MVN_3") == "norms"
    assert layer("Reorder", "x_abc") == "layout"
    assert layer("Add", "node_add_22") == "element-wise"


def test_the_command(tiny_sqs: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "step.png"
    told = invoke("profile", tiny_sqs.folder, "--steps", 3, "--plot", picture).stdout
    assert "ms a step" in told and "int8 products: " in told and "outside the engine" in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    every = invoke("profile", tiny_sqs.folder, "--steps", 3, "--layers").stdout.splitlines()
    times = [float(line.split()[-1]) for line in every if line.split()[-1].replace(".", "").isdigit()]
    assert times == sorted(times, reverse=True) and len(times) > 30
    value = one_object(invoke("profile", tiny_sqs.folder, "--steps", 2, "--threads", 1, "--json").stdout)
    assert value["threads"] == 1 and {layer["group"] for layer in value["layers"]} >= LINEARS
    json.dumps(value)


def test_mistakes(tiny_sqs: Bundle, tmp_path: Path) -> None:
    assert "only .png and .svg are written" in error_of("profile", tiny_sqs.folder, "--plot", tmp_path / "a.gif")
    assert "no bundle 'nope'" in error_of("profile", "nope")


# -------------------- the roof


def test_the_loop_is_the_manuals_bytes() -> None:
    """As binutils disassembles them: vpdpbusd zmm31, zmm30 into zmm0, zmm10 and zmm23."""
    assert vnni_peak._vpdpbusd(0, 30, 31).hex(" ") == "62 92 0d 40 50 c7"
    assert vnni_peak._vpdpbusd(10, 30, 31).hex(" ") == "62 12 0d 40 50 d7"
    assert vnni_peak._vpdpbusd(23, 30, 31).hex(" ") == "62 82 0d 40 50 ff"
    code = vnni_peak._code()
    body = vnni_peak.PRODUCTS // 64 * 6
    jump = bytes.fromhex("48ffcf0f85") + (-(body + 9)).to_bytes(4, "little", signed=True)
    assert code[body:] == jump + bytes.fromhex("c5f877c3")  # dec rdi; jnz; vzeroupper; ret


def test_the_peak_is_measured_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    found = vnni_peak.vnni_peak(1, 0.02)
    assert (found is not None) == ("avx512_vnni" in cpu_flags() and "amx_int8" not in cpu_flags())
    if found is not None:
        assert found > 1e9  # no clock is that slow
    for flags in ({"avx2"}, {"avx512_vnni", "amx_int8"}):
        monkeypatch.setattr(vnni_peak, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert vnni_peak.vnni_peak(1) is None
    monkeypatch.setattr(vnni_peak.platform, "machine", lambda: "arm64")
    assert vnni_peak.vnni_peak(1) is None


def test_the_share_of_the_peak() -> None:
    assert Roof(3_000_000_000, 2.0, 2e12).share == pytest.approx(0.75)
    assert str(Roof(3_000_000_000, 2.0, 2e12)).endswith("75% of the 2.00 T that a loop on registers alone gets")
    assert Roof(1, 1.0, None).share is None


def test_a_backend_that_does_not_count(tiny_sqs: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(tiny_sqs.folder)
    bundle.manifest["backend"] = "tensorrt"
    with pytest.raises(profiling.UserError, match="tensorrt is not profiled here: NVIDIA's trtexec"):
        profile(bundle, 2)
