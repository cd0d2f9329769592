"""The page in a real browser, served by the real command, with the real demo model: real clicks and key presses."""

from __future__ import annotations

import http.client
import io
import re
import shlex
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import invoke
from studios import press, settled

from dit_trt.runtime.wav import write_wav
from dit_trt.tooling.clip_names import clip_name

QUICK = {"Prompt": "dog barking", "Steps": 8}
PICTURES = """() => {
    window.pictures = new Set();
    const look = () => document.querySelectorAll("#live img").forEach(image => window.pictures.add(image.src));
    new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


WEIRD = 'a dog\'s "bark" <b>${1+1}</b> ' + "verylongword" * 8


def check_it_fits_a_phone(page):
    for width in (320, 375):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for one in page.locator("#result img, #result audio, #result a, #result button, #result table").all():
            box = one.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


def ready(image):
    return image.evaluate("image => image.complete && image.naturalWidth")


def test_a_prompt_becomes_the_sound_that_the_copied_command_makes(visit, studio_home, tmp_path, monkeypatch):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(PICTURES)
    assert press(page, "Generate", Prompt=WEIRD, Seconds=1.5, Steps=60, Seed=7) == "Done."
    assert page.evaluate("window.pictures.size") >= 3  # it was seen while it came to be
    assert page.locator("#live img").count() == 0
    assert page.locator("#result h2").inner_text() == WEIRD
    assert re.fullmatch(
        r"SQS W8A8, [\d.]+\sMB\n[\d.]+\sms a step, [\d.]+\ss", page.locator("#result p").first.inner_text()
    )
    assert ready(page.get_by_alt_text("Waveform and spectrogram of"))
    page.wait_for_function("document.querySelector('#result audio').duration > 0")
    assert page.evaluate("document.querySelector('#result audio').duration") == pytest.approx(1.5, abs=0.01)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == clip_name(WEIRD, 7)
    page.locator("#command").get_by_role("button").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    monkeypatch.setenv("DIT_TRT_HOME", str(studio_home))
    monkeypatch.chdir(tmp_path)
    invoke(*shlex.split(copied)[1:])
    made = (tmp_path / download.value.suggested_filename).read_bytes()
    assert made == Path(download.value.path()).read_bytes()
    check_it_fits_a_phone(page)


def test_a_and_b_side_by_side_and_in_turn(visit):
    page = visit()
    assert press(page, "Compare", **QUICK) == "Done."
    heads = page.locator("#result h2").all_inner_texts()
    assert heads == ["A: dog barking", "B: dog barking"]
    costs = [take.locator("p").first.inner_text().split(",")[0] for take in page.locator(".take").all()]
    assert costs == ["FP32", "SQS W8A8"]
    rows = [row.inner_text().split("\t") for row in page.locator("#result tr").all()]
    assert [row[0].strip() for row in rows] == ["", "bundle, MB", "one step, ms", "all steps, s"]
    sizes = [float(value) for value in rows[1][1:]]
    assert sizes[0] > 2 * sizes[1]
    assert sizes[2] == pytest.approx(sizes[0] / sizes[1], abs=0.02)
    words = page.locator("#result > * p, #result p").all_inner_texts()
    assert any(re.match(r"Of the denoised latents, B differs from A by [\d.]+ % at the end", text) for text in words)
    assert ready(page.get_by_alt_text("Difference and cosine of B and A by step"))
    sounds = []
    for number, name in enumerate(("dog-barking-1000-fp32.wav", "dog-barking-1000-sqs-w8a8.wav")):
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").nth(number).click()
        assert download.value.suggested_filename == name
        sounds.append(soundfile.read(io.BytesIO(Path(download.value.path()).read_bytes()))[0])
    assert sounds[0].shape == sounds[1].shape
    assert np.abs(sounds[0] - sounds[1]).max() > 0
    assert len(page.locator("#command textarea").input_value().splitlines()) == 2
    # one button hears them in turn, from the same moment on
    button = page.locator("#result button")
    button.click()
    page.wait_for_function("!document.querySelectorAll('#result audio')[0].paused")
    page.wait_for_function("document.querySelectorAll('#result audio')[0].currentTime > 0.3")
    assert button.inner_text() == "Playing A. Switch to B"
    button.click()
    page.wait_for_function("!document.querySelectorAll('#result audio')[1].paused")
    assert page.evaluate("[...document.querySelectorAll('#result audio')].map(sound => sound.paused)") == [True, False]
    assert page.evaluate("document.querySelectorAll('#result audio')[1].currentTime") > 0.25
    check_it_fits_a_phone(page)


def focused(page, name):
    """Tab until the element has the focus; each on the way shows that it has it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(one => [one.labels?.[0]?.innerText || one.getAttribute('aria-label') || one.innerText,"
            " getComputedStyle(one).outlineStyle, one.tagName])(document.activeElement)"
        )
        if found[2] != "BODY":
            assert found[1] != "none", found
        if found[0].strip().startswith(name):
            return
    pytest.fail(f"Tab does not come to {name}")


def test_by_keys_alone_from_the_prompt_to_the_file(visit):
    page = visit()
    page.evaluate("document.querySelector('#status p').className = 'now'")
    focused(page, "Steps")
    page.keyboard.press("Control+a")
    page.keyboard.type("6")
    focused(page, "Seed")
    page.keyboard.press("Control+a")
    page.keyboard.type("11")
    focused(page, "Prompt")
    page.keyboard.type("rain")
    page.keyboard.press("Enter")
    assert settled(page) == "Done."
    focused(page, "Download")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "rain-11.wav"
    page.evaluate("document.querySelector('#status p').className = 'now'")
    focused(page, "Compare")
    focused(page, "Compare")  # the list is called so, too
    page.keyboard.press(" ")
    assert settled(page) == "Done."
    assert page.locator("#result audio").count() == 2


def test_every_control_has_a_name(visit):
    page = visit()
    for role, names in {
        "textbox": ["Prompt", "Seed", "Not like this (negative prompt)"],
        "spinbutton": ["Seconds", "Steps", "Guidance"],
        "combobox": ["Bundle", "Compare with (A; the bundle above is B)"],
        "button": ["Generate", "Compare", "Stop", "New seed"],
    }.items():
        for name in names:
            page.get_by_role(role, name=name, exact=True).wait_for()  # strict: there is one
    assert page.locator("#status [role=status]").count() == 1
    assert page.get_by_role("button", name="Stop").is_disabled()
    before = page.get_by_label("Seed", exact=True).input_value()
    page.get_by_role("button", name="New seed").click()
    page.wait_for_function(f"!document.querySelector('input[value=\"{before}\"]')")


def test_a_field_that_makes_no_sense_is_one_line(visit):
    page = visit()
    for fields, fault in (
        ({"Prompt": " "}, 'the prompt is empty; say what to hear, for example "dog barking"'),
        ({"Steps": "0"}, "steps 0 is outside 1..1000"),
        ({"Seed": "1.5"}, "the seed '1.5' is no whole number; give one, for example 1000"),
        ({"Seconds": "99"}, "seconds 99 is outside 0.1.."),
    ):
        fine = {**QUICK, "Seed": "1", "Seconds": "1"}
        assert press(page, "Generate", **{**fine, **fields}).startswith(fault)
        assert page.get_by_role("alert").count() == 1
    assert page.locator("#result audio").count() == 0
    assert press(page, "Generate", **fine) == "Done."
    assert page.get_by_role("alert").count() == 0


def choose(page, label, name):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=name).click()


def test_recordings_bundles_that_come_and_go(visit, studio_home, oobleck_bundle, tmp_path):
    (tmp_path / "voice.wav").write_bytes(b"no sound")
    write_wav(tmp_path / "good.wav", np.sin(np.arange(9000, dtype=np.float32) / 5)[None], 8000)
    page = visit()
    page.get_by_role("button", name="Begin from a recording").click()
    upload = page.locator("#recording input[type=file]")
    upload.set_input_files(tmp_path / "voice.wav")
    page.locator("#recording").get_by_label("Clear").wait_for()
    assert press(page, "Generate", **QUICK).startswith("the model demo has no encoder, so it cannot begin from a recor")
    new = studio_home / "bundles" / "tiny-oobleck"
    new.symlink_to(oobleck_bundle.folder)
    try:
        page.reload()
        choose(page, "Bundle", "tiny-oobleck")
        page.locator("#about", has_text="Model oobleck").wait_for()
        page.get_by_role("button", name="Begin from a recording").click()
        upload.set_input_files(tmp_path / "voice.wav")
        page.locator("#recording").get_by_label("Clear").wait_for()
        fields = {"Prompt": "dog", "Steps": 4, "Noise level: how far it is changed": "2"}
        assert press(page, "Generate", **fields).startswith("the recording voice.wav cannot be read as sound (")
        page.locator("#recording").get_by_label("Clear").click()
        upload.set_input_files(tmp_path / "good.wav")
        page.locator("#recording").get_by_label("Clear").wait_for()
        assert press(page, "Generate", **fields) == "Done."
        assert "--init-audio=good.wav --init-noise-level=2 dog" in page.locator("#command textarea").input_value()
        assert press(page, "Compare").startswith("choose a bundle to compare with; ")
    finally:
        new.unlink()
    assert press(page, "Generate").startswith("no bundle 'tiny-oobleck' in the home folder")


def test_stop_and_the_queue(visit):
    """One at a time: another page waits, and a page that is closed waits no more."""
    page, other, third = visit(), visit(), visit()
    for one in (page, other, third):
        one.get_by_label("Prompt", exact=True).fill("never made" if one is third else "dog barking")
        one.get_by_label("Steps", exact=True).fill("1000" if one is page else "4")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Sampling.").wait_for()
    third.get_by_role("button", name="Generate").click()
    third.get_by_text("Waiting: 1 before yours.").wait_for()
    third.close()
    other.evaluate("document.querySelector('#status p').className = 'now'")
    other.get_by_role("button", name="Generate").click()
    other.get_by_text(re.compile(r"Waiting: \d before yours")).wait_for()
    page.get_by_role("button", name="Stop").click()
    assert settled(page) == "Stopped."
    assert settled(other) == "Done."
    clips = [path.name for path in Path(tempfile.gettempdir()).glob("dit-trt-studio-*/clips/*/*")]
    assert clip_name("dog barking", 1000) in clips
    assert clip_name("never made", 1000) not in clips
    assert press(page, "Generate", Steps=4) == "Done."


def test_the_history_shows_and_restores(visit):
    page = visit()
    press(page, "Generate", Prompt="rain", Steps=4, Seed=5)
    press(page, "Compare", Prompt="a cat", Steps=3, Seed=6)
    entries = page.locator("#history label").all_inner_texts()
    assert [text.strip() for text in entries] == [
        "a cat, seed 6, 3 steps, A/B FP32 and SQS W8A8",
        "rain, seed 5, 4 steps, SQS W8A8",
    ]
    page.get_by_label("rain, seed 5").check()
    page.locator("#result h2", has_text="rain").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "rain"
    assert page.get_by_label("Steps", exact=True).input_value() == "4"
    assert page.get_by_label("Seed", exact=True).input_value() == "5"
    assert "--seed=5 rain" in page.locator("#command textarea").input_value()
    page.wait_for_function("document.querySelector('#result audio').duration > 0")  # the file is still there


def test_other_names_for_this_machine_are_refused(address):
    """A page elsewhere whose name leads here must not be able to use this one."""

    def ask(path: str = "/", method: str = "GET", body: str | None = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse()

    def upload(origin: str) -> int:
        part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\nsound\r\n--x--\r\n'
        kind = "multipart/form-data; boundary=x"
        return ask("/gradio_api/upload", "POST", part, Origin=origin, Content_Type=kind).status

    assert upload(address) == 200
    for origin in ("http://evil.example", address + "1", "http://127.0.0.1", "null", ""):
        assert upload(origin) == 403
    for host in ("evil.example", "[", "[::1", ""):
        assert ask(Host=host).status == 400
    assert ask().status == 200
    assert "default-src 'self'" in ask().headers["content-security-policy"]
    assert ask("/clips/../../../../etc/passwd").status in (400, 404)
    assert ask("/gradio_api/file=/etc/passwd").status in (403, 404)
