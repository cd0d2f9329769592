"""The page itself, in Gradio, and the server that it comes from. Neither asks any other host for anything."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from gradio.themes import Default

from ...engines.errors import UserError, last_line
from ...runtime.hosts import is_foreign, is_loopback, is_loopback_name
from . import shown
from .running import Stopped, reports
from .takes import Comparison, Progress, Studio, Take
from .wish import Wish

HERE = Path(__file__).parent
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
MOST_KEPT = 20  # entries of a session's history
WAITING = 16
UPLOAD = "200mb"
FIELDS = ("prompt", "seconds", "steps", "cfg", "seed", "negative_prompt", "init_audio", "init_noise_level", "bundle")


class _Guard:
    """Browsers are told to load nothing from elsewhere; what pages of elsewhere send is refused: their Origin, and
    other names of this machine.
    """

    def __init__(self, app: Any, local: bool):
        """local: it listens on the loopback, and has no other name."""
        self._app, self._local = app, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            if self._local and not is_loopback_name(host):
                await _refuse(send, 400, b"another host's name")
                return
            if origin is not None and is_foreign(origin, host):
                await _refuse(send, 403, b"a page of another host")
                return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self._app(scope, receive, guarded)


async def _refuse(send: Any, status: int, why: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": why})


def serve(listening: socket.socket, bundle: str | None, device: str | None, ready: Callable[[Studio], object]) -> None:
    """Until Ctrl-C or SIGTERM; what was made and not downloaded goes with it. Raises UserError for no such bundle."""
    with tempfile.TemporaryDirectory(prefix="dit-trt-studio-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        clips = Path(folder) / "clips"
        clips.mkdir()
        studio = Studio(clips, bundle, device)
        host = listening.getsockname()[0]
        page = Page(studio)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.mount("/clips", StaticFiles(directory=clips))
        gr.mount_gradio_app(
            app,
            page.blocks,
            path="/",
            server_name=host,
            server_port=listening.getsockname()[1],
            footer_links=[],
            run_history=False,
            max_file_size=UPLOAD,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            theme=Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=(HERE / "studio.css").read_text("utf-8"),
            head=f"<script>{(HERE / 'studio.js').read_text('utf-8')}</script>",
        )
        guard = _Guard(app, is_loopback(listening))
        server = uvicorn.Server(uvicorn.Config(guard, log_level="error", timeout_graceful_shutdown=1))
        ready(studio)
        try:
            server.run(sockets=[listening])
        finally:
            page.stop_all()


class Page:
    """The Gradio page of one studio."""

    def __init__(self, studio: Studio):
        self._studio = studio
        self._runs: dict[str | None, threading.Event] = {}  # by session; set: to be stopped
        self.blocks = self._build()

    def stop_all(self) -> None:
        for run in list(self._runs.values()):
            run.set()

    # -------------------- what is on it

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="dit-trt studio", analytics_enabled=False) as blocks:
            gr.HTML("<h1>dit-trt studio</h1><p>Words become sound, on this machine.</p>", elem_id="heading")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self._form()
                with gr.Column(scale=3, min_width=300):
                    self._live = gr.HTML("", elem_id="live")
                    self._result = gr.HTML("", elem_id="result")
                    self._command = gr.Textbox(
                        label="The same as a command",
                        buttons=["copy"],
                        interactive=False,
                        visible=False,
                        max_lines=12,
                        elem_id="command",
                    )
                    self._history = gr.Radio([], label="History of this session", visible=False, elem_id="history")
            self._made = gr.State([], delete_callback=_forget)
            self._events(blocks)
        blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
        return blocks

    def _form(self) -> None:
        titles = self._studio.titles()
        first = self._studio.model(titles[0][1])
        self._fields: dict[str, Any] = {
            "prompt": gr.Textbox(label="Prompt", placeholder="dog barking", lines=1, max_lines=1, autofocus=True)
        }
        with gr.Row():
            self._fields["seconds"] = gr.Number(first.seconds, label="Seconds", step=0.5, min_width=90)
            self._fields["steps"] = gr.Number(first.settings.steps, label="Steps", step=1, min_width=90)
            self._fields["cfg"] = gr.Number(first.settings.cfg_scale, label="Guidance", step=0.5, min_width=90)
        with gr.Row(equal_height=True):
            self._fields["seed"] = gr.Textbox(label="Seed", value="1000", min_width=90, max_lines=1, scale=2)
            self._new_seed = gr.Button("New seed", min_width=90, scale=1)
        self._fields["negative_prompt"] = gr.Textbox(label="Not like this (negative prompt)", lines=1, max_lines=1)
        with gr.Accordion("Begin from a recording", open=False):
            self._fields["init_audio"] = gr.Audio(
                label="Recording", sources=["upload", "microphone"], type="filepath", elem_id="recording"
            )
            self._fields["init_noise_level"] = gr.Textbox(
                label="Noise level: how far it is changed", placeholder="the model's own", max_lines=1
            )
        self._fields["bundle"] = gr.Dropdown(titles, value=titles[0][1], label="Bundle", elem_id="bundle")
        self._about = gr.HTML(shown.about(first), elem_id="about")
        self._other = gr.Dropdown(
            titles, value=first.other, label="Compare with (A; the bundle above is B)", elem_id="other"
        )
        with gr.Row():
            self._go = gr.Button("Generate", variant="primary", min_width=90)
            self._compare = gr.Button("Compare", min_width=90)
            self._stop = gr.Button("Stop", min_width=90, interactive=False)
        self._status = gr.HTML(shown.status("Ready."), elem_id="status")

    def _events(self, blocks: gr.Blocks) -> None:
        fields = [self._fields[name] for name in FIELDS]
        chosen = [self._fields[name] for name in ("seconds", "steps", "cfg")]
        buttons = [self._go, self._compare, self._stop]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_id": "engine",
            "concurrency_limit": 1,
        }
        shows = [self._status, self._live, self._result, self._command, self._history, self._made]
        lists = [self._fields["bundle"], self._other]
        blocks.load(self._lists, None, lists, **quick)
        self._fields["bundle"].input(
            self._chosen, self._fields["bundle"], [*chosen, self._other, self._about, self._status], **quick
        )
        for triggers, work, more in (
            ([self._go.click, self._fields["prompt"].submit], self._generate, []),
            ([self._compare.click], self._compared, [self._other]),
        ):
            begun = gr.on(triggers, self._begin, None, [self._status, *buttons], **quick)
            run = begun.success(work, [self._made, *more, *fields], shows, **slow)
            run.then(self._end, None, buttons, **quick)
        self._new_seed.click(lambda: str(random.randrange(10**6)), None, self._fields["seed"], **quick)
        self._stop.click(self._stopped, None, self._status, **quick)
        self._history.input(
            self._again,
            [self._history, self._made],
            [self._status, self._result, self._command, self._about, self._other, *fields],
            **quick,
        )
        blocks.unload(self._left)

    # -------------------- bundles

    def _lists(self) -> list[Any]:
        """What was built since is there when the page is loaded again."""
        return [gr.Dropdown(choices=self._studio.titles()) for _ in range(2)]

    def _chosen(self, name: str) -> list[Any]:
        """The model's own settings, the bundle to compare with, a line about it; or what is wrong with it."""
        try:
            model = self._studio.model(name)
        except UserError as error:
            return [*[gr.skip()] * 5, shown.error(str(error))]
        own = model.settings
        return [model.seconds, own.steps, own.cfg_scale, model.other, shown.about(model), gr.skip()]

    # -------------------- generating

    def _begin(self, request: gr.Request) -> list[Any]:
        if request.session_hash in self._runs:
            raise gr.Error("one of yours is running; wait for it, or press Stop", print_exception=False)
        ahead = len(self._runs)
        self._runs[request.session_hash] = threading.Event()
        message = f"Waiting: {ahead} before yours." if ahead else "Opening the bundle."
        return [shown.status(message, now=True), *_buttons(busy=True)]

    def _end(self, request: gr.Request) -> list[Any]:
        self._runs.pop(request.session_hash, None)
        return _buttons(busy=False)

    def _stopped(self, request: gr.Request) -> str:
        if (run := self._runs.get(request.session_hash)) is not None:
            run.set()
        return shown.status("Stopping after this step.", now=True)

    def _left(self, request: gr.Request) -> None:
        """The page was closed."""
        if (run := self._runs.pop(request.session_hash, None)) is not None:
            run.set()

    def _generate(self, request: gr.Request, made: list, *fields: Any) -> Iterator[dict]:
        def work(wish: Wish) -> Callable[..., Take]:
            return partial(self._studio.generate, wish)

        yield from self._shown(made, fields, request, work)

    def _compared(self, request: gr.Request, made: list, other: str | None, *fields: Any) -> Iterator[dict]:
        def work(wish: Wish) -> Callable[..., Comparison]:
            if not other:
                raise UserError("choose a bundle to compare with; FP32's is made by: dit-trt build --method none")
            return partial(self._studio.compare, wish, other)

        yield from self._shown(made, fields, request, work)

    def _shown(self, made: list, fields: tuple, request: gr.Request, work: Callable) -> Iterator[dict]:
        """What changes on the page, from the first step to the sound or the reason that there is none."""
        stop = self._runs.get(request.session_hash) or threading.Event()
        try:
            wish = Wish.of_fields({**dict(zip(FIELDS, fields)), "device": self._studio.device})
            picture = None
            for report in reports(work(wish), stop):
                if isinstance(report, Progress):
                    picture = report.picture or (picture if report.done else None)
                    yield {
                        self._live: shown.progress(report, picture),
                        self._status: shown.status("Sampling.", now=True),
                    }
            made = [*made, report]
            _forget(made[:-MOST_KEPT])
            made = made[-MOST_KEPT:]
            choices = [(shown.label(one), number) for number, one in enumerate(made)]
            yield {
                self._status: shown.status("Done."),
                self._live: "",
                self._result: shown.result(report),
                self._command: gr.Textbox(value=_command(report), visible=True),
                self._history: gr.Radio(choices=choices[::-1], value=len(made) - 1, visible=True),
                self._made: made,
            }
        except Stopped:
            yield {self._status: shown.status("Stopped."), self._live: ""}
        except UserError as error:
            yield {self._status: shown.error(str(error)), self._live: ""}
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "out of memory; close other programs"
            yield {self._status: shown.error(f"it could not be made: {reason}"), self._live: ""}
        except Exception as error:
            traceback.print_exc()
            reason = f"this is a defect of dit-trt ({last_line(error)}); the terminal tells where"
            yield {self._status: shown.error(reason), self._live: ""}

    def _again(self, number: int, made: list) -> list[Any]:
        """An entry of the history, and the fields that made it."""
        one = made[number]
        takes = (one,) if isinstance(one, Take) else one.takes
        wish = takes[-1].wish
        values = [getattr(wish, name) for name in FIELDS]
        fields = [str(v) if isinstance(v, Path) or n == "seed" else v for n, v in zip(FIELDS, values)]
        about, other = gr.skip(), gr.skip()
        with contextlib.suppress(UserError):  # the bundle may be gone
            about = shown.about(self._studio.model(wish.bundle))
        if len(takes) == 2:
            other = takes[0].wish.bundle
        said = shown.status(f"From the history: {shown.label(one)}.")
        return [said, shown.result(one), _command(one), about, other, *fields]


def _command(made: Take | Comparison) -> str:
    takes = (made,) if isinstance(made, Take) else made.takes
    return "\n".join(take.wish.command for take in takes)


def _forget(made: list[Take | Comparison]) -> None:
    """Their files are removed."""
    for one in made:
        for take in (one,) if isinstance(one, Take) else one.takes:
            shutil.rmtree(take.file.parent, ignore_errors=True)


def _buttons(busy: bool) -> list[Any]:
    return [gr.Button(interactive=not busy), gr.Button(interactive=not busy), gr.Button(interactive=busy)]
