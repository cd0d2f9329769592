"""`dit-trt analyze` as a person and a script meet it: figures, a report that stands alone, numbers, mistakes."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
import soundfile
from commands import error_of, files_in, invoke, one_object

from dit_trt.engines.bundle import Bundle
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.tooling.fidelity import Forced, compare_velocities, trajectory
from dit_trt.tooling.figures.folder import INDEX
from dit_trt.tooling.tables import Calibration

PROMPT = 'a dog <script>alert("x")</script> & rain'
FIGURES = ("activations", "layer-errors", "ranges", "smoothing", "velocity")
FILES = sorted([INDEX, "report.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))])
QUICK = ("--steps", "6", "--steps-sampled", "3")
FF2 = "transformer.layers.1.ff.ff.2"


class Page(HTMLParser):
    """What a report holds; every element must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.sources += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def written(tiny_sqs: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("analysis") / "out"
    arguments = ("--prompt", PROMPT, "--step", 2, *QUICK, "--output", folder, "--json")
    result = invoke("analyze", tiny_sqs.folder, *arguments)
    assert "simulating every Linear 3/3" in result.stderr
    return folder, one_object(result.stdout)


@pytest.fixture(scope="module")
def page(written: tuple[Path, dict]) -> Page:
    return Page((written[0] / "report.html").read_text("utf-8"))


# -------------------- the files


def test_all_files_are_there_and_named(written: tuple[Path, dict]) -> None:
    folder, value = written
    assert files_in(folder) == FILES
    assert sorted(value["files"]) == [str(folder / name) for name in FILES]
    assert value["report"] == str(folder / "report.html")
    assert sorted([*json.loads((folder / INDEX).read_text())["files"], INDEX]) == FILES
    assert files_in(folder.parent) == ["out", *(f"out/{name}" for name in FILES)]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_picture(written: tuple[Path, dict], name: str) -> None:
    with PIL.Image.open(written[0] / f"{name}.png") as picture:
        picture.load()
        assert picture.width == 1152
        assert len(picture.convert("L").getcolors(256) or range(257)) > 20
    root = ElementTree.parse(written[0] / f"{name}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
    assert links
    assert {link[:1] for link in links} <= {"#", "d"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_the_same_command_writes_the_same_bytes(written: tuple[Path, dict], tiny_sqs: Bundle) -> None:
    folder, _ = written
    before = {name: (folder / name).read_bytes() for name in FILES}
    invoke("analyze", tiny_sqs.folder, "--prompt", PROMPT, "--step", 2, *QUICK, "--output", folder)
    assert [name for name in FILES if (folder / name).read_bytes() != before[name]] == []


# -------------------- the report


def test_the_report_asks_nothing_of_anybody(written: tuple[Path, dict], page: Page) -> None:
    text = (written[0] / "report.html").read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"url\(|@import|<script|<link|<iframe", text)
    assert "default-src 'none'" in text
    assert [tag for tag, _ in page.sources] == ["audio", "audio", *["img"] * len(FIGURES)]
    assert all(source.startswith("data:") for _, source in page.sources)
    assert '<meta name="viewport" content="width=device-width' in text


def test_the_report_says_what_was_given_to_the_letter(page: Page, tiny_sqs: Bundle) -> None:
    words = "".join(page.words)
    assert PROMPT in words
    assert tiny_sqs.folder.name in words
    assert "script" not in page.tags
    for kind in ("self_attn.to_qkv", "cross_attn.to_kv", "ff.ff.2"):
        assert kind in words
    assert page.tags.count("table") == 4
    assert page.tags.count("figcaption") == len(FIGURES)


def test_the_tables_are_the_numbers(written: tuple[Path, dict], page: Page, tiny_sqs: Bundle) -> None:
    _, value = written
    _, ranges, worst, sizes = page.tables
    growths = ["-" if row["growth"] is None else f"{row['growth']:.2f}" for row in value["ranges"]]
    assert [(row[0], row[3]) for row in ranges[1:]] == list(zip([row["kind"] for row in value["ranges"]], growths))
    layers = [(row["name"], f"{100 * row['relative_error']:.2f} %", str(row["worst_step"])) for row in value["layers"]]
    assert [tuple(row) for row in worst[1:]] == layers[:10]
    assert sizes[-1] == ["all", sizes[-1][1], f"{tiny_sqs.size_bytes / 1e6:.2f}"]


def test_what_the_report_shows_is_what_lies_beside_it(written: tuple[Path, dict], page: Page) -> None:
    contents = [_decoded(source) for tag, source in page.sources if tag == "img"]
    files = {(written[0] / name).read_bytes(): name for name in FILES}
    found = [files[content] for content in contents]
    assert found == ["activations.png", "ranges.svg", "smoothing.svg", "layer-errors.svg", "velocity.svg"]


def test_the_clips_are_those_of_run(page: Page, tiny_sqs: Bundle, tiny_float: Bundle) -> None:
    players = [_decoded(source) for tag, source in page.sources if tag == "audio"]
    for content, bundle in zip(players, (tiny_float, tiny_sqs), strict=True):
        found, rate = soundfile.read(BytesIO(content), dtype="float32")
        expected, expected_rate = Pipeline(bundle)(PROMPT, steps=6)
        assert (rate, found.shape) == (expected_rate, expected.T.shape)
        assert np.corrcoef(found.ravel(), expected.T.ravel())[0, 1] > 0.999


def _decoded(source: str) -> bytes:
    return base64.b64decode(source.partition("base64,")[2], validate=True)


# -------------------- the numbers


def test_the_numbers_are_the_tables(written: tuple[Path, dict], tiny_table: Calibration, tiny_sqs: Bundle) -> None:
    _, value = written
    absmax = tiny_table.absmax[FF2]
    assert value["linear"] == FF2
    assert value["range"]["growth"] == pytest.approx(absmax[-1].max() / absmax[0].max())
    growths = [tiny_table.absmax[FF2.replace("1", str(block), 1)].max(axis=1) for block in (0, 1)]
    [row] = [row for row in value["ranges"] if row["kind"] == "ff.ff.2"]
    assert row["growth"] == pytest.approx(np.median([one[-1] / one[0] for one in growths]))
    assert [row["growth"] for row in value["ranges"] if row["kind"] == "cross_attn.to_kv"] == [None]
    channels = absmax.max(axis=0)
    assert value["smoothing"]["x_before"] == pytest.approx(channels.max() / np.median(channels))
    assert value["smoothing"]["x_after"] < value["smoothing"]["x_before"]
    assert value["smoothing"]["w_after"] > value["smoothing"]["w_before"]
    assert len(value["layers"]) == 14
    errors = [row["relative_error"] for row in value["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert (value["activation"]["tokens"], value["activation"]["channels"]) == (25, 256)


def test_the_velocity_is_compared_on_fp32s_trajectory(
    written: tuple[Path, dict], tiny_sqs: Bundle, tiny_float: Bundle
) -> None:
    _, value = written
    exact, ours = Pipeline(tiny_float), Pipeline(tiny_sqs)
    settings, seconds = ours.settings(steps=6), exact.check_seconds(None)
    xs, velocities = trajectory(exact, exact.condition(PROMPT, settings, seconds), settings)
    forced = Forced(ours, ours.condition(PROMPT, settings, seconds), settings.cfg_scale)
    cosine, error = np.array([compare_velocities(v, forced(x, i)) for i, (x, v) in enumerate(zip(xs, velocities))]).T
    found = value["velocity"]
    assert found["worst_step_cosine"] == pytest.approx(cosine.min(), abs=1e-3)
    assert found["worst_step"] == cosine.argmin()
    assert found["mean_relative_error"] == pytest.approx(error.mean(), rel=0.02)


# -------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--step", "6"], "--step 6 is outside 0..5, the steps of this run", 1),
        (["--step", "-1"], "--step -1 is outside 0..5", 1),
        (["--block", "2"], "--block 2 is outside 0..1, the blocks of ", 1),
        (["--linear", "ff"], "no Linear 'ff' in a block (one of: self_attn.to_qkv, self_attn.to_out, ", 1),
        (["--prompt", " "], "the prompt is empty", 2),
        (["--steps", "0"], "steps 0 is outside 1..1000", 2),
        (["--output", "file"], "file is a file; give --output a folder", 1),
        (["--output", "file/out"], "cannot write into ", 1),
        (["--output", "."], ". holds file, which is of no analysis; choose another --output", 1),
    ],
)
def test_mistakes_are_one_line(
    tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert said in error_of("analyze", tiny_sqs.folder, *QUICK, *arguments, code=code)
    assert files_in(tmp_path) == ["file"]


def test_an_fp32_bundle_has_nothing_to_compare(tiny_float: Bundle, tmp_path: Path) -> None:
    said = error_of("analyze", tiny_float.folder, "--output", tmp_path / "out")
    assert said == f"Error: {tiny_float.folder.name} is FP32: there is nothing to compare; name a quantized bundle"


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_trt.tooling.plots.find_spec", lambda name: None)
    assert "figures need the package matplotlib, which comes with the plot extra" in error_of("analyze")


def test_a_failure_at_the_end_leaves_nothing(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_trt.tooling.figures.write.write_report", full)
    arguments = ("--steps", 2, "--no-audio", "--output", tmp_path / "deep" / "out")
    assert "No space left on device; choose another place" in error_of("analyze", tiny_sqs.folder, *arguments)
    assert files_in(tmp_path) == ["deep"]


def test_without_audio_and_of_a_linear_that_runs_once(
    tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--linear", "cross_attn.to_kv", "--block", 0, "--steps", 1, "--steps-sampled", 1, "--no-audio")
    result = invoke("analyze", tiny_sqs.folder, *arguments)
    target = f"{tiny_sqs.folder.name}-analysis-cross_attn.to_kv-block-0"  # another look does not replace this one
    assert sorted(Path(line).name for line in result.stdout.splitlines()) == FILES
    page = Page((tmp_path / target / "report.html").read_text("utf-8"))
    assert "audio" not in page.tags
    assert "transformer.layers.0.cross_attn.to_kv, once a prompt" in "".join(page.words)
