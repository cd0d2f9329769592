"""What a survey's page holds and what it keeps to itself; the key beside it."""

import base64
import io
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile
from bundles import refusal
from surveys import CAPTIONS, MODELS, RATE, sounds

from dit_trt.tooling.listening.survey import (
    KEY,
    PAGE,
    check_new,
    check_title,
    read_key,
    write_survey,
)
from dit_trt.tooling.loudness import TARGET, integrated_loudness


def data_of(page):
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="survey">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def heard(question):
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(question["audio"])), always_2d=True)
    assert rate == RATE
    return audio.T


@pytest.fixture(scope="module")
def asked(survey):
    """The page's questions, each with the model and caption id that the key has for it."""
    data = data_of(survey.page)
    key = read_key(survey.key)
    assert data["survey"] == key.survey == survey.id
    assert {question["id"] for question in data["questions"]} == key.questions.keys()
    return [(question, *key.questions[question["id"]]) for question in data["questions"]]


def test_every_caption_is_asked_with_every_model(asked):
    assert Counter((model, question["caption"]) for question, model, _ in asked) == Counter(
        (model, caption) for model in MODELS for caption in CAPTIONS
    )


def test_the_key_says_whose_clip_it_is(asked):
    """The loudest tone in each clip's spectrum is the one that `sounds` made for that model and caption."""
    for question, model, caption_id in asked:
        audio = heard(question)[0]
        peak = np.abs(np.fft.rfft(audio, RATE)).argmax()  # in Hz
        expected = 300 + 100 * (int(caption_id) - 1) + 40 * MODELS.index(model)
        assert peak == pytest.approx(expected, abs=3)


def test_all_clips_are_equally_loud(asked):
    for question, _, _ in asked:
        assert integrated_loudness(heard(question), RATE) == pytest.approx(TARGET, abs=0.05)


def test_the_page_does_not_tell_which_is_which(survey, asked):
    text = survey.page.read_text("utf-8")
    for word in (*MODELS, str(survey.page.parent), "dit_trt", "2026"):
        assert word not in re.sub(r'"audio": "[^"]*"', "", text), word
    sizes = defaultdict(set)
    for question, _, caption_id in asked:
        assert set(question) == {"id", "caption", "audio"}
        assert re.fullmatch("[0-9a-f]{8}", question["id"])
        sizes[caption_id].add(len(question["audio"]))
        assert b"libFLAC" not in base64.b64decode(question["audio"])
    assert [len(of_one_caption) for of_one_caption in sizes.values()] == [1] * len(CAPTIONS)
    order = [question["id"] for question, _, _ in asked]
    assert order == sorted(order)  # random ids in their own order


def test_ids_and_order_are_drawn_anew(tmp_path):
    """Nothing that a rater may know, such as the seed, leads to the order; it is random over surveys."""
    firsts = set()
    ids = set()
    for number in range(12):
        found = write_survey(sounds(0.05), MODELS, "T", tmp_path / str(number))
        questions = read_key(found.key).questions
        firsts.add(questions[min(questions)])
        ids |= questions.keys()
    assert len(firsts) > 3
    assert len(ids) == 12 * 15


def test_nothing_outside_is_named(survey):
    text = re.sub(r'"audio": "[^"]*"', "", survey.page.read_text("utf-8"))
    assert re.findall(r"https?:|src=|href=|@import|url\(", text) == []


def test_a_survey_is_never_replaced(survey, tmp_path):
    assert f"holds a survey already ({PAGE})" in refusal(check_new, survey.page.parent)
    (tmp_path / KEY).write_text("{}")
    assert f"holds a survey already ({KEY})" in refusal(check_new, tmp_path)
    assert "is a file" in refusal(check_new, tmp_path / KEY)
    check_new(tmp_path / "new")


def test_a_title_must_not_name_a_model():
    assert "names the model sqs-model" in refusal(check_title, "Is SQS-Model good?", MODELS)
    check_title("Listening test", MODELS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no key.json"),
        ("[]", "does not hold a JSON object"),
        ("{}", "not the key of a listening test"),
        ('{"format": "dit-trt-listening-key", "version": 2}', "not the key of a listening test"),
        ('{"format": "dit-trt-listening-key", "version": 1, "questions": 3}', "not the key of a listening test"),
    ],
)
def test_a_file_that_is_no_key(tmp_path, content, said):
    if content is not None:
        (tmp_path / KEY).write_text(content)
    assert said in refusal(read_key, tmp_path / KEY)


def test_a_key_whose_models_are_not_its_questions(survey, tmp_path):
    content = json.loads(survey.key.read_text("utf-8"))
    content["models"].append("another")
    (tmp_path / KEY).write_text(json.dumps(content))
    assert "is damaged" in refusal(read_key, tmp_path / KEY)
