"""The survey's page in a real browser, from file://: it plays, rates, remembers and exports, by keys alone if need be.

Clicks and key presses are real ones; no rule of the browser about autoplay is relaxed.
"""

from __future__ import annotations

import http.server
import json
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pytest
import screenshots
from surveys import CAPTIONS, MODELS, sounds

from dit_trt.tooling.listening.answers import read_answers
from dit_trt.tooling.listening.survey import Survey, read_key, write_survey

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Playwright

Open = Callable[..., "Page"]


@pytest.fixture
def contexts(playwright: Playwright) -> Iterator[list[BrowserContext]]:
    opened: list[BrowserContext] = []
    yield opened
    for context in opened:
        context.close()


@pytest.fixture
def visit(playwright: Playwright, contexts: list[BrowserContext], tmp_path: Path, survey: Survey) -> Open:
    """Open the page in a fresh browser; the same profile unless another is named. Errors of the page fail the test."""

    def opened(page: Path = survey.page, profile: str = "profile", **options: object) -> Page:
        context = browser.start(playwright, tmp_path / profile, **options)
        contexts.append(context)
        tab = context.pages[0]
        tab.on("pageerror", lambda error: pytest.fail(f"the page failed: {error}"))
        tab.goto(page.as_uri())
        return tab

    return opened


def begin(page: Page, rater: str = "") -> None:
    page.get_by_label("Your name or initials").fill(rater)
    page.get_by_role("button", name="Start").click()


def rating(page: Page, value: int) -> object:
    return page.locator(f"#ratings button[value='{value}']")


def until(page: Page, expression: str) -> None:
    """Playwright's own way of waiting evaluates text in the page, which its policy refuses."""
    for _ in range(1000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"it never came to {expression}")


def hear(page: Page) -> None:
    page.locator("#play").click()
    until(page, "!document.querySelector('#ratings button').disabled")


def caption(page: Page) -> str:
    return page.locator("#caption").text_content()


def stored(page: Page) -> dict:
    return json.loads(page.evaluate("Object.values(localStorage)[0]"))


# -------------------- playing and rating


def test_a_sound_plays_and_can_be_rated_after_its_end_only(visit):
    page = visit()
    begin(page, "Ada")
    assert page.locator("#where").text_content() == "Question 1 of 15, 0 rated"
    assert rating(page, 3).is_disabled()
    page.keyboard.press("3")
    assert page.locator("#status").text_content() == "Listen to the sound to its end first."
    assert page.evaluate("sound.currentTime") == 0
    page.locator("#play").click()
    until(page, "sound.currentTime > 0.05")
    assert rating(page, 3).is_disabled()
    until(page, "sound.ended")
    assert page.evaluate("sound.duration") == pytest.approx(0.4, abs=0.01)
    assert page.locator("#heard").text_content() == "Heard. Now rate it."
    rating(page, 3).click()
    assert page.locator("#heard").text_content() == "Rated 3."
    assert page.locator("#status").text_content() == ""
    assert rating(page, 3).get_attribute("aria-pressed") == "true"
    rating(page, 5).click()
    assert [rating(page, value).get_attribute("aria-pressed") for value in range(1, 6)] == [*["false"] * 4, "true"]
    assert page.locator("#where").text_content() == "Question 1 of 15, 1 rated"
    page.locator("#next").click()
    assert rating(page, 3).is_disabled()  # another sound, not heard yet


def test_captions_are_shown_as_they_are(visit, survey):
    page = visit()
    assert page.title() == 'Test <i> & "title"'
    begin(page)
    seen = []
    for _ in range(15):
        seen.append(caption(page))
        page.locator("#next").click()
    assert sorted(seen) == sorted(CAPTIONS * 3)
    assert page.title() == 'Test <i> & "title"'
    assert page.locator("#left").text_content() == "0 of 15 sounds are rated, 15 are not yet."
    page.get_by_role("button", name="Go to the first one not rated").click()
    assert caption(page) == seen[0]


def test_the_order_is_each_raters_own(visit):
    page = visit()
    orders = {}
    for rater in ("Ada", "Bo", "Cy", "Ada"):
        begin(page, rater)
        order = page.evaluate("order")
        assert orders.setdefault(rater, order) == order
        page.evaluate("localStorage.clear()")
        page.reload()
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(sorted(order) == sorted(orders["Ada"]) for order in orders.values())


def test_every_question_is_as_likely_at_every_place(visit):
    page = visit()
    counts = page.evaluate(
        """() => {
            const ids = [...questions.keys()], counts = ids.map(() => ids.map(() => 0));
            for (let rater = 0; rater < 3000; rater++)
                shuffled(ids, survey.survey + rater).forEach((id, place) => counts[ids.indexOf(id)][place]++);
            return counts;
        }"""
    )
    chi2 = sum((seen - 200) ** 2 / 200 for row in counts for seen in row)
    assert chi2 < 300  # 196 degrees of freedom: 5 standard deviations


# -------------------- answers are kept


def test_answers_outlive_a_reload_and_the_browser(visit, contexts):
    page = visit()
    begin(page, "Ada")
    first = caption(page)
    hear(page)
    rating(page, 4).click()
    page.locator("#next").click()
    hear(page)
    second = caption(page)
    before = stored(page)
    page.reload()
    assert page.locator("#status").text_content() == "Welcome back: your answers were kept."
    assert caption(page) == second
    assert rating(page, 1).is_enabled()  # it was heard
    contexts.pop().close()
    page = visit()
    assert stored(page) == before
    assert page.locator("#where").text_content() == "Question 2 of 15, 1 rated"
    page.locator("#back").click()
    assert caption(page) == first
    assert rating(page, 4).get_attribute("aria-pressed") == "true"


def test_surveys_do_not_mix_in_one_browser(visit, tmp_path):
    page = visit()
    begin(page, "Ada")
    other = write_survey(sounds(), MODELS, "Another", tmp_path / "other")
    page.goto(other.page.as_uri())
    assert page.locator("#intro").is_visible()


def test_another_person_begins_anew(visit):
    page = visit()
    begin(page, "Ada")
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    said = []

    def answer(dialog):
        said.append(dialog.message)
        (dialog.dismiss if len(said) == 1 else dialog.accept)()

    page.on("dialog", answer)
    another = page.get_by_role("button", name="Another person on this device")
    another.click()
    assert page.locator("#end").is_visible()
    another.click()
    assert said == ["The answers of Ada will be removed from this device. They are not saved as a file yet. Go on?"] * 2
    assert page.get_by_label("Your name or initials").input_value() == ""
    begin(page)
    assert re.fullmatch("r-[0-9a-z]{5,}", stored(page)["rater"])


# -------------------- from start to end by keys alone, and what comes of it


def test_by_keys_alone_from_start_to_the_file(visit, survey, tmp_path):
    page = visit()
    for _ in range(2):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "rater":
            break
    page.keyboard.type("Zoë / 1")
    page.keyboard.press("Enter")
    given = {}
    for number in range(15):
        page.keyboard.press(" ")
        until(page, "!document.querySelector('#ratings button').disabled")
        given[page.evaluate("order[state.at]")] = 1 + number % 5
        page.keyboard.press(str(1 + number % 5))
        page.keyboard.press("Enter" if number % 2 else "ArrowRight")
    assert page.locator("#left").text_content() == "All 15 sounds are rated."
    page.keyboard.press("ArrowLeft")
    assert page.locator("#where").text_content() == "Question 15 of 15, 15 rated"
    page.keyboard.press("ArrowRight")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    with page.expect_download() as download:
        for _ in range(5):
            page.keyboard.press("Tab")
            assert page.evaluate(outline) == "solid"  # the focus is seen
            if page.evaluate("document.activeElement.textContent") == "Save my answers":
                break
        page.keyboard.press("Enter")
    saved = download.value
    assert re.fullmatch("answers-[0-9a-f]{6}-Zoë-1.json", saved.suggested_filename)
    saved.save_as(tmp_path / "answers" / saved.suggested_filename)
    answers = read_answers(tmp_path / "answers", read_key(survey.key))
    assert [rater.name for rater in answers.raters] == ["Zoë / 1"]
    assert answers.raters[0].ratings == given
    assert answers.refused == []


def test_buttons_keep_their_keys(visit):
    """Space and Enter on a button that has the focus press that button: what a screen reader's user expects."""
    page = visit()
    begin(page, "Ada")
    page.locator("#play").focus()
    page.keyboard.press(" ")
    until(page, "!document.querySelector('#ratings button').disabled")
    rating(page, 2).focus()
    page.keyboard.press(" ")
    assert list(stored(page)["ratings"].values()) == [2]
    assert page.evaluate("sound.paused")
    rating(page, 3).click()  # but after a pointer's click Space plays again
    page.keyboard.press(" ")
    until(page, "!sound.paused")


def test_answers_can_be_saved_before_the_end(visit, survey, tmp_path):
    page = visit()
    begin(page, "Ada")
    hear(page)
    page.keyboard.press("2")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the answers so far").click()
    download.value.save_as(tmp_path / "answers" / "a.json")
    key = read_key(survey.key)
    answers = read_answers(tmp_path / "answers", key)
    assert [len(rater.ratings) for rater in answers.incomplete(key)] == [1]


# -------------------- names for screen readers, a phone, two themes


def test_every_control_has_a_name(visit):
    page = visit()
    assert page.get_by_role("textbox", name="Your name or initials").count() == 1
    begin(page, "Ada")
    for name in ("Play", "Back", "Next", "1 not at all", "2 poorly", "3 partly", "4 well", "5 perfectly"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    assert page.get_by_role("group", name="How well does the sound fit these words?").count() == 1
    assert page.get_by_role("progressbar", name="Question 1 of 15, 0 rated").count() == 1
    assert page.get_by_role("status").count() == 2  # of the sound, and of the page
    assert page.evaluate("document.activeElement.id") == "caption"
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [320, 375])
def test_it_fits_a_phone(visit, width):
    page = visit(viewport={"width": width, "height": 667}, has_touch=True)
    assert page.locator("meta[name=viewport]").get_attribute("content") == "width=device-width, initial-scale=1"
    begin(page, "an awfully long name of a rater " * 2)
    longest = max(CAPTIONS, key=len)
    while caption(page) != longest:
        page.locator("#next").click()
    for last in (False, True):
        if last:
            page.evaluate("go(order.length)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.locator("button:visible, input:visible")
        for place in range(shown.count()):
            box = shown.nth(place).bounding_box()
            assert box["height"] >= 44 and box["width"] >= 44
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        sizes = page.evaluate(
            """[...document.querySelectorAll('p, button, label, span')]
                .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
        )
        assert min(sizes) >= 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(visit, scheme):
    """Contrast of at least 4.5 to 1 (WCAG AA) for all text; the themes differ."""
    page = visit(color_scheme=scheme)
    begin(page, "Ada")
    pairs = page.evaluate(
        """() => {
            const ground = (e) => {
                for (; e; e = e.parentElement) {
                    const colour = getComputedStyle(e).backgroundColor;
                    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
                }
            };
            return [...document.querySelectorAll('h1, p, button, b, span, label')].filter((e) => e.offsetParent)
                .map((e) => [getComputedStyle(e).color, ground(e)]);
        }"""
    )
    assert len(pairs) > 15

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for ink, paper in pairs:
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2) == (scheme == "dark")


def test_a_message_is_in_sight_on_a_phone(visit):
    page = visit(viewport={"width": 375, "height": 667})
    begin(page, "Ada")
    page.keyboard.press("3")
    box = page.locator("#status").bounding_box()
    assert box["y"] + box["height"] <= 667


def test_the_picture_of_the_documentation(playwright, survey, tmp_path):
    screenshots.take(playwright, survey.page, tmp_path / "shot.png")
    width, height = struct.unpack(">II", (tmp_path / "shot.png").read_bytes()[16:24])
    assert (width, height) == (860 + 375 + 3 * 24, 812 + 2 * 24)


# -------------------- nothing leaves the page, nothing tells which is which


def test_no_request_and_none_is_possible(visit, survey):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        page = visit()
        urls = []
        page.on("request", lambda request: urls.append(request.url))
        page.reload()
        begin(page, "Ada")
        hear(page)
        page.keyboard.press("3")
        with page.expect_download():
            page.get_by_role("button", name="Save the answers so far").click()
        page.evaluate("go(order.length)")
        others = [url for url in urls if not url.startswith(("data:audio/flac;base64,", "blob:"))]
        assert others == [survey.page.as_uri()]
        refused = page.evaluate(
            """async (address) => {
                const failed = [];
                document.addEventListener('securitypolicyviolation', (e) => failed.push(e.effectiveDirective));
                await fetch(address + '/fetch').catch(() => 0);
                navigator.sendBeacon(address + '/beacon', 'x');
                new Image().src = address + '/image';
                new Audio(address + '/audio').load();
                document.head.append(Object.assign(document.createElement('script'), {src: address + '/script'}));
                document.head.append(Object.assign(document.createElement('link'),
                    {rel: 'stylesheet', href: address + '/style'}));
                await new Promise((done) => setTimeout(done, 300));
                return failed;
            }""",
            address,
        )
        server.shutdown()
    assert asked == []
    assert {"connect-src", "img-src", "media-src", "script-src-elem", "style-src-elem"} <= set(refused)
