"""`examples/` as a user runs them: each in a process of its own, in an empty folder, with the demo model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from readme import ROOT

import dit_trt

EXAMPLES = ROOT / "examples"


def run(name, *arguments, code=0):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def pcm(audio):
    return np.rint(audio.T * 32767).astype(np.int16)


def read(path):
    audio, rate = soundfile.read(path, dtype="int16")
    assert rate == 44100
    return audio


def test_every_example_is_tested_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names, EXAMPLES
    assert names <= tested
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) < 60, path.name


def test_generate(newcomer):
    finished = run("generate", "dog barking", "rain")
    assert finished.stdout.splitlines() == [
        "clip-1000.wav: dog barking, 352800 bytes of PCM at 44100 Hz",
        "clip-1001.wav: rain, 352800 bytes of PCM at 44100 Hz",
    ]
    assert finished.stderr.count("step 0 of 100") == 2
    assert "clip 2 of 2, step 100 of 100\n" in finished.stderr
    expected, _ = dit_trt.Pipeline.open()("rain", seconds=2, seed=1001)
    np.testing.assert_array_equal(read("clip-1001.wav"), pcm(expected))


def test_batch(newcomer):
    prompts = newcomer / "prompts.txt"
    prompts.write_text("dog barking\n\nrain\n")
    assert run("batch", prompts, "clips", 1, 10).stdout == "2 clips in clips, 2 of them new\n"
    before = {path: path.stat().st_mtime_ns for path in (newcomer / "clips").glob("*.wav")}
    assert len(before) == 2
    lost = next(path for path in before if path.name.startswith("rain-1000-"))
    sound = read(lost)
    lost.unlink()

    prompts.write_text("a cow moos\nrain\ndog barking\n")  # in another order, and with one more
    assert run("batch", prompts, "clips", 1, 10).stdout == "3 clips in clips, 2 of them new\n"
    np.testing.assert_array_equal(read(lost), sound)
    kept = before.keys() - {lost}
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: before[path] for path in kept}

    pipeline = dit_trt.Pipeline.open()
    index = json.loads((newcomer / "clips" / "index.json").read_text())
    assert [(entry["prompt"], entry["seed"]) for entry in index] == [
        ("a cow moos", 1000),
        ("rain", 1000),
        ("dog barking", 1000),
    ]
    assert {(entry["steps"], entry["bundle"]) for entry in index} == {(10, pipeline.bundle.folder.name)}
    assert {newcomer / "clips" / entry["file"] for entry in index} == set((newcomer / "clips").glob("*.wav"))
    expected, _ = pipeline("rain", seed=1000, steps=10)
    np.testing.assert_array_equal(sound, pcm(expected))


def test_compare_bundles(newcomer):
    lines = run("compare_bundles", 3).stdout.splitlines()
    assert lines[0].startswith("bundles/sqs-0.5: 56 of 56 in int8, ")
    assert lines[1].startswith("bundles/sqs-0.95: 56 of 56 in int8, ")
    assert lines[2].split() == ["step", "alpha", "0.5", "alpha", "0.95"]
    table = np.array([[float(cell) for cell in line.split()] for line in lines[3:6]])
    assert table[:, 0].tolist() == [0, 1, 2]
    assert (table[:, 1:] < 1).any()
    assert (table[:, 1:] > 0.8).all()
    assert table[:, 2].min() > table[:, 1].min()  # what docs/demo.md says of the two
    for line, column in zip(lines[6:], (1, 2), strict=True):
        assert line.endswith(f"worst step {table[:, column].argmin()}, cosine {table[:, column].min():.4f}")
    assert dit_trt.Pipeline.open("bundles/fp32").bundle.manifest["recipe"]["method"] == "none"


def test_own_calibration_prompts(newcomer):
    prompts = newcomer / "prompts.txt"
    prompts.write_text("# mine\na dog barks\nrain on a roof\n")
    finished = run("own_calibration_prompts", prompts, 4)
    assert "calibrating with 2 prompts x 4 steps" in finished.stdout
    assert finished.stdout.endswith("own-calibration.wav: a dog barks\n")
    pipeline = dit_trt.Pipeline.open("own-calibration")
    calibration = pipeline.bundle.manifest["calibration"]
    assert calibration["prompts"] == ["a dog barks", "rain on a roof"]
    assert calibration["settings"]["steps"] == 4
    expected, _ = pipeline("a dog barks", seconds=2)
    np.testing.assert_array_equal(read("own-calibration.wav"), pcm(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "Error: the prompt is empty"),
        (["own_calibration_prompts", "nowhere.txt"], "Error: no prompt file nowhere.txt"),
        (["compare_bundles", 0], "Error: steps 0 is outside 1..1000"),
        (["batch"], "A folder of clips from a text file"),
    ],
)
def test_a_mistake_is_one_line(newcomer, arguments, message):
    assert run(*arguments, code=1).stderr.startswith(message)
