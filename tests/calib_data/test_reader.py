"""Reading and choosing calibration prompts."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.calib_data import reader
from dit_trt.calib_data.reader import (
    Caption,
    ablation_prompts,
    choose_prompts,
    default_prompts,
    heldout_prompts,
    read_captions,
    read_prompts,
)
from dit_trt.engines.errors import UserError
from dit_trt.tooling.train_demo.corpus import CLASSES

SOUNDS = (
    *("dog", "cat", "cow", "rooster", "duck", "owl", "frog", "sheep", "pig", "horse", "rain", "thunder"),
    *("siren", "applau", "helicopter", "telephone", "waves", "engine", "speech", "footsteps", "door"),
)
HEADER = "audiocap_id,youtube_id,start_time,caption\n"


def refused(path):
    """The one-line message with which `read_prompts` refuses `path`."""
    with pytest.raises(UserError) as error:
        read_prompts(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# heading\r\nA dog barks\r\n\r\n  Wind, and rain # not a comment \r\nÉclat\n".encode())
    assert read_prompts(path) == ["A dog barks", "Wind, and rain # not a comment", "Éclat"]
    assert read_prompts(str(path)) == read_prompts(path)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_audiocaps_csv(tmp_path, bom):
    path = tmp_path / "test.CSV"
    path.write_text(
        bom + HEADER + '103549,7fmOlUlwoNg,0,"Constant rattling, then a ""clang"""\n\n103548,6BJ455B1aAs,10,Wind\n',
        encoding="utf-8",
    )
    assert read_prompts(path) == ['Constant rattling, then a "clang"', "Wind"]


def test_columns_may_come_in_any_order(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("caption,id\nRain,1\n")
    assert read_prompts(path) == ["Rain"]


def test_missing_file(tmp_path):
    assert "no prompt file" in refused(tmp_path / "none.txt")


def test_folder(tmp_path):
    assert "cannot read" in refused(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("a.txt", ""), ("a.txt", "# only\n\n"), ("a.csv", ""), ("a.csv", HEADER)])
def test_no_prompts(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert "holds no prompts" in refused(path)


def test_missing_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("audiocap_id,text\n1,Rain\n")
    message = refused(path)
    assert "'caption'" in message
    assert "audiocap_id, text" in message


def test_missing_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("103549,7fmOlUlwoNg,0,Wind blows\n")
    assert "no column 'caption'" in refused(path)


@pytest.mark.parametrize("row", ["1,b,0,\n", "1,b\n", '1,b,0,"  "\n'])
def test_a_row_without_caption_is_named(tmp_path, row):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "1,a,0,Rain\n" + row)
    assert "line 3" in refused(path)


def test_broken_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + '1,a,0,"Rain\n')
    assert "not valid CSV" in refused(path)


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_wrong_encoding(tmp_path, name):
    path = tmp_path / name
    path.write_bytes((HEADER + "1,a,0,Café\n").encode("latin-1"))
    assert "UTF-8" in refused(path)


def test_the_default_prompts():
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 50
    assert all(prompt.isascii() and 4 <= len(prompt.split()) <= 12 for prompt in prompts)
    text = " ".join(prompts).lower()
    missing = [sound for sound in SOUNDS if sound not in text]
    assert missing == []


@given(st.integers(1, 60), st.data())
def test_a_choice_is_a_seeded_subset_in_order(total, data):
    prompts = [f"prompt {i % 7}" for i in range(total)]  # duplicates count as often as they stand there
    count, seed = data.draw(st.integers(1, total)), data.draw(st.integers(0, 2**32))
    numbered = [f"{i} {prompt}" for i, prompt in enumerate(prompts)]
    chosen = choose_prompts(numbered, count, seed)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == [prompt for prompt in numbered if prompt in chosen]
    assert chosen == choose_prompts(numbered, count, seed)
    assert set(chosen) <= set(choose_prompts(numbered, total, seed))
    if count > 1:
        assert set(choose_prompts(numbered, count - 1, seed)) <= set(chosen)
    assert len(choose_prompts(prompts, count, seed)) == count


def test_seeds_differ_and_do_not_depend_on_the_machine():
    names = [str(i) for i in range(50)]
    assert choose_prompts(names, 50, 3) == names
    assert len({tuple(choose_prompts(names, 5, seed)) for seed in range(20)}) == 20
    assert choose_prompts(names, 5, 0) == ["15", "20", "36", "44", "46"]


def test_every_prompt_has_its_chance():
    names = [str(i) for i in range(10)]
    assert set().union(*(choose_prompts(names, 1, seed) for seed in range(200))) == set(names)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_than_there_are(count):
    with pytest.raises(UserError, match=f"cannot choose {count} of 3 prompts: use --num-prompts 1 to 3"):
        choose_prompts(["a", "b", "c"], count, 0)


def test_the_ablations_prompts_are_held_out():
    def normalised(prompts):
        return {" ".join(re.findall(r"\w+", prompt.lower())) for prompt in prompts}

    seen = normalised(default_prompts()) | normalised(heldout_prompts())
    others = read_prompts(Path(reader.__file__).with_name("other-sounds.txt"))
    for prompts, count in ((ablation_prompts(), 16), (others, 18)):
        assert len(normalised(prompts)) == len(prompts) == count
        assert normalised(prompts).isdisjoint(seen)
    assert len(CLASSES) == 16 + 18


def test_captions_have_ids(tmp_path):
    """AudioCaps' own columns, ours, and files without."""
    rows = "audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks nearby\n58146,x,0,Rain\n"
    (tmp_path / "audiocaps.csv").write_text(rows)
    assert read_captions(tmp_path / "audiocaps.csv") == [
        Caption("91139", "A woman talks nearby"),
        Caption("58146", "Rain"),
    ]
    (tmp_path / "ours.csv").write_text("caption,id,audiocap_id\nRain,r.1,7\n")
    assert read_captions(tmp_path / "ours.csv") == [Caption("r.1", "Rain")]
    (tmp_path / "plain.csv").write_text("caption\nRain\nSnow\n")
    (tmp_path / "lines.txt").write_text("# sounds\nRain\n\nSnow\n")
    for name in ("plain.csv", "lines.txt"):
        assert read_captions(tmp_path / name) == [Caption("0001", "Rain"), Caption("0002", "Snow")]
    (tmp_path / "numbers.jsonl").write_text('{"id": 91, "caption": "Rain"}\n{"id": "b", "caption": "Snow"}\n')
    assert read_captions(tmp_path / "numbers.jsonl") == [Caption("91", "Rain"), Caption("b", "Snow")]


def test_an_unquoted_comma_is_no_caption_cut_short(tmp_path):
    (tmp_path / "a.csv").write_text('caption,id\n"rain, wind",1\ndog, barking,2\n')
    with pytest.raises(
        UserError, match=r"a\.csv, line 3: more fields than columns; put captions that hold commas in quotes"
    ):
        read_captions(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.json", "a.TSV"])
def test_other_tables_are_not_read_as_lines(tmp_path, name):
    (tmp_path / name).write_text('[{"caption": "rain"}]')
    with pytest.raises(UserError, match="give JSON lines"):
        read_prompts(tmp_path / name)
