"""README.md keeps its word: every command line in it is run, here or by `.ci/run`, which takes it from its text."""

import argparse
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import readme
import soundfile
from commands import invoke
from readme import ROOT

from dit_trt.tooling.cli import COMMANDS, main

README = readme.README.read_text("utf-8")
CI = (ROOT / ".ci" / "run").read_text("utf-8")
# What `.ci/run` takes from README.md and runs as it stands.
RUN_BY_CI = [*readme.product(), readme.set_up("build"), readme.set_up("dev")]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/demo/README.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


# -------------------- what the code blocks say


def test_every_command_of_the_readme_is_run():
    """A new command line must be one that `.ci/run` takes up by itself, or be added where it is run."""
    assert [line for line in readme.commands(README) if line not in RUN_BY_CI] == []
    assert len(set(RUN_BY_CI)) == len(RUN_BY_CI)


@pytest.mark.parametrize("which", readme.WHICH)
def test_ci_takes_the_commands_from_the_readme(which):
    lines = [line.split("#")[0] for line in CI.splitlines()]
    assert any(re.search(rf"\breadme {which}\b", line) for line in lines), f".ci/run does not run `readme {which}`"


def test_the_commands_are_those_that_a_newcomer_needs():
    build, run, diff, *_ = readme.product()
    assert shlex.split(build)[:2] == ["dit-trt", "build"]
    assert shlex.split(run)[:2] == ["dit-trt", "run"]
    assert shlex.split(diff)[:2] == ["dit-trt", "diff"]
    assert readme.set_up("build").endswith(f"{build} && {run}")  # one command from a clone to a sound
    assert readme.set_up("dev").endswith(" && python -m pytest -n 2 --dist loadfile")


def test_the_first_sound(newcomer):
    """The first screen's build and run; `.ci/run` runs its diff, half a minute of work, as well."""
    invoke(*shlex.split(readme.product()[1])[1:])
    audio, rate = soundfile.read(newcomer / "dog-barking-1000.wav", dtype="int16")
    assert rate == 44100
    assert np.abs(audio).max() == 32767


def test_python_snippets(newcomer):
    snippets = [block for block in readme.blocks(README) if readme.is_python(block)]
    assert snippets
    for snippet in snippets:
        names = {}
        exec("\n".join(snippet), names)
        assert names["audio"].dtype == np.float32
        assert names["audio"].shape == (2, 2 * 44100)
        assert np.abs(names["audio"]).max() == 1
        assert names["sample_rate"] == 44100


# -------------------- what the text says by the way


def test_every_install_command_is_one_that_ci_runs():
    """Inline `pip install ...` of the prose and the tables."""
    steps = {step.strip() for line in RUN_BY_CI for step in line.split("&&")}
    alone = "pip install -e ."  # `.ci/run` installs the wheel so, without an extra, and makes a clip with it
    found = [span for span in readme.spans(README) if span.startswith(("pip ", "python "))]
    assert found
    assert set(found) - steps - {alone} == set()


def parse(line):
    """Parse a `dit-trt` command line as click does, without running it. Raises click.UsageError."""
    words = shlex.split(line)
    assert words[0] == "dit-trt"
    if len(words) == 1:
        return
    name = words[1]
    command = main.get_command(click.Context(main), name)
    if command is None:
        raise click.UsageError(f"no command {name}")
    positional = [parameter for parameter in command.params if parameter.required]
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(name, words[2:] or ["SOMETHING"] * len(positional))  # the prose may name a command alone


def dit_trt_lines(page):
    text = page.read_text("utf-8")
    if page.suffix == ".py":
        return [line.split(" #")[0].strip() for line in text.splitlines() if line.startswith("    dit-trt ")]
    steps = [step.strip() for line in readme.commands(text) for step in line.split("&&")]
    return [step for step in (*steps, *readme.spans(text)) if step == "dit-trt" or step.startswith("dit-trt ")]


def test_every_dit_trt_line_of_every_page_parses():
    seen = 0
    for page in PAGES:
        for line in dit_trt_lines(page):
            try:
                parse(line)
            except click.ClickException as error:
                pytest.fail(f"{page.name}: `{line}`: {error.format_message()}")
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("line", ["dit-trt biuld", "dit-trt build --methd sqs", "dit-trt run --steps many dog"])
def test_a_wrong_line_does_not_parse(line):
    with pytest.raises(click.UsageError):
        parse(line)


def test_the_table_of_commands_names_options_that_exist():
    rows = re.findall(r"^\| `dit-trt (\w+)[^`]*` \| (.*) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} <= set(COMMANDS)
    assert {"build", "run", "diff"} <= {name for name, _ in rows}
    for name, cell in rows:
        command = main.get_command(click.Context(main), name)
        known = {option for parameter in command.params for option in parameter.opts}
        named = set(re.findall(r"--[a-z0-9][a-z0-9-]*", cell))
        assert named or not {option for option in known if option.startswith("--")} - {"--json", "--debug"}, name
        assert named - known == set(), name


class Asked(Exception):
    """A module's argparse parser, about to parse."""


def options_of(name, words):
    """What a module's command line takes, of its own parser: click's (words may name a subcommand) or argparse's."""
    module = importlib.import_module(f"dit_trt.{name}")
    if commands := [each for each in vars(module).values() if isinstance(each, click.Command)]:
        for group in [each for each in commands if isinstance(each, click.Group)]:
            commands = [group.commands[words[0]]]
        return {option for command in commands for parameter in command.params for option in parameter.opts}
    assert "parse_args()" in Path(module.__file__).read_text("utf-8"), f"{name} reads no arguments, and would run"

    def ask(parser, *args, **kwargs):
        raise Asked(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked) as asked:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", ask)
        module.main()
    return set(asked.value.args[0]._option_string_actions)


def test_modules_of_the_pages_take_the_options_shown():
    """`python -m dit_trt...` lines."""
    seen = 0
    for page in PAGES:
        if page.suffix == ".py":
            continue
        text = page.read_text("utf-8")
        for line in (*readme.commands(text), *readme.spans(text)):
            for module, rest in re.findall(r"python -m dit_trt\.([\w.]+)([^&]*)", line):
                rest = rest.partition(" -- ")[0]
                shown = set(re.findall(r"--[a-z0-9][a-z0-9-]*", rest))
                assert shown <= options_of(module, rest.split()), f"{page.name}: {line}"
                seen += 1
    assert seen > 10


def test_the_examples_named_are_there():
    for page in PAGES:
        for path in re.findall(r"examples/\w+\.py", page.read_text("utf-8")):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
