"""The table of backends: what `auto` becomes, and why a backend is refused."""

import pytest
from graphs import shapes_of

from dit_trt.engines import base
from dit_trt.engines.base import BACKENDS, choose_backend, explain_auto, open_engine
from dit_trt.engines.errors import UserError
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.engines.openvino import OpenVINOEngine


@pytest.fixture
def without(monkeypatch):
    """Take packages away."""

    def take(*packages):
        real = base.find_spec
        monkeypatch.setattr(base, "find_spec", lambda name: None if name in packages else real(name))

    return take


@pytest.mark.parametrize(("backend", "engine"), [("openvino", OpenVINOEngine), ("onnxruntime", ONNXRuntimeEngine)])
def test_a_chosen_backend_opens_a_graph(tiny_sqs, backend, engine):
    assert choose_backend(backend) == backend
    opened = open_engine(backend, tiny_sqs.path("step.onnx"), shapes_of(tiny_sqs, "step"))
    assert isinstance(opened, engine)
    assert opened.inputs == shapes_of(tiny_sqs, "step")
    assert BACKENDS[backend].load().runtime_version().count(".") >= 1


def test_auto_is_the_first_that_can_run_here(without):
    assert choose_backend("auto") == "openvino"
    assert explain_auto("openvino").startswith("backend openvino: ")
    without("openvino")
    assert choose_backend("auto") == "onnxruntime"
    line = explain_auto("onnxruntime")
    assert line == (
        "backend onnxruntime: openvino cannot run here (the package openvino is not installed: pip install openvino)"
    )


def test_auto_passes_over_a_backend_that_is_installed_and_cannot_run(monkeypatch):
    monkeypatch.setattr(BACKENDS["openvino"].load(), "unusable", lambda: "it has no device")
    assert choose_backend("auto") == "onnxruntime"
    assert "openvino cannot run here (it has no device)" in explain_auto("onnxruntime")
    with pytest.raises(UserError, match=r"^the backend openvino cannot run here: it has no device$"):
        choose_backend("openvino")


def test_openvino_without_a_cpu_device_is_unusable(monkeypatch):
    class Core:
        available_devices = ("NPU",)

    module = BACKENDS["openvino"].load()
    monkeypatch.setattr(module.ov, "Core", Core)
    assert "no CPU device (only: NPU)" in module.unusable()


def test_no_backend_at_all_names_what_to_install(without):
    without("openvino", "onnxruntime")
    with pytest.raises(UserError) as error:
        choose_backend("auto")
    assert "pip install openvino" in str(error.value)
    assert "onnxruntime" in str(error.value)


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(UserError, match=r"^unknown backend 'cuda' \(one of: auto, openvino, onnxruntime, tensorrt\)$"):
        choose_backend("cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [b"", b"no graph"], ids=["empty", "garbage"])
def test_an_unreadable_graph_is_one_line(tmp_path, backend, content):
    path = tmp_path / "step.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{backend} cannot compile step.onnx: [^\n]+$"):
        open_engine(backend, path, {})
