"""What the studio computes: the bytes of `dit-trt run`, estimates by formula, differences, and how work is stopped."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from commands import invoke
from processes import python

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST, write_manifest
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.samplers import SAMPLERS
from dit_trt.runtime.wav import write_wav
from dit_trt.tooling.studio import pictures
from dit_trt.tooling.studio.running import Stopped, reports
from dit_trt.tooling.studio.takes import Progress, Studio
from dit_trt.tooling.studio.wish import Wish


@pytest.fixture
def studio(tiny_float, tiny_sqs, tmp_path, monkeypatch):
    """A home with the tiny model in FP32 and in SQS."""
    home = tmp_path / "home"
    for name, bundle in (("fp32", tiny_float), ("sqs", tiny_sqs)):
        shutil.copytree(bundle.folder, home / "bundles" / name)
    monkeypatch.setenv("DIT_TRT_HOME", str(home))
    return Studio(tmp_path / "clips", "sqs")


WISH = Wish("dog barking", "sqs", 0.5, 6, 5.0, 3)


def picture(png):
    with PIL.Image.open(io.BytesIO(png)) as opened:
        opened.load()
        return opened.convert("RGB")


def test_a_take_is_what_run_writes(studio, tmp_path):
    take = studio.generate(WISH)
    invoke(*take.wish.command.split()[1:4], *("--seconds", 0.5, "--steps", 6, "--cfg", 5, "--seed", 3), "dog barking",
           "--output", tmp_path / "run.wav")  # fmt: skip
    assert take.file.read_bytes() == (tmp_path / "run.wav").read_bytes()
    assert take.file.name == "dog-barking-3.wav"
    assert (take.recipe, take.steps, take.size_bytes) == ("SQS W8A8", 6, studio.bundle("sqs").size_bytes)
    assert take.step_ms > 0
    assert picture(take.picture).width == 720


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_the_estimates_are_the_samplers(studio, monkeypatch, cfg):
    seen, denoised = [], []
    sample = SAMPLERS["dpmpp-3m-sde"]

    def recorded(denoise, x, sigmas, noise, callback):
        def both(step, sigma, estimate):
            denoised.append(estimate[0])
            callback(step, sigma, estimate)

        return sample(denoise, x, sigmas, noise, both)

    monkeypatch.setitem(SAMPLERS, "dpmpp-3m-sde", recorded)
    pipeline = Pipeline(studio.bundle("fp32"))
    settings = pipeline.settings(steps=5, seed=2, cfg_scale=cfg)
    told = {"on_denoised": lambda clip, step, estimate: seen.append((step, estimate))}
    assert len([*pipeline.generate(["dog barking"], settings, 0.5, **told)]) == 1
    assert [step for step, _ in seen] == [*range(5)]
    for (_, found), expected in zip(seen, denoised, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_progress_counts_steps_and_shows_the_estimate(studio):
    said = []
    studio.generate(replace(WISH, steps=16), said.append)
    assert {(report.bundle, report.steps) for report in said} == {("sqs", 16)}
    done = [report.done for report in said]
    assert (done[0], done[-1]) == (0, 16)
    assert done == sorted(set(done))
    shown = [picture(report.picture) for report in said if report.picture]
    assert 5 <= len(shown) <= 8
    assert {one.height for one in shown} == {2 * pictures.BANDS}
    assert shown[0].tobytes() != shown[-1].tobytes()


@pytest.mark.parametrize("steps", [8, 9, 15, 17])
def test_previews_are_few_and_no_part_of_a_steps_time(studio, monkeypatch, steps):
    clock, lost = time.perf_counter, [0.0]

    def slow(pipeline, latents):  # a day each, by the clock that everything here is timed by; nothing of it is waited
        lost[0] += 86_400
        return np.zeros((pictures.BANDS, 4))

    monkeypatch.setattr("dit_trt.tooling.studio.takes.spectrogram", slow)
    monkeypatch.setattr("dit_trt.tooling.studio.takes.FREE_SECONDS", 1e9)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + lost[0])
    studio.generate(replace(WISH, steps=2))  # opened and compiled
    said = []
    take = studio.generate(replace(WISH, steps=steps), said.append)
    assert 3 <= sum(report.picture is not None for report in said) <= 8
    assert take.step_ms < 1000 * 86_400 and take.sampling_seconds < 86_400
    assert take.sampling_seconds >= steps * take.step_ms / 3000 > 0


def test_a_comparison_is_that_of_the_estimates(studio):
    made = studio.compare(WISH, "fp32")
    estimates = []
    for name in ("fp32", "sqs"):
        pipeline, seen = Pipeline(studio.bundle(name)), []
        settings = pipeline.settings(steps=6, cfg_scale=5.0, seed=3)
        told = {"on_denoised": lambda clip, step, estimate, seen=seen: seen.append(estimate.astype(np.float64))}
        assert len([*pipeline.generate(["dog barking"], settings, 0.5, **told)]) == 1
        estimates.append(seen)
    relative = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(*estimates)]
    cosine = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*estimates)]
    np.testing.assert_allclose(made.relative, relative, rtol=1e-6)
    np.testing.assert_allclose(made.cosine, cosine, rtol=1e-9)
    assert 0 < max(relative) < 1
    assert [take.wish.bundle for take in made.takes] == ["fp32", "sqs"]
    assert [folder.name for folder, _ in studio._open] == ["fp32", "sqs"]
    assert made.takes[1].file.read_bytes() == studio.generate(WISH).file.read_bytes()
    assert picture(made.picture).width == 720


def test_a_bundle_and_itself_or_another_model_are_not_compared(studio):
    with pytest.raises(UserError, match="choose two"):
        studio.compare(WISH, "sqs")
    folder = studio.bundle("fp32").folder
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["digest"] = "0" * 64
    write_manifest(folder, manifest)
    with pytest.raises(UserError, match="of different models"):
        studio.compare(WISH, "fp32")
    assert studio.model("sqs").other is None


def test_what_a_model_does_when_nothing_is_said(studio):
    model = studio.model("sqs")
    assert (model.other, model.settings.steps, model.backend) == ("fp32", 100, "openvino")
    pipeline = Pipeline(studio.bundle("sqs"))
    assert model.seconds == round(pipeline.max_seconds, 2)
    assert pipeline.check_seconds(model.seconds) == pytest.approx(pipeline.check_seconds(None), abs=0.005)
    assert studio.model("fp32").other == "sqs"
    assert [name for _, name in studio.titles()] == ["sqs", "fp32"]


def test_a_bundle_elsewhere_can_be_the_first(studio, tiny_sqs, tmp_path):
    folder = shutil.copytree(tiny_sqs.folder, tmp_path / "elsewhere")
    other = Studio(tmp_path / "clips", str(folder))
    first, *others = other.bundles()
    assert first == str(folder) and {*others} == {*studio.bundles()}  # of which the newest comes first
    assert other.generate(replace(WISH, bundle=str(folder))).file.is_file()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"bundle": "nope"}, "no bundle 'nope' in the home folder.*; there are: "),
        ({"steps": 0}, r"steps 0 is outside 1\.\.1000"),
        ({"seconds": 99.0}, r"seconds 99 is outside 0\.1\.\..*, this model's longest"),
        ({"seed": -1}, "seed -1 is outside 0"),
        ({"init_audio": "in.wav"}, "has no encoder, .*; remove the recording, or choose a bundle of another model"),
    ],
)
def test_what_the_model_does_not_take(studio, change, fault):
    with pytest.raises(UserError, match=fault):
        studio.generate(replace(WISH, **change))


def test_a_bundle_that_is_built_again_is_opened_again(studio):
    before = studio.generate(WISH).file.read_bytes()
    folder = studio.bundle("sqs").folder
    created = studio.bundle("fp32").manifest["created"]
    shutil.rmtree(folder)
    shutil.copytree(studio.bundle("fp32").folder, folder)
    manifest = Bundle(folder).manifest
    write_manifest(folder, {**manifest, "created": created.replace("20", "21", 1)})
    assert studio.generate(WISH).file.read_bytes() != before
    assert studio.generate(WISH).recipe == "FP32"


def test_large_bundles_do_not_stay_open_together(studio, monkeypatch):
    monkeypatch.setattr("dit_trt.tooling.studio.takes.KEPT_OPEN", 1)
    studio.compare(WISH, "fp32")
    assert [folder.name for folder, _ in studio._open] == ["sqs"]


def test_what_does_not_count_is_told(studio):
    take = studio.generate(replace(WISH, prompt="dog " * 20, cfg=1.0, negative_prompt="rain"))
    assert [note.split(" ")[0] for note in take.notes] == ["Without", "The"]


# -------------------- pictures


def test_a_tone_is_a_line_at_its_height():
    time = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)[None]
    decibels = pictures.log_mel(tone, 44100)
    assert decibels.shape[0] == pictures.BANDS
    assert (decibels.min(), decibels.max()) == pytest.approx((-80, 0))
    bands = decibels[:, 20:60].argmax(axis=0)
    expected = pictures.BANDS * pictures._mel(1000) / pictures._mel(22050)
    assert np.abs(bands - expected).max() <= 1.5


@pytest.mark.parametrize("samples", [1, 100, 3000, 2_000_000])
def test_any_length_can_be_drawn(samples):
    audio = np.random.default_rng(0).uniform(-1, 1, (2, samples)).astype(np.float32)
    assert picture(pictures.sound_png(audio, 44100)).width == 720
    assert picture(pictures.spectrogram_png(pictures.log_mel(audio, 44100))).width <= 2 * pictures.MOST_COLUMNS


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_any_number_of_steps_can_be_drawn(steps):
    assert picture(pictures.difference_png(np.linspace(0, 0.2, steps), np.linspace(1, 0.9, steps))).width == 720


def test_silence_can_be_drawn():
    decibels = pictures.log_mel(np.zeros((2, 9000), np.float32), 8000)
    assert np.isfinite(decibels).all()


# -------------------- reports


def test_reports_come_as_they_are_said():
    def work(say):
        say(1)
        say(2)
        return 3

    assert [*reports(work, threading.Event())] == [1, 2, 3]


def test_what_the_work_raises_is_raised():
    def work(say):
        say(1)
        raise UserError("so")

    found = reports(work, threading.Event())
    assert next(found) == 1
    with pytest.raises(UserError, match="so"):
        next(found)


@pytest.mark.parametrize("how", ["stop", "close"])
def test_work_ends_when_it_is_stopped_or_left(how):
    ended, stop = [], threading.Event()

    def work(say):
        try:
            while True:
                say(0)
        except Stopped:
            ended.append(True)
            raise

    found = reports(work, stop)
    assert next(found) == 0
    if how == "stop":
        stop.set()
        with pytest.raises(Stopped):
            for _ in found:
                pass
    found.close()
    assert ended == [True]


def test_a_stopped_run_leaves_the_studio_usable(studio):
    stop = threading.Event()
    with pytest.raises(Stopped):
        for report in reports(lambda say: studio.generate(replace(WISH, steps=500), say), stop):
            assert isinstance(report, Progress)
            stop.set()
    assert studio.generate(WISH).file.is_file()


def test_a_stopped_comparison_leaves_no_clip(studio):
    stop = threading.Event()
    with pytest.raises(Stopped):
        for report in reports(lambda say: studio.compare(replace(WISH, steps=300), "fp32", say), stop):
            if report.bundle == "sqs" and report.done:
                stop.set()
    assert [*studio.folder.iterdir()] == []


# -------------------- what it needs


def test_it_needs_no_build_extra_and_computes_without_gradio():
    code = "import dit_trt.tooling.studio.takes, dit_trt.tooling.studio.shown"
    finished = python(code, without=("torch", "onnx", "onnxscript", "polygraphy", "gradio"))
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("content", [b"no sound", b""])
def test_a_bad_recording_is_named_as_the_page_knows_it(tmp_path, content):
    from dit_trt.tooling.studio.takes import _read

    path = tmp_path / "voice.wav"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        _read(path, None)
    assert str(error.value).startswith("the recording voice.wav cannot be read as sound (")
    assert str(tmp_path) not in str(error.value)


def test_a_recording_is_begun_from(oobleck_bundle, tmp_path):
    sound = tmp_path / "in.wav"
    write_wav(sound, np.sin(np.arange(9000, dtype=np.float32) / 5)[None], 8000)
    studio = Studio(tmp_path / "clips", str(oobleck_bundle.folder))
    name = next(iter(studio.bundles()))
    said = []
    take = studio.generate(Wish("dog", name, 1.0, 4, 5.0, 3, init_audio=sound, init_noise_level=2.0), said.append)
    invoke("run", "dog", "--bundle", name, "--seconds", 1, "--steps", 4, "--cfg", 5, "--seed", 3,
           "--init-audio", sound, "--init-noise-level", 2, "--output", tmp_path / "run.wav")  # fmt: skip
    assert take.file.read_bytes() == (tmp_path / "run.wav").read_bytes()
    assert any(report.picture for report in said)
    assert Pipeline(oobleck_bundle).max_seconds > 1
