"""What the page's fields become, and the command that says the same."""

import shlex
from pathlib import Path

import click
import pytest

from dit_trt.engines.errors import UserError
from dit_trt.tooling.cli import main
from dit_trt.tooling.studio.wish import Wish

GOOD = {"prompt": " dog barking ", "bundle": "b", "seed": "7"}


def parsed(wish):
    """The options of `dit-trt run` that its command gives."""
    words = shlex.split(wish.command)
    assert words[:2] == ["dit-trt", "run"]
    return main.get_command(click.Context(main), "run").make_context("run", words[2:]).params


def test_fields_may_be_numbers_or_text():
    wish = Wish.of_fields({**GOOD, "steps": 20.0, "seconds": "1.5", "cfg": 3, "negative_prompt": "  "})
    assert wish == Wish("dog barking", "b", 1.5, 20, 3.0, 7)


def test_an_empty_field_is_the_models_own():
    assert Wish.of_fields({**GOOD, "steps": None, "seconds": "", "init_audio": None}) == Wish(
        "dog barking", "b", seed=7
    )


def test_a_noise_level_without_a_recording_does_not_count():
    assert Wish.of_fields({**GOOD, "init_noise_level": "2"}).init_noise_level is None
    wish = Wish.of_fields({**GOOD, "init_noise_level": "2", "init_audio": "/x/in.wav"})
    assert (wish.init_audio, wish.init_noise_level) == (Path("/x/in.wav"), 2)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("seed", "1.5", "the seed '1.5' is no whole number; give one, for example 1000"),
        ("seed", "abc", "the seed 'abc' is no whole number; give one, for example 1000"),
        ("seed", " ", "the seed is empty; give a whole number, for example 1000"),
        ("seed", "9" * 5000, f"the seed '{'9' * 40}' is no whole number; give one, for example 1000"),
        ("steps", 2.5, "the steps '2.5' is no whole number; give one, for example 50"),
        ("seconds", "nan", "the length 'nan' is no number; give one, for example 2.5"),
        ("cfg", "much", "the guidance 'much' is no number; give one, for example 7"),
        ("prompt", "  ", 'the prompt is empty; say what to hear, for example "dog barking"'),
        ("bundle", None, "no bundle is chosen; choose one in the list"),
    ],
)
def test_a_field_that_makes_no_sense(field, value, fault):
    with pytest.raises(UserError) as error:
        Wish.of_fields({**GOOD, field: value})
    assert str(error.value) == fault


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError, match=r"the prompt is empty.*; the steps 'x'.*; the seed 'y'"):
        Wish.of_fields({"prompt": "", "bundle": "b", "steps": "x", "seed": "y"})


@pytest.mark.parametrize("prompt", ["dog barking", 'it\'s "$HOME" `ls` \\ ${1}', "-x", "--help", "Grüße 🐕"])
def test_the_command_is_the_wish(prompt):
    wish = Wish(
        prompt, "my bundle", 1.25, 20, 3.5, 2**63 - 1, "-rain & 'wind'", Path("/tmp/x/my voice.wav"), 0.7, "GPU.0"
    )
    found = parsed(wish)
    assert found["prompts"] == (prompt,)
    assert (found["bundle"], found["steps"], found["cfg"], found["seed"]) == ("my bundle", 20, 3.5, 2**63 - 1)
    assert found["device"] == "GPU.0"
    assert (found["seconds"], found["negative_prompt"]) == (1.25, "-rain & 'wind'")
    assert (found["init_audio"], found["init_noise_level"]) == ("my voice.wav", 0.7)


def test_the_command_leaves_out_what_was_not_asked_for():
    assert Wish("dog barking", "b").command == "dit-trt run --bundle=b --seed=1000 'dog barking'"
