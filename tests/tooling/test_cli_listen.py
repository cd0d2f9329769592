"""`dit-trt listen`: two bundles become a page, made-up raters a table; and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import error_of, files_in, invoke, one_object
from processes import dit_trt
from surveys import MODELS, sounds, write_answers

from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.wav import write_wav
from dit_trt.tooling.batch.clips import INDEX as LIST
from dit_trt.tooling.listening.survey import read_key

QUICK = ("--steps", 2, "--seconds", 0.4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def clips(here):
    """A folder of clips as `--clips` takes it: three models, two captions."""
    for sound in sounds(0.1)[:6]:
        folder = here / "clips" / sound.model
        write_wav(folder / f"{sound.id}.wav", sound.audio, sound.sample_rate)
        line = {"id": sound.id, "caption": sound.caption, "seed": sound.seed, "file": f"{sound.id}.wav"}
        with (folder / LIST).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return here / "clips"


def edit(clips, model, change):
    path = clips / model / LIST
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -------------------- the whole loop


def test_from_two_bundles_to_a_table(tiny_float, tiny_sqs, here):
    """The float bundle gets a rating more than the quantized one of nearly every rater: it wins, and by that much."""
    prompts = here / "prompts.txt"
    prompts.write_text("rain\na dog barks\nwind\n")
    made = one_object(
        invoke(
            *("listen", tiny_float.folder, tiny_sqs.folder, "--prompts", prompts, "--num-prompts", 2),
            *(*QUICK, "--seed", 7, "--output", "out", "--json"),
        ).stdout
    )
    page, key_file = Path(made["page"]), Path(made["key"])
    assert made["models"] == ["tiny-float", "tiny-sqs"]
    assert made["questions"] == 4
    assert made["page_bytes"] == page.stat().st_size
    assert not {"tiny-float", "tiny-sqs"} & set(page.read_text("utf-8").replace('"', " ").split())
    key = read_key(key_file)
    assert key.survey == made["survey"]

    rng = np.random.default_rng(0)
    table = np.clip(rng.integers(2, 5, (9, 2))[None] + rng.integers(0, 2, (2, 9, 2)) + [[[1]], [[0]]], 1, 5)
    for rater in range(9):
        given = {
            name: int(table[key.models.index(model), rater, int(prompt) - 1])
            for name, (model, prompt) in key.questions.items()
        }
        if rater == 8:
            del given[max(given)]
        write_answers(here / "out" / "answers" / f"{rater}.json", key.survey, f"rater {rater}", given)
    (here / "out" / "answers" / "broken.json").write_text("{")

    result = invoke("listen", "--results", "out/answers", "--output", "report", "--json")
    found = one_object(result.stdout)
    assert "not counted: broken.json: not JSON" in result.stderr
    assert (found["raters"], found["incomplete"]) == (9, ["rater 8"])
    assert [Path(entry["file"]).name for entry in found["refused"]] == ["broken.json"]
    best, other = found["models"]
    assert (best["model"], best["ratings"] + other["ratings"]) == ("tiny-float", 35)
    assert best["mean"] > other["mean"] + 0.5
    assert other["difference_interval"][1] < 0

    missing = key.questions[max(key.questions)]
    values = table.astype(float)
    values[key.models.index(missing[0]), 8, int(missing[1]) - 1] = np.nan
    means, difference = bootstrap_by_loops(values)
    for score, one in zip((best, other), means):
        np.testing.assert_allclose(score["interval"], one, atol=0.08)
    np.testing.assert_allclose(other["difference_interval"], difference, atol=0.08)
    assert best["mean"] == pytest.approx(np.nanmean(values[0]))

    assert [Path(file).name for file in found["files"]] == ["results.md", "results.png", "results.svg"]
    report = (here / "report" / "results.md").read_text()
    assert f"| tiny-float | {best['mean']:.2f} | {best['interval'][0]:.2f} to {best['interval'][1]:.2f} |" in report
    assert "9 raters, 1 of them incomplete (rater 8), 35 ratings; 1 file not counted" in report
    assert "10,000 resamples of raters and of prompts" in report
    assert (here / "report" / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (here / "report" / "results.svg").read_text().startswith("<?xml")


def bootstrap_by_loops(values):
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(4000):
        rows, columns = rng.integers(9, size=9), rng.integers(2, size=2)
        drawn.append([np.nanmean([one[row, column] for row in rows for column in columns]) for one in values])
    drawn = np.array(drawn)
    return [np.percentile(one, [2.5, 97.5]) for one in drawn.T], np.percentile(drawn[:, 1] - drawn[:, 0], [2.5, 97.5])


def test_the_clips_are_those_of_run_and_can_be_taken_again(tiny_float, tiny_sqs, here):
    (here / "p.txt").write_text("rain\nwind\n")
    bundles = (tiny_sqs.folder, tiny_float.folder)
    invoke("listen", *bundles, "--prompts", "p.txt", "--num-prompts", 2, *QUICK, "--output", "out")
    for bundle in bundles:
        folder = here / "out" / "clips" / bundle.name
        lines = [json.loads(line) for line in (folder / LIST).read_text().splitlines()]
        assert [(line["caption"], line["seed"]) for line in lines] == [("rain", 1000), ("wind", 1001)]
        audio, _ = Pipeline.open(bundle)("wind", seconds=0.4, seed=1001, steps=2)
        kept, _ = soundfile.read(folder / lines[1]["file"], dtype="int16")
        np.testing.assert_array_equal(kept.T, np.rint(audio * 32767))
    result = invoke("listen", "--clips", "out/clips", "--output", "again", "--num-prompts", 1, "--json")
    again = one_object(result.stdout)
    assert (again["models"], again["questions"]) == (["tiny-float", "tiny-sqs"], 2)


def test_models_of_a_folder_of_clips_can_be_chosen(clips, here):
    made = one_object(invoke("listen", MODELS[2], MODELS[0], "--clips", "clips", "--num-prompts", 2, "--json").stdout)
    assert made["models"] == [MODELS[2], MODELS[0]]
    assert files_in(here / "listening-test") == ["key.json", "survey.html"]
    assert "holds a survey already" in error_of("listen", "--clips", "clips", "--num-prompts", 2)


def test_a_silent_clip_is_told(clips):
    soundfile.write(clips / MODELS[0] / "001.wav", np.zeros((4410, 2)), 44100)
    result = invoke("listen", "--clips", "clips", "--num-prompts", 2)
    notes = [line for line in result.stderr.splitlines() if "note" in line]
    assert notes == ["note: the clip 001 of float-model is silent"]


# -------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "compares two bundles or more"),
        (["one"], "compares two bundles or more"),
        (["--clips", "c", "--steps", "3"], "--clips takes clips that are there already; leave out --steps"),
        (["--key", "k"], "--key belongs to --results"),
        (["--results", "r", "a", "b"], "--results counts answers"),
        (["--results", "r", "--clips", "c"], "--results counts answers"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["a", "b", "--steps", "0"], "steps 0 is outside 1..1000"),
    ],
)
def test_wrong_use(here, arguments, said):
    assert said in error_of("listen", *arguments, code=2)
    assert files_in(here) == []


def test_bundles_that_cannot_be_compared(tiny_sqs, here):
    assert "no bundle" in error_of("listen", tiny_sqs.folder, "nope", *QUICK)
    assert "two of the bundles have one name" in error_of("listen", tiny_sqs.folder, tiny_sqs.folder, *QUICK)
    shutil.copytree(tiny_sqs.folder, here / "other")
    title = ("--title", "Is TINY-sqs good?")
    assert "names the model tiny-sqs" in error_of("listen", tiny_sqs.folder, "other", *QUICK, *title, code=2)
    assert "outside 0.1" in error_of("listen", tiny_sqs.folder, "other", "--seconds", 99)
    assert "use --num-prompts 1 to 8" in error_of("listen", tiny_sqs.folder, "other", "--num-prompts", 9)
    assert files_in(here / "listening-test") == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: shutil.rmtree(c), "no such folder"),
        (lambda c: [shutil.rmtree(c / model) for model in MODELS[1:]], "compares two models or more"),
        (lambda c: (c / MODELS[0] / LIST).write_text("{"), f"{LIST}, line 1: not a JSON object with id, caption"),
        (lambda c: (c / MODELS[0] / LIST).write_bytes(b"\xff"), "cannot be read: it is not UTF-8"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines[0].update(seed="1")), "line 1: not a JSON object"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines[1].update(id="001")), "line 2: the id 001 is there twice"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines[0].update(caption="x")), "of different captions or seeds"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines[0].update(seed=3)), "of different captions or seeds"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines.clear()), "no clip id is in every"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines.pop()), "use --num-prompts 1 to 1"),
        (lambda c: edit(c, MODELS[1], lambda lines: lines[0].update(sha256="0" * 64)), "is not the file that"),
        (lambda c: (c / MODELS[1] / "001.wav").unlink(), "001.wav cannot be read: No such file"),
        (lambda c: (c / MODELS[1] / "001.wav").write_bytes(b"RIFF"), "001.wav cannot be read as sound"),
        (lambda c: soundfile.write(c / MODELS[1] / "001.wav", np.zeros((99, 3)), 44100), "3 channels of 99 samples"),
        (
            lambda c: soundfile.write(c / MODELS[1] / "001.wav", np.zeros((99, 2)), 44100),
            "differ in length or",
        ),
        (lambda c: soundfile.write(c / MODELS[1] / "001.wav", np.zeros((99, 2)), 8000), "different sample rates"),
    ],
)
def test_clips_that_cannot_be_asked_about(clips, here, damage, said):
    damage(clips)
    assert said in error_of("listen", "--clips", "clips", "--num-prompts", 2, "--output", "out")
    assert not (here / "out").exists()


def test_a_model_that_is_not_there(clips):
    assert "has no fp32/clips.jsonl; it has: float-model" in error_of("listen", "fp32", MODELS[0], "--clips", "clips")


def test_results_without_a_key_or_answers(clips, here):
    invoke("listen", "--clips", "clips", "--num-prompts", 2, "--output", "out")
    assert "has no key.json: it is the key.json that dit-trt listen wrote" in error_of("listen", "--results", "clips")
    assert "holds no answers" in error_of("listen", "--results", "clips", "--key", "out/key.json")
    write_answers(here / "answers" / "a.json", "another", "Ada", {})
    assert "a.json: of another survey (another)" in error_of("listen", "--results", "answers", "--key", "out/key.json")
    assert files_in(here / "answers") == ["a.json"]


def test_results_need_no_engine_but_the_plot_extra(clips, here, monkeypatch):
    made = one_object(invoke("listen", "--clips", "clips", "--num-prompts", 2, "--output", "out", "--json").stdout)
    questions = read_key(Path(made["key"])).questions
    write_answers(here / "out" / "a.json", made["survey"], "Ada", dict.fromkeys(questions, 4))
    finished = dit_trt("listen", "--results", "out", without=("openvino", "torch", "onnx"))
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert lines[1].split()[:5] == ["float-model", "4.00", "4.00", "to", "4.00"]
    assert "1 rater, 6 ratings" in lines
    monkeypatch.setattr("dit_trt.tooling.plots.find_spec", lambda name: None)
    assert "comes with the plot extra" in error_of("listen", "--results", "out")
