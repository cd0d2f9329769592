"""Measured from outside: phases, peaks and errors of known programs; contenders compute the same step, by turns."""

import gc
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from processes import python

from dit_trt.engines.errors import UserError
from dit_trt.engines.openvino import has_bf16
from dit_trt.tooling import step_contest
from dit_trt.tooling.full_size import measured_table
from dit_trt.tooling.process_memory import Measured, Phase, measure, memory_of
from dit_trt.tooling.step_contest import BASELINE, Child, Contender, Task, contest_table, run_contest
from dit_trt.tooling.workflow import unwatched

MEGA = 1_000_000
PROGRAM = """
import mmap, sys, time
def say(text):
    print(text, file=sys.stderr, flush=True)
say("small")
time.sleep(0.4)
say("large")
block = bytearray(b"x") * 200_000_000
time.sleep(0.4)
del block
for i in range(4):
    say(f"counting {i}/3" + (", about 1 s left" if i else ""))
    time.sleep(0.1)
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
say("mapped")
total = sum(mapped[i] for i in range(0, len(mapped), 4096))
time.sleep(0.4)
say("spinning")
end = time.process_time() + 0.5
while time.process_time() < end:
    pass
print("on stdout")
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "mapped"
    path.write_bytes(bytes(100 * MEGA))
    lines = []
    return measure([sys.executable, "-c", PROGRAM, str(path)], lines.append), lines


def test_phases_begin_with_lines_and_progress_is_one(measured):
    result, lines = measured
    assert [phase.name for phase in result.phases] == ["start", "small", "large", "counting", "mapped", "spinning"]
    assert lines[:3] == ["small", "large", "counting 0/3"]
    assert len(lines) == 8
    seconds = {phase.name: phase.seconds for phase in result.phases}
    assert all(seconds[name] > 0.3 for name in ("small", "large", "counting", "mapped", "spinning"))
    assert sum(seconds.values()) == pytest.approx(result.seconds)
    assert 0.5 < result.user_seconds + result.system_seconds < result.seconds + 0.5


def test_memory_belongs_to_its_phase_and_kind(measured):
    result, _ = measured
    phases = {phase.name: phase for phase in result.phases}
    small = phases["small"].rss_anon
    assert 0 < small < 100 * MEGA
    assert phases["large"].rss_anon - small == pytest.approx(200 * MEGA, rel=0.05)
    assert abs(phases["spinning"].rss_anon - small) < 20 * MEGA
    assert phases["mapped"].rss_file - phases["small"].rss_file == pytest.approx(100 * MEGA, rel=0.05)
    large = phases["large"]
    assert large.rss == large.rss_anon + large.rss_file
    assert result.peak_rss == pytest.approx(large.rss, rel=0.05)


def test_a_short_phase_has_a_sample():
    code = "import sys; print('one', file=sys.stderr, flush=True); print('two', file=sys.stderr, flush=True)\ninput"
    result = measure([sys.executable, "-c", code + "\nimport time; time.sleep(0.2)"])
    assert [phase.name for phase in result.phases] == ["start", "one", "two"]
    assert all(phase.rss_anon > 0 for phase in result.phases)


def test_a_small_parent_gets_the_kernels_own_maximum(tmp_path):
    """From a process smaller than its child; from a larger one, as here, the child's maximum would be the parent's."""
    code = """
import sys
from dit_trt.tooling.process_memory import measure
inner = "import resource; block = bytearray(b'x') * 100_000_000; "
inner += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)"
print(measure([sys.executable, "-c", inner]).peak_rss)
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == pytest.approx(1024 * int(finished.stderr), rel=0.02)
    large = np.ones(60 * MEGA)  # 480 MB
    result = measure([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert result.peak_rss < 100 * MEGA < large.nbytes


def test_own_memory_grows_by_what_is_allocated():
    gc.collect()  # what other tests left could go between the two
    grown = []
    for _ in range(5):  # the system may take cold pages back between the two as well
        before = memory_of()
        block = np.ones(20 * MEGA)
        now = memory_of()
        grown.append(now.rss_anon - before.rss_anon)
        if grown[-1] == pytest.approx(block.nbytes, rel=0.1):
            break
        del block
    else:
        pytest.fail(f"it grew by {grown}")
    assert now.peak_rss >= now.rss_anon + now.rss_file > before.rss_anon
    assert memory_of(2**22 + 1) is None  # above the largest process id


def test_a_failing_command_is_one_line():
    with pytest.raises(UserError, match=r"-c .* ended with 3: the reason") as error:
        measure([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no-such-program cannot be started"):
        measure(["no-such-program"])


def test_the_environment_is_ours_with_changes():
    code = "import os, sys; print(os.environ['ONE'], 'PATH' in os.environ, file=sys.stderr)"
    result = measure([sys.executable, "-c", code], environment={"ONE": "1"})
    assert result.phases[-1].name == "1 True"


def test_the_table_of_a_build():
    phases = (Phase("start", 1.0, 3 * MEGA, 1 * MEGA, 2 * MEGA), Phase("writing step.onnx", 2.0, 2_500 * MEGA, 0, 0))
    table = measured_table(Measured(("dit-trt", "a b"), 3.0, 2.5, 0.25, 2_600 * MEGA, phases))
    assert table.splitlines() == [
        "`dit-trt 'a b'`",
        "",
        "| phase | s | peak RSS | peak RssAnon | peak RssFile |",
        "|---|---|---|---|---|",
        "| start | 1.0 | 3 MB | 1 MB | 2 MB |",
        "| writing step.onnx | 2.0 | 2,500 MB | 0 MB | 0 MB |",
        "",
        "3.0 s; user 2.5 s, system 0.2 s; maximum resident set size 2,600 MB",
    ]


MODULE = "from dit_trt.tooling.full_size import commands; commands(prog_name='full_size')"


def test_a_build_is_measured_by_phase(tiny, tmp_path, home):
    report = tmp_path / "build.md"
    build = ["dit-trt", "build", "--model", str(tiny), "--method", "none", "--output", str(tmp_path / "bundle")]
    finished = python(MODULE, ["build", "--output", str(report), "--json", "--", *build])
    assert finished.returncode == 0, finished.stderr
    numbers = json.loads(finished.stdout)
    assert numbers == json.loads(report.with_suffix(".json").read_text())
    names = [phase["name"] for phase in numbers["phases"]]
    wanted = [f"writing {graph}.onnx" for graph in ("text", "conditioning", "step", "decoder")]
    assert [name for name in names if name.startswith("writing")] == wanted
    assert names[-1].startswith("compiling with openvino")
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert "| writing step.onnx |" in report.read_text()
    assert numbers["peak_rss"] >= 0.9 * max(phase["rss"] for phase in numbers["phases"])


def test_commands_refuse_in_one_line(tiny, tiny_sqs, tmp_path):
    report = str(tmp_path / "it.md")
    steps = ["steps", "--model", str(tiny), "--output", report]
    for arguments, words in (
        (["build", "--output", str(tmp_path / "nowhere" / "it.md"), "--", "true"], "cannot write"),
        (["build", "--output", report, "--", "false"], "false ended with 1: it said nothing"),
        ([*steps, "--bundle", str(tmp_path / "none")], "there is no folder"),
        ([*steps, "--bundle", str(tiny_sqs.folder), "--latents", "25"], "--latents 25 is more than this model's 24"),
        ([*steps, "--bundle", str(tiny_sqs.folder), "--step", "100"], "--step 100 is not one of --steps 100"),
        ([*steps, *2 * ["--bundle", str(tiny_sqs.folder)]], "two contenders are called tiny-sqs"),
    ):
        finished = python(MODULE, arguments)
        assert finished.returncode == 1
        assert finished.stdout == ""
        [line] = finished.stderr.splitlines()
        assert line.startswith("Error: ") and words in line
    assert list(tmp_path.iterdir()) == []


# -------------------- steps


TASK = Task("dog barking", 17, 0.5, 8, 4, 1, 1)


@pytest.fixture(scope="module")
def contest(tiny, tiny_float, tiny_sqs, tiny_grouped):
    named = {"float": tiny_float, "sqs": tiny_sqs, "grouped": tiny_grouped}
    contenders = [Contender(name, bundle.folder) for name, bundle in named.items()]
    return run_contest(str(tiny), contenders, TASK, 2, unwatched)


def test_all_compute_the_same_step(contest):
    """PyTorch makes its conditioning by itself: a float engine agrees to rounding."""
    assert [row.name for row in contest.rows] == [BASELINE, "float", "sqs", "grouped"]
    errors = {row.name: row.relative_error for row in contest.rows}
    assert errors[BASELINE] == 0
    assert errors["float"] < 1e-5
    assert 1e-3 < errors["sqs"] < 0.5
    assert errors["grouped"] > 1e-2  # by hand, it computes something else at every step


def test_times_ratios_and_memory(contest):
    base = contest.rows[0]
    for row in contest.rows:
        assert len(row.step_seconds) == len(row.ratios) == 2
        assert row.ratios == pytest.approx([a / b for a, b in zip(base.step_seconds, row.step_seconds)])
        assert row.open_seconds > row.first_seconds > 0
        for memory in (row.after_open, row.after_step):
            assert memory.rss_anon > 20 * MEGA
            assert memory.peak_rss >= 0.9 * (memory.rss_anon + memory.rss_file)
        assert row.after_step.peak_rss >= row.after_open.peak_rss
    assert base.ratios == (1, 1)


def test_the_table_of_a_contest(contest, tiny):
    lines = contest_table(contest).splitlines()
    assert lines[0].startswith("**tiny**: one step of 2 x 18 tokens (0.50 s of sound), step 4 of 8, 1 threads, 2 inter")
    assert [line.split("|")[1].strip() for line in lines[4:]] == [row.name for row in contest.rows]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_a_step_is_that_of_the_pipeline(tiny_sqs, tmp_path):
    """The child's velocity, at the model's own length, is what the sampling loop gets of the same input."""
    from dit_trt.runtime.pipeline import Pipeline, Settings

    pipeline, settings = Pipeline(tiny_sqs), Settings(steps=8)
    conditioning = pipeline.condition("rain", settings, 0.5)
    engine = pipeline.step_engine_for(conditioning)
    x = np.random.default_rng(0).standard_normal((2, *engine.latent_shape)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    with Child("it") as child:
        answer = child.ask(
            "open",
            kind="bundle",
            bundle=str(tiny_sqs.folder),
            precision=None,
            latents=x.shape[2],
            threads=1,
            steps=8,
            step=5,
            prompt="rain",
            seconds=0.5,
            x=str(tmp_path / "x.npy"),
            embeds=None,
        )
        assert answer["sigma"] == settings.sigmas[5]
        child.ask("step", velocity=str(tmp_path / "v.npy"))
        assert child.ask("quit") == {}
    expected = engine.run(conditioning, 5, x)["velocity"]
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-4 * np.abs(expected).max())


def test_a_contender_that_cannot_or_dies_is_named(tiny_sqs, tmp_path):
    with Child("somebody") as child:
        with pytest.raises(UserError, match=r"^somebody: .*no-such-folder"):
            child.ask("open", kind="bundle", bundle="/no-such-folder", precision=None)
        if not has_bf16():
            with pytest.raises(UserError, match="this CPU does not multiply bf16"):
                child.ask("open", kind="bundle", bundle=str(tiny_sqs.folder), precision="bf16")
        child._process.kill()
        with pytest.raises(UserError, match=r"somebody died at turn \(-9"):
            child.ask("turn")


def test_nobody_computes_out_of_turn_and_everybody_comes_first_once():
    order = []

    def asked(name):
        return SimpleNamespace(ask=lambda do: order.append(name) or {"seconds": float(len(order))})

    done = []
    seconds = step_contest._rounds({name: asked(name) for name in "abc"}, 3, done.append)
    assert "".join(order) == "abcbcacab"
    assert seconds == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert done == [1, 2, 3]


def test_contenders_as_they_are_written(tmp_path):
    (tmp_path / "b:c").mkdir()
    for text, name, precision in (
        (f"{tmp_path}/b:c", "b:c", None),
        (f"{tmp_path}/b:c:bf16", "b:c, bf16", "bf16"),
        (f"mine={tmp_path}/b:c:f32", "mine", "f32"),
    ):
        assert Contender.parse(text) == Contender(name, tmp_path / "b:c", precision)
    with pytest.raises(UserError, match=r"--bundle it=/nowhere:bf16: there is no folder /nowhere"):
        Contender.parse("it=/nowhere:bf16")
