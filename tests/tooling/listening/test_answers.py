"""Raters' files: what counts, and the one line for each that does not."""

import pytest
from bundles import refusal
from surveys import write_answers

from dit_trt.tooling.listening.answers import read_answers
from dit_trt.tooling.listening.survey import Key

IDS = ["aa", "bb", "cc"]
KEY = Key("s1", "T", ["x", "y", "z"], dict(zip(IDS, [("x", "001"), ("y", "001"), ("z", "001")])))
WHOLE = dict.fromkeys(IDS, 3)


def write(folder, name="a.json", survey="s1", rater="Ada", ratings=WHOLE, **changes):
    return write_answers(folder / name, survey, rater, ratings, **changes)


def test_whole_and_incomplete_raters_count(tmp_path):
    write(tmp_path, "a.json")
    write(tmp_path, "b.json", rater="Bo", ratings={"bb": 5})
    (tmp_path / "key.json").write_text("not an answer")
    (tmp_path / "results.md").write_text("nor this")
    answers = read_answers(tmp_path, KEY)
    assert [(rater.name, rater.ratings) for rater in answers.raters] == [("Ada", WHOLE), ("Bo", {"bb": 5})]
    assert [rater.name for rater in answers.incomplete(KEY)] == ["Bo"]
    assert answers.refused == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"survey": "s2"}, "of another survey (s2), not of s1"),
        ({"survey": None}, "of another survey (None), not of s1"),
        ({"format": "x"}, "not the answers of a listening test"),
        ({"version": 2}, "not the answers of a listening test"),
        ({"rater": " "}, "lacks the rater"),
        ({"rater": 3}, "lacks the rater"),
        ({"saved": None}, "lacks the rater, the time"),
        ({"ratings": [3]}, "lacks the rater, the time or the ratings"),
        ({"ratings": {"dd": 3}}, "rates a question 'dd' that the survey does not have"),
        ({"ratings": {"aa": 0}}, "rates aa with 0, not with 1 to 5"),
        ({"ratings": {"aa": 6}}, "rates aa with 6, not with 1 to 5"),
        ({"ratings": {"aa": 3.5}}, "rates aa with 3.5, not"),
        ({"ratings": {"aa": 3.0}}, "rates aa with 3.0, not"),
        ({"ratings": {"aa": True}}, "rates aa with True, not"),
        ({"ratings": {"aa": "3"}}, "rates aa with '3', not"),
        ({"ratings": {"aa": None}}, "rates aa with None, not"),
        ({"ratings": {}}, "nothing is rated"),
    ],
)
def test_a_file_that_does_not_count(tmp_path, changes, reason):
    write(tmp_path, "a.json", rater="Bo")
    bad = write(tmp_path, "b.json", **changes)
    answers = read_answers(tmp_path, KEY)
    assert [rater.name for rater in answers.raters] == ["Bo"]
    ((file, said),) = answers.refused
    assert file == bad
    assert reason in said
    assert "\n" not in said


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b'{"ratings": ' + b"[" * 100_000])
def test_a_file_that_is_no_answer_at_all(tmp_path, content):
    write(tmp_path, "a.json")
    (tmp_path / "b.json").write_bytes(content)
    (tmp_path / "c.json").mkdir()
    answers = read_answers(tmp_path, KEY)
    assert [file.name for file, _ in answers.refused] == ["b.json", "c.json"]


@pytest.mark.parametrize("later", ["a.json", "b.json"])
def test_of_one_raters_files_the_last_saved_counts(tmp_path, later):
    earlier = "b.json" if later == "a.json" else "a.json"
    write(tmp_path, later, saved="2026-01-01T12:00:00Z", ratings={"aa": 5})
    write(tmp_path, earlier, saved="2026-01-01T11:00:00Z", ratings=WHOLE, rater=" Ada ")
    answers = read_answers(tmp_path, KEY)
    assert [rater.ratings for rater in answers.raters] == [{"aa": 5}]
    assert answers.refused == [
        (tmp_path / earlier, f"the rater 'Ada' is there twice; {later}, saved last, counts"),
    ]


def test_a_folder_without_answers(tmp_path):
    assert "no such folder" in refusal(read_answers, tmp_path / "nowhere", KEY)
    assert "holds no answers" in refusal(read_answers, tmp_path, KEY)
    write(tmp_path, survey="s2")
    assert "no file of" in refusal(read_answers, tmp_path, KEY)
    assert "a.json: of another survey" in refusal(read_answers, tmp_path, KEY)
