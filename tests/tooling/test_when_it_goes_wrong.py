"""docs/when-it-goes-wrong.md: every message on the page is printed by the program, and has a case here."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUICK_CALIBRATION, error_of, invoke
from fake_gpu import install
from safetensors.torch import load_file, save_file
from surveys import write_answers
from tiny import write_t5

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST, write_manifest
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.wav import write_wav

PAGE = Path(__file__).parents[2] / "docs" / "when-it-goes-wrong.md"


class Desk:
    """What a case may use and damage: a bundle, a model, an empty home, all in the working directory."""

    def __init__(self, tiny: Path, tiny_sqs: Bundle, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.bundle = Path(shutil.copytree(tiny_sqs.folder, "bundle"))
        self.model = Path(shutil.copytree(tiny, "model"))

    def run(self, *arguments: object, code: int = 1) -> str:
        return error_of("run", "--bundle", self.bundle, "--steps", 2, *arguments, code=code)

    def build(self, *arguments: object, code: int = 1) -> str:
        return error_of("build", "--model", self.model, "--output", "out", *arguments, code=code)

    def flip(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    def write(self, name: str, content: bytes) -> str:
        Path(name).write_bytes(content)
        return name

    def sound(self) -> Path:
        write_wav(self.model / "in.wav", np.ones((2, 800), np.float32), 8000)
        return self.model / "in.wav"

    def t5(self, **changes: object) -> None:
        self.config(lambda config: config["model"]["conditioning"]["configs"][0].update(type="t5", config={}))
        write_t5(self.model / "text_encoder")
        path = self.model / "text_encoder" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def without_t5(self) -> None:
        """No text encoder beside the model, and no hub to ask."""
        self.t5()
        shutil.rmtree(self.model / "text_encoder")
        self.monkeypatch.setattr("dit_trt.exporters.model_files.fetch_text_encoder", refuse)

    def config(self, change: Callable[[dict], object]) -> None:
        path = self.model / "model_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        weights = load_file(self.model / "model.safetensors")
        change(weights)
        save_file(weights, self.model / "model.safetensors")

    def weight(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        name = "model.model.transformer.layers.1.ff.ff.2.weight"
        self.weights(lambda weights: weights.update({name: change(weights[name])}))

    def cut(self) -> None:
        path = self.model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def fail(self, where: str, error: BaseException) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        self.monkeypatch.setattr(f"dit_trt.tooling.write_graphs.{where}", fail)

    def foreign_scales(self) -> None:
        """Sound files, and a manifest that says so, but not those of each other."""
        name, manifest = "step.scales.safetensors", json.loads((self.bundle / MANIFEST).read_text())
        save_file({"knots": torch.zeros(1)}, self.bundle / name)
        write_manifest(self.bundle, {**manifest, "sizes": {**manifest["sizes"], "step_scales": 7}})

    def for_tensorrt(self, **facts: object) -> None:
        """The bundle claims to be."""
        manifest = json.loads((self.bundle / MANIFEST).read_text())
        write_manifest(self.bundle, {**manifest, "backend": "tensorrt", **facts})

    def without_gpu(self) -> str:
        self.for_tensorrt()
        self.monkeypatch.setattr("dit_trt.engines.cuda.device_count", lambda: 0)
        return self.run("rain")

    def on_gpu(self, *arguments: object, **facts: object) -> str:
        self.for_tensorrt(**facts)
        install(self.monkeypatch)
        return self.run("rain", *arguments)

    def updated(self) -> str:
        """TensorRT, since the plans were built."""
        self.for_tensorrt()
        install(self.monkeypatch)
        invoke("run", "--bundle", self.bundle, "--steps", 2, "rain", "--output", "model/x.wav")
        self.monkeypatch.setattr("dit_trt.engines.tensorrt_api.version", lambda: "TensorRT-RTX 99")
        return self.run("rain")

    def unfused(self) -> str:
        self.monkeypatch.setattr("dit_trt.engines.tensorrt.TensorRTPlan.fused_nodes", lambda self: set())
        return self.build(*QUICK_CALIBRATION, "--backend", "tensorrt")

    def serve(self, *arguments: object, code: int = 1) -> str:
        return error_of("serve", self.bundle, "--port", 0, *arguments, code=code)

    def taken_port(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            return error_of("studio", "--bundle", self.bundle, "--port", taken.getsockname()[1])

    def evaluate(self, *arguments: object) -> str:
        words = ("--num-captions", 1, "--seconds", 0.45, "--velocity-clips", 0)
        return error_of("evaluate", self.bundle, *(() if "--captions" in arguments else words), *arguments)

    def batch(self, *arguments: object, code: int = 1) -> str:
        file = self.write("captions.csv", b"id,caption\n1,rain\n")
        return error_of("batch", file, "--bundle", self.bundle, *arguments, code=code)

    def evaluated(self) -> None:
        invoke("evaluate", self.bundle, "--num-captions", 1, "--seconds", 0.45, "--velocity-clips", 0, "--steps", 2)

    def silent(self) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "decode", lambda self, latents: np.zeros((2, 20_000), np.float32))
            return self.evaluate("--steps", 2)

    def other_build(self) -> None:
        with (self.bundle / "tokenizer.json").open("a") as file:
            file.write("\n")
        manifest = json.loads((self.bundle / MANIFEST).read_text())
        write_manifest(self.bundle, {key: value for key, value in manifest.items() if key not in ("files", "format")})

    def analyze_float(self) -> str:
        invoke("build", "--model", self.model, "--method", "none", "--backend", "openvino", "--output", "float")
        return error_of("analyze", "float")

    def clips(self, folder: str, samples: int) -> None:
        write_wav(Path(folder) / "1.wav", np.ones((2, samples), np.float32), 8000)
        entry = {"id": "1", "caption": "rain", "seed": 1, "file": "1.wav"}
        (Path(folder) / "clips.jsonl").write_text(json.dumps(entry))

    def listen(self) -> str:
        return error_of("listen", "--clips", "clips", "--num-prompts", 1, "--output", "out")

    def answered_otherwise(self) -> str:
        invoke("listen", "--clips", "clips", "--num-prompts", 1, "--output", "model/survey")
        write_answers(Path("answers/a.json"), "another", "Ada", {})
        return error_of("listen", "--results", "answers", "--key", "model/survey/key.json")

    def newest_damaged(self) -> None:
        shutil.copytree(self.bundle, "home/bundles/one")
        Path("home/bundles/one/step.onnx").unlink()


def refuse(name: str) -> Path:
    raise UserError(f"{name} cannot be fetched: no network")


CASES: dict[str, Callable[[Desk], str]] = {
    "unknown method …": lambda d: d.build("--method", "gptq", code=2),
    "steps … is outside 1..1000": lambda d: d.run("rain", "--steps", 0, code=2),
    "sigma_min … and sigma_max … must be 0 < min < max <= 1e6": lambda d: d.run("x", "--sigma-max", "1e39", code=2),
    "the prompt is empty; …": lambda d: d.run(" ", code=2),
    "the prompt … is not UTF-8 text; …": lambda d: d.run("\udcff", code=2),
    "seconds … is outside 0.1..…, this model's longest": lambda d: d.run("rain", "--seconds", 900),
    "the sampler … is not for this model (…); it has: …": lambda d: d.run("rain", "--sampler", "pingpong", code=2),
    "the sampler … takes no sigma_min: …; leave it out": lambda d: d.run(
        *("rain", "--sampler", "euler", "--sigma-min", 0.1), code=2
    ),
    "--init-audio … cannot be read as sound (…); …": lambda d: d.run("rain", "--init-audio", "model/LICENSE"),
    "init_noise_level … is outside …, the noise levels of this run": lambda d: d.run(
        "rain", "--init-audio", d.sound(), "--init-noise-level", 0.1
    ),
    "the model … has no encoder: it cannot take audio": lambda d: d.run("rain", "--init-audio", d.sound()),
    "No such option …": lambda d: d.run("-rain", code=2),
    "--output …: only .wav is written; …": lambda d: d.run("rain", "--output", "a.mp3", code=2),
    "--output … is one file, but … clips are asked for; …": lambda d: d.run("a", "b", "--output", "a.wav", code=2),
    "cannot write into …; choose another place with --output": lambda d: d.run("a", "--output", "model/LICENSE/x"),
    "there is no bundle yet; make one with: dit-trt build …": lambda d: error_of("run", "rain"),
    "no bundle …; dit-trt build makes one": lambda d: error_of("run", "rain", "--bundle", "nope"),
    "… is not a bundle (no manifest.json); …": lambda d: error_of("run", "rain", "--bundle", "model"),
    "… has bundle format …, this version reads …; build it again": lambda d: (
        d.write("bundle/manifest.json", b'{"format": 1}') and d.run("rain")
    ),
    "… is damaged (it does not match its own sha256); …": lambda d: (
        d.write("bundle/manifest.json", (d.bundle / MANIFEST).read_bytes() + b" ") and d.run("rain")
    ),
    "the bundle … lacks …; build it again": lambda d: (d.bundle / "step.onnx").unlink() or d.run("rain"),
    "the bundle … is damaged: … does not match its sha256; …": lambda d: (
        d.flip(d.bundle / "step.onnx.data") or d.run("rain")
    ),
    "… does not hold the scales of every step (…); …": lambda d: d.foreign_scales() or d.run("rain"),
    "the newest bundle cannot be used: …": lambda d: d.newest_damaged() or error_of("run", "rain"),
    "the backend … cannot run here: …": lambda d: (
        d.monkeypatch.setattr("dit_trt.engines.base.find_spec", lambda name: None)
        or d.build("--backend", "onnxruntime", code=2)
    ),
    "the backend tensorrt cannot run here: …": lambda d: d.without_gpu(),
    "the backend … has no trunk …": lambda d: d.build("--backend", "onnxruntime", "--trunk", "bf16"),
    "--profile … is not MIN,OPT,MAX, as in 64,216,1024": lambda d: d.build(
        "--backend", "tensorrt", "--profile", "64", code=2
    ),
    "--profile, --target, --workspace-mb and --weight-streaming-mb are not for …": lambda d: d.build(
        "--backend", "openvino", "--target", "sm80", code=2
    ),
    "… has no target …; …": lambda d: d.build("--backend", "tensorrt", "--target", "sm1", code=2),
    "the plan of … is one of …; here is …: build it anew with --rebuild": lambda d: d.updated(),
    "… latents are not among the … of this bundle's --profile: …": lambda d: d.on_gpu(plan={"profile": [8, 8, 8]}),
    "TensorRT has no device … here; available: …": lambda d: d.on_gpu("--device", "cuda:9"),
    "… of … attentions are not fused with …": lambda d: d.unfused(),
    "this command needs the package …": lambda d: (
        d.fail("export_topologies", ModuleNotFoundError("No module named 'onnx'", name="onnx"))
        or d.build("--method", "none")
    ),
    "ONNX Runtime has no device … here; available: …": lambda d: d.build("--backend", "onnxruntime", "--device", "tpu"),
    "… of … Linears do not run in int8 with …": lambda d: (
        d.monkeypatch.setattr("dit_trt.engines.openvino.OpenVINOEngine.int8_matmuls", lambda self: set())
        or d.build("--num-prompts", 1, "--calib-steps", 1)
    ),
    "… of … Linears do not run in int8 with …; this CPU has no VNNI, which --w4 memory needs there: …": lambda d: (
        d.monkeypatch.setattr("dit_trt.engines.base.lacks_vnni", lambda: True)
        or d.monkeypatch.setattr("dit_trt.engines.openvino.OpenVINOEngine.int8_matmuls", lambda self: set())
        or d.build(
            *("--method", "sqt", "--bits", "w4a8", "--w4", "memory", "--backend", "openvino"),
            *("--num-prompts", 1, "--calib-steps", 1),
        )
    ),
    "the conditioner … is of type …; supported: …": lambda d: (
        d.config(lambda config: config["model"]["conditioning"]["configs"][0].update(type="clap_text")) or d.build()
    ),
    "…; or give the folder of the text encoder … with --text-encoder DIR": lambda d: d.without_t5() or d.build(),
    "… has no tokenizer.json, nor ../tokenizer/tokenizer.json: …": lambda d: (
        d.t5() or (d.model / "text_encoder" / "tokenizer.json").unlink() or d.build()
    ),
    "--text-encoder …: no such folder; …": lambda d: d.t5() or d.build("--text-encoder", "nowhere"),
    "--text-encoder: the model … takes none, …": lambda d: d.build("--text-encoder", "model"),
    "this T5 encoder is not supported: …": lambda d: d.t5(feed_forward_proj="gated-silu") or d.build(),
    "this model's cross_attention_cond_ids=… is not supported …": lambda d: (
        d.config(lambda config: config["model"]["diffusion"].update(cross_attention_cond_ids=["prompt", "bpm"]))
        or d.build()
    ),
    "method none quantizes nothing: … do not apply": lambda d: d.build("--method", "none", "--clip", code=2),
    "sqd_weights belongs to method sqd, not to …": lambda d: d.build("--sqd-weights", "requantize", code=2),
    "sqd_weights requantize needs w8a8: …": lambda d: d.build(
        *("--method", "sqd", "--sqd-weights", "requantize", "--bits-for", "ff.ff.2=w4a8"), code=2
    ),
    "… belong to 4-bit weights (bits w4a8)": lambda d: d.build("--group-size", 128, code=2),
    "w4 memory lets the engine quantize every token by itself: …": lambda d: d.build(
        "--bits", "w4a8", "--w4", "memory", code=2
    ),
    "… is not GLOB=BITS, as in ff.ff.2=w8a8": lambda d: d.build("--bits-for", "ff.ff.2", code=2),
    "the recipe … is not valid TOML: …": lambda d: d.build("--recipe", d.write("r.toml", b"method")),
    "the recipe …: unknown key …": lambda d: d.build("--recipe", d.write("r.toml", b"metod = 'sqs'")),
    "--budget-mb … is too small: …": lambda d: error_of("sensitivity", "--model", d.model, "--budget-mb", 0.1),
    "no Linear … in a block (one of: …)": lambda d: error_of("analyze", d.bundle, "--linear", "ff.2"),
    "--step … is outside …, the steps of this run": lambda d: error_of("analyze", d.bundle, "--step", 100),
    "… is FP32: there is nothing to compare; name a quantized bundle": lambda d: d.analyze_float(),
    "… holds …, which is of no analysis; choose another --output": lambda d: error_of(
        "analyze", d.bundle, "--output", "model"
    ),
    "… holds no prompts: …": lambda d: d.build("--prompts", d.write("p.txt", b"")),
    "there is no embedder …; there are: …": lambda d: d.evaluate("--metrics", "fid"),
    "…'s weights are not ours to ship: …": lambda d: d.evaluate("--metrics", "openl3"),
    "… holds something else than an evaluation; …": lambda d: d.evaluate("--output", "model"),
    "no clip sounds in all rows, …": lambda d: d.silent(),
    "… was begun with other …; …": lambda d: d.evaluated() or d.evaluate("--steps", 3),
    '…, line …: write an object a line, as {"id": "91", "caption": "a dog barks"}': lambda d: error_of(
        "batch", d.write("captions.jsonl", b"rain\n"), "--bundle", d.bundle, "--output", "out"
    ),
    "--output … cannot be opened (…); …": lambda d: d.batch("--output", "nonsense://x"),
    "no Ray cluster answers at … (…); …": lambda d: d.batch("--output", "out", "--ray", "127.0.0.1:1"),
    "--ray … is no address; …": lambda d: d.batch("--output", "out", "--ray", "nowhere", code=2),
    "… holds clips of another build of …; …": lambda d: d.evaluated() or d.other_build() or d.evaluate("--steps", 2),
    "…: the id … is there twice (captions … and …); …": lambda d: d.evaluate(
        "--captions", d.write("c.csv", b"id,caption\n1,a\n1,b\n")
    ),
    "include, exclude and bits_for leave nothing to quantize; …": lambda d: d.build("--exclude", "*"),
    "OpenVINO has no device … here; available: …": lambda d: d.run("rain", "--device", "TPU"),
    "there is no folder … here, and as a hub id: …": lambda d: (
        d.monkeypatch.setattr("dit_trt.exporters.model_files.fetch_model", refuse)
        or error_of("build", "--model", "models/sao")
    ),
    "--model …: no such folder or file; …": lambda d: error_of("build", "--model", "nope"),
    "… is not valid JSON: …": lambda d: d.write("model/model_config.json", b"{") and d.build(),
    "…model_config.json lacks or misstates …": lambda d: (
        d.config(lambda config: config["model"]["pretransform"]["config"].pop("n_fft")) or d.build()
    ),
    "… is not a safetensors file": lambda d: d.write("model/model.safetensors", b"short") and d.build(),
    "… is cut off: … ends at byte …, the file at …; …": lambda d: d.cut() or d.build(),
    "… lacks …: not a whole checkpoint of this model_config.json": lambda d: (
        d.weights(lambda weights: weights.pop("model.model.preprocess_conv.weight")) or d.build()
    ),
    "…: … is …, model_config.json asks for …": lambda d: d.weight(lambda w: w[:, :-1].contiguous()) or d.build(),
    "…: … is of type …; only F64, F32, F16, BF16 can be read": lambda d: (
        d.weight(lambda w: w.to(torch.int8)) or d.build()
    ),
    "…: … holds NaN or infinity; …": lambda d: d.weight(lambda w: w * torch.nan) or d.build("--method", "none"),
    "… has no tokenizer.json (the prompt conditioner's tokenizer)": lambda d: (
        (d.model / "tokenizer.json").unlink() or d.build()
    ),
    "no prompt file …: …": lambda d: d.build("--prompts", "nope.txt"),
    "… is not UTF-8 text (byte …): save it as UTF-8": lambda d: d.build("--prompts", d.write("p.txt", b"\xff\xfe\x00")),
    "… has no column 'caption' …": lambda d: d.build("--prompts", d.write("p.csv", b"a,b\n1,2\n")),
    "the pattern … matches no Linear; kinds: …": lambda d: d.build("--exclude", "ff.2"),
    "a listening test compares two bundles or more: …": lambda d: error_of("listen", d.bundle, code=2),
    "… holds a survey already (…); choose another --output": lambda d: (
        d.write("model/key.json", b"{}") and error_of("listen", d.bundle, d.bundle, "--output", "model")
    ),
    "--clips …: no such folder; …": lambda d: error_of("listen", "--clips", "nope"),
    "…: the clips … differ in length or channels, which tells the models apart": lambda d: (
        d.clips("clips/a", 800) or d.clips("clips/b", 801) or d.listen()
    ),
    "no file of … can be counted; …: …": lambda d: (
        d.clips("clips/a", 800) or d.clips("clips/b", 800) or d.answered_otherwise()
    ),
    "--host … can be reached from outside; give --token-file (…)": lambda d: d.serve("--host", "0.0.0.0", code=2),
    "--token-file … cannot be read (…); …": lambda d: d.serve("--token-file", "no-such-file"),
    "--token-file … must hold one line of 16 or more letters and digits; …": lambda d: d.serve(
        "--token-file", d.write("token", b"short"), code=2
    ),
    "two bundles are called …; give each once, under names of their own": lambda d: d.serve(d.bundle),
    "cannot listen on …: …; choose another --port (0: any free one) or --host": lambda d: d.taken_port(),
    "… exists and is not a bundle; choose another --output": lambda d: error_of(
        "build", "--model", d.model, "--output", "model"
    ),
    "interrupted": lambda d: d.fail("export_topologies", KeyboardInterrupt()) or d.build("--method", "none", code=130),
    "No space left on device…; choose another place with --output or DIT_TRT_HOME": lambda d: (
        d.fail("write_graph", OSError(28, "No space left on device", "step.onnx.data")) or d.build("--method", "none")
    ),
}


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    rows = re.findall(r"^\| `(.+?)` \| .+ \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == list(CASES)


@pytest.mark.parametrize("pattern", CASES)
def test_the_message_is_the_programs_own(
    pattern: str, tiny: Path, tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    message = CASES[pattern](Desk(tiny, tiny_sqs, monkeypatch))
    regex = ".*".join(re.escape(part) for part in pattern.split("…"))
    assert re.match(f"Error: {regex}", message), message
    assert not Path("out").exists() and not list(tmp_path.glob("*.wav"))
