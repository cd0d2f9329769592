"""Shell completion: through click's own interface, and in a real bash with the script that is printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from commands import error_of, invoke, one_object
from processes import COMMAND, python

from dit_trt.engines.base import BACKENDS
from dit_trt.engines.bundle import Bundle
from dit_trt.runtime.samplers import SAMPLERS
from dit_trt.tooling.cli import COMMANDS, main
from dit_trt.tooling.cli.completion import PROGRAM, VARIABLE
from dit_trt.tooling.recipe import BITS, CFG_PAIRS, LAYER_BITS, LORA_FORMS, METHODS, ROUNDINGS, W4


def completed(*words: str) -> list[str]:
    """The plain values offered for the last of `words`."""
    items = ShellComplete(main, {}, PROGRAM, VARIABLE).get_completions([*words[:-1]], words[-1])
    return [item.value for item in items if item.type == "plain"]


def kinds(*words: str) -> set[str]:
    return {item.type for item in ShellComplete(main, {}, PROGRAM, VARIABLE).get_completions([*words[:-1]], words[-1])}


@pytest.fixture
def bundles(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    for name in ("tiny-a", "tiny-b", "other"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
        shutil.copyfile(tiny_sqs.folder / "manifest.json", tmp_path / "bundles" / name / "manifest.json")
    (tmp_path / "bundles" / "tiny-no-bundle").mkdir()
    shutil.copytree(tmp_path / "bundles" / "other", tmp_path / "bundles" / ".tiny-work")


def test_commands() -> None:
    assert completed("") == [*COMMANDS]
    assert completed("in") == ["inspect"]
    assert "--version" in completed("--")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["build", "--method", ""], [*METHODS]),
        (["build", "--method", "s"], [name for name in METHODS if name.startswith("s")]),
        (["build", "--bits", ""], [*BITS]),
        (["build", "--bits-for", "ff.*=w"], ["ff.*=w8a8", "ff.*=w7a8", "ff.*=w4a8"]),
        (["build", "--bits-for", "ff.ff.2="], [f"ff.ff.2={bits}" for bits in LAYER_BITS]),
        (["build", "--alpha", ""], ["auto"]),
        (["build", "--sqd-weights", ""], ["shared", "requantize", "grouped:"]),
        (["build", "--cfg-pair", ""], [*CFG_PAIRS]),
        (["build", "--lora-form", ""], [*LORA_FORMS]),
        (["build", "--w4", ""], [*W4]),
        (["build", "--group-size", ""], ["channel"]),
        (["build", "--rounding", ""], [*ROUNDINGS]),
        (["build", "--no-"], ["--no-smoothing", "--no-clip"]),
        (["build", "--backend", ""], ["auto", *BACKENDS]),
        (["build", "--model", ""], ["demo"]),
        (["run", "rain", "--sampler", "dpmpp-2"], [name for name in SAMPLERS if name.startswith("dpmpp-2")]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["build", "--dr"], ["--dry-run"]),
        (["list", "--j"], ["--json"]),
    ],
)
def test_options_and_choices(words: list[str], expected: list[str]) -> None:
    assert completed(*words) == expected
    assert expected


@pytest.mark.parametrize(
    "words", [["run", "rain", "--bundle"], ["diff"], ["diff", "--against"], ["inspect"], ["listen"]]
)
def test_bundles_are_offered_by_name_and_as_folders(bundles: None, words: list[str]) -> None:
    assert completed(*words, "") == ["other", "tiny-a", "tiny-b"]
    assert completed(*words, "t") == ["tiny-a", "tiny-b"]
    assert "dir" in kinds(*words, "./somewhere/")


def test_files_are_the_shells() -> None:
    assert kinds("build", "--recipe", "") == kinds("build", "--prompts", "") == kinds("run", "--output", "") == {"file"}
    assert kinds("build", "--output", "") == {"dir"}


def test_without_a_home_there_is_nothing_to_offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "nowhere"))
    assert completed("inspect", "") == []


# -------------------- the script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_this_program(shell: str) -> None:
    printed = invoke("completion", shell).stdout
    assert f"{VARIABLE}={shell}_complete" in printed
    value = one_object(invoke("completion", shell, "--json").stdout)
    assert value == {"shell": shell, "script": value["script"]}
    assert printed.strip() == value["script"].strip()


def test_the_shell_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert invoke("completion").stdout == invoke("completion", "fish").stdout
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "no completion for the shell 'tcsh' (one of: bash, zsh, fish)" in error_of("completion", code=2)
    monkeypatch.delenv("SHELL")
    assert "name the shell (one of: bash, zsh, fish)" in error_of("completion", code=2)
    assert "no completion for the shell 'csh'" in error_of("completion", "csh", code=2)


def test_in_a_real_bash(bundles: None, tmp_path: Path) -> None:
    """The script is sourced, its function called as bash does, and `dit-trt` asked in a process of its own."""
    program = tmp_path / "bin" / PROGRAM
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{COMMAND}" "$@"\n')
    program.chmod(0o755)
    script = tmp_path / "completion.bash"
    script.write_text(invoke("completion", "bash").stdout)
    press_tab = f"""
source "{script}"
COMP_WORDS=(dit-trt inspect ti) COMP_CWORD=2
_dit_trt_completion dit-trt
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p dit-trt
"""
    finished = subprocess.run(
        ["bash", "-c", press_tab],
        env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *offered, registered = finished.stdout.splitlines()
    assert offered == ["tiny-a", "tiny-b"], finished.stderr
    assert "_dit_trt_completion" in registered


def test_a_tab_loads_nothing_heavy(bundles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "bash_complete")
    for words, word, expected in (("run --sampler ", 2, "dpmpp-2m"), ("run --bundle ", 2, "tiny-a"), ("", 0, "build")):
        monkeypatch.setenv("COMP_WORDS", f"{PROGRAM} {words}")
        monkeypatch.setenv("COMP_CWORD", str(word + 1))
        heavy = ("torch", "onnx", "onnxruntime", "openvino", "polygraphy", "tokenizers", "soundfile")
        finished = python(COMMAND, without=heavy)
        assert f"plain,{expected}" in finished.stdout.splitlines(), finished.stderr
