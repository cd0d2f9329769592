"""The service in memory: sounds, what is refused, who waits, what happens when somebody goes or something breaks."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import invoke

from dit_trt.engines.errors import UserError
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.service.fields import MAX_BODY, MAX_PROMPT, MAX_SEED
from dit_trt.runtime.service.worker import Worker

GENERATIONS = "/v1/audio/generations"
TOKEN = "a-token-for-the-tests"


def problem(response: Any, status: int) -> dict:
    """The answer's problem; its detail is one line."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert found["status"] == status
    assert found["detail"] and "\n" not in found["detail"]
    return found


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# -------------------- sounds


def test_an_answer_is_the_file_that_run_writes(serve, tiny_sqs, tmp_path):
    options = ("--steps", "3", "--cfg", "2.5", "--seed", "7", "--seconds", "0.5", "--negative-prompt", "rain")
    command = ("run", "--bundle", tiny_sqs.folder, "a puppy", *options, "--sampler", "dpmpp-2m")
    invoke(*command, "--output", tmp_path / "run.wav")
    body = {"steps": 3, "cfg": 2.5, "seed": 7, "seconds": 0.5, "negative_prompt": "rain", "sampler": "dpmpp-2m"}
    answer = serve().post(prompt="a puppy", **body)
    assert answer.status_code == 200
    assert answer.content == (tmp_path / "run.wav").read_bytes()
    headers = {name: answer.headers[name] for name in ("content-type", "x-model", "x-seed", "x-steps", "x-batch")}
    assert [*headers.values()] == ["audio/wav", "tiny", "7", "3", "1"]


def test_a_whole_number_may_have_a_point(serve):
    assert serve().post(steps=3.0, seed=7.0).headers["x-seed"] == "7"


def test_flac_holds_the_same_samples(serve):
    service = serve()
    flac, wav = service.post(format="flac"), service.post()
    assert flac.headers["content-type"] == "audio/flac"
    assert flac.content[:4] == b"fLaC"
    samples = [soundfile.read(io.BytesIO(answer.content), dtype="int16") for answer in (flac, wav)]
    np.testing.assert_array_equal(samples[0][0], samples[1][0])
    assert samples[0][1] == samples[1][1] == 8000


def test_alike_requests_are_computed_together_and_change_no_byte(serve):
    service = serve(max_batch=4)
    prompts = ["dog", "cat", "rain", "siren", "puppy"]
    alone = [service.post(prompt=prompt, seed=i).content for i, prompt in enumerate(prompts)]
    service.pipeline.batches.clear()
    service.pipeline.begun.clear()
    service.pipeline.go.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(service.post, prompt="first")
        assert service.pipeline.begun.wait(30)
        others = []
        for i, prompt in enumerate(prompts):
            others.append(pool.submit(service.post, prompt=prompt, seed=i))
            until(lambda i=i: len(service.worker.waiting) == i + 1)
        other = pool.submit(service.post, cfg=3)
        until(lambda: len(service.worker.waiting) == 6)
        service.pipeline.go.set()
        answers = [future.result() for future in others]
        assert first.result().headers["x-batch"] == other.result().headers["x-batch"] == "1"
    assert service.pipeline.batches == [["first"], prompts[:4], ["puppy"], ["dog barking"]]
    assert [answer.headers["x-batch"] for answer in answers] == ["4"] * 4 + ["1"]
    assert [answer.content for answer in answers] == alone
    text = service.client.get("/metrics").text
    assert 'dit_trt_batch_size_bucket{le="4.0"} 9.0' in text
    assert "dit_trt_batch_size_sum 12.0" in text


def answers_behind_a_first(service, count):
    """Those of a request that runs and of `count` alike that wait until all are there."""
    service.pipeline.go.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(service.post, prompt="first")]
        assert service.pipeline.begun.wait(30)
        futures += [pool.submit(service.post, seed=seed) for seed in range(count)]
        until(lambda: len(service.worker.waiting) == count)
        service.pipeline.go.set()
        return [future.result() for future in futures]


def test_three_wait_and_two_go_together(serve):
    """Every size of a batch is compiled once and kept: only powers of two are."""
    service = serve(max_batch=8)
    assert {answer.status_code for answer in answers_behind_a_first(service, 3)} == {200}
    assert [len(batch) for batch in service.pipeline.batches] == [1, 2, 1]


def test_what_was_warmed_up_is_compiled(tiny_sqs):
    pipeline = Pipeline(tiny_sqs)
    worker = Worker({"tiny": pipeline}, max_batch=4)
    worker.warm_up()
    compiled = {*pipeline._step_engines}
    assert len(compiled) == 3
    for batch in (1, 2, 4):
        assert len([*pipeline.generate(["a", "b", "c", "d"], pipeline.settings(steps=3), batch=batch)]) == 4
    assert {*pipeline._step_engines} == compiled
    for more, kind in enumerate([("rain", 7.0), (None, 1.0), ("rain", 1.0)]):  # docs/serving.md: once a kind and size
        settings = pipeline.settings(steps=2, cfg_scale=kind[1])
        for _ in range(2):
            list(pipeline.generate(["a"], settings, negative_prompt=kind[0]))
        assert len(pipeline._step_engines) == len(compiled) + min(more + 1, 2)


# -------------------- what is refused

WRONG = [
    ({"prompt": " "}, "prompt is empty"),
    ({"prompt": "x" * (MAX_PROMPT + 1)}, "prompt is longer than 2000 characters"),
    ({"negative_prompt": "x" * (MAX_PROMPT + 1)}, "negative_prompt is longer than 2000 characters"),
    ({"prompt": None}, "prompt: input should be a valid string"),
    ({"steps": 0}, "steps is outside 1..50"),
    ({"steps": 51}, "steps is outside 1..50"),
    ({"steps": 2.5}, "steps: input should be a valid integer"),
    ({"steps": True}, "steps: input should be a valid integer"),
    ({"seconds": 0.05}, "seconds is outside 0.1..0.77"),
    ({"seconds": 1}, "seconds is outside 0.1..0.77"),
    ({"seconds": "1"}, "seconds: input should be a valid number"),
    ({"cfg": -1}, "cfg is outside 0..100"),
    ({"cfg": 101}, "cfg is outside 0..100"),
    ({"seed": -1}, f"seed is outside 0..{MAX_SEED}"),
    ({"seed": MAX_SEED + 1}, f"seed is outside 0..{MAX_SEED}"),
    ({"format": "mp3"}, "format must be one of: 'wav', 'flac'"),
    ({"model": "other"}, "model must be one of: 'tiny'"),
    ({"sampler": "euler"}, "sampler must be one of: 'dpmpp-3m-sde', 'dpmpp-2m-sde', 'dpmpp-2m'"),
    ({"strength": 1}, "'strength' is no field (one of: prompt, model, seconds, seed, "),
]


@pytest.fixture
def service(serve):
    return serve(steps=50)


def test_a_wrong_field_is_named_with_its_limit(service):
    for body, told in WRONG:
        found = problem(service.post(**body), 422)
        assert told in found["detail"]
        assert found["fields"] == [*body]
    found = problem(service.post(steps=51, cfg=101), 422)
    assert (found["detail"], found["fields"]) == ("steps is outside 1..50; cfg is outside 0..100", ["steps", "cfg"])
    assert service.pipeline.batches == []


@pytest.mark.parametrize(
    "body", [b"", b"dog", b"[1]", b'"dog"', b'{"prompt": "\\ud800"}', b'{"prompt": "dog", "seconds": NaN}', b"\xff"]
)
def test_a_body_that_is_no_json_object_is_refused(service, body):
    answer = service.client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    problem(answer, answer.status_code)


def test_a_form_is_refused(service):
    """What a page of another site could make a browser send without asking first."""
    for kind in ("text/plain", "text/plain; application/json", "application/jsonx", "", None):
        headers = {} if kind is None else {"Content-Type": kind}
        answer = service.client.post(GENERATIONS, content=b'{"prompt": "dog"}', headers=headers)
        found = problem(answer, 415)
        assert found["detail"] == "send the body as JSON, with the header `Content-Type: application/json`"
    assert service.pipeline.batches == []
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    content = b'{"prompt": "dog", "steps": 2}'
    assert service.client.post(GENERATIONS, content=content, headers=kind).status_code == 200


def test_a_large_body_is_refused_whether_or_not_it_tells_its_length(service):
    def pieces():
        for _ in range(MAX_BODY // 1000 + 1):
            yield b"x" * 1000

    for content in (b"x" * (MAX_BODY + 1), pieces()):
        answer = service.client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
        assert problem(answer, 413)["detail"] == f"the body is larger than {MAX_BODY} bytes"
    answer = service.client.post(GENERATIONS, content=b"", headers={"Content-Length": "9" * 5000})
    problem(answer, 413)


def test_a_models_defaults_are_within_the_limits(serve):
    service = serve(steps=4, seconds=0.25)
    answer = service.client.post(GENERATIONS, json={"prompt": "dog"})
    assert answer.headers["x-steps"] == "4"
    assert soundfile.info(io.BytesIO(answer.content)).frames == 2000
    (model,) = service.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_seconds"], model["max_steps"]) == ("tiny", 0.25, 4)
    assert model["defaults"] == {"seconds": 0.25, "seed": 1000, "steps": 4, "cfg": 7.0, "sampler": "dpmpp-3m-sde"}


def test_the_host_of_another_machine_is_refused_without_a_token(serve):
    without, bearing = serve(), serve(token=TOKEN)
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", ""):
        assert "--token-file" in problem(without.client.get("/healthz", headers={"Host": host}), 400)["detail"]
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        assert without.client.get("/healthz", headers={"Host": host}).status_code == 200
    assert bearing.client.get("/healthz", headers={"Host": "sounds.example"}).status_code == 200


def test_a_token_opens_everything_and_nothing_else_does(serve):
    service = serve(token=TOKEN)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/nothing"):
        for given in (None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xe9"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            answer = service.client.get(path, headers=headers)
            problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        right = service.client.get(path, headers={"Authorization": f"bearer {TOKEN}"})
        assert right.status_code == (404 if path == "/nothing" else 200)
    problem(service.post(), 401)
    assert service.client.get("/healthz").status_code == 200
    assert not any(TOKEN in line for line in service.log)


def test_other_paths_and_methods_are_problems_too(service):
    for path in ("/redoc", "/"):
        problem(service.client.get(path), 404)
    answer = service.client.get(GENERATIONS)
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_the_page_tells_every_path_and_field_and_loads_nothing(service):
    answer = service.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    schema = service.client.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["Generation"]["properties"]
    for told in (*schema["paths"], *(f"<td>{field}<td>" for field in fields)):
        assert told in answer.text
    rows = re.findall(r"<td>(steps|seed|format|model|prompt)<td>([^<]*)<td>([^<]*)<", answer.text)
    assert [*map(list, rows)] == [
        ["prompt", "string, at most 2000 characters", "required"],
        ["model", "tiny", ""],
        ["seed", f"integer, 0 to {MAX_SEED}", "1000"],
        ["steps", "integer, 1 to 50", ""],
        ["format", "wav, flac", "wav"],
    ]
    assert not re.search(r"://|src=|href=|<script", answer.text)


# -------------------- who waits, who goes


def test_a_full_list_says_when_to_come_back(serve):
    service = serve(places=2)
    service.post(steps=10)  # measures a step
    service.pipeline.begun.clear()
    service.pipeline.go.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(service.post, prompt="first", steps=200)]
        assert service.pipeline.begun.wait(30)
        futures += [pool.submit(service.post, prompt=prompt) for prompt in ("second", "third")]
        until(lambda: len(service.worker.waiting) == 2)
        pace = service.worker._paces["tiny"]
        pace.step, pace.rest = 0.5, 2.0
        answer = service.post()
        assert "2 requests wait already" in problem(answer, 429)["detail"]
        assert answer.headers["retry-after"] == "102"  # 199.5 of 200 steps of 0.5 s, or 199 and 1 more, and 2 s
        text = service.client.get("/metrics").text
        assert "dit_trt_queue_length 2.0" in text
        assert "dit_trt_running 1.0" in text
        pace.step = 1e6
        assert service.post().headers["retry-after"] == "3600"
        service.pipeline.go.set()
        assert [future.result().status_code for future in futures] == [200] * 3
    assert (
        'dit_trt_requests_total{path="/v1/audio/generations",status="429"} 2.0' in service.client.get("/metrics").text
    )


async def gone_after(app: Any, body: dict, event: asyncio.Event) -> None:
    """One request whose client closes its connection at the event."""
    content = json.dumps({"prompt": "dog", **body}).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await event.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        return None

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "raw_path": b"", "query_string": b""}
    more = {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("test", 1)}
    await app({**scope, **more, "server": ("localhost", 80)}, receive, send)


def test_who_goes_frees_the_place_and_ends_what_runs(serve):
    service = serve(places=1)
    service.pipeline.go.clear()

    async def both() -> None:
        leave = asyncio.Event()
        running = asyncio.create_task(gone_after(service.app, {"steps": 100}, leave))
        await asyncio.to_thread(service.pipeline.begun.wait, 30)
        waiting = asyncio.create_task(gone_after(service.app, {"steps": 7}, leave))
        await asyncio.to_thread(until, lambda: len(service.worker.waiting) == 1)
        leave.set()
        await asyncio.gather(running, waiting)

    asyncio.run(both())
    assert len(service.worker.waiting) == 0
    assert service.worker.running == 1  # until the end of the step
    service.pipeline.go.set()
    until(lambda: service.worker.waiting.idle)
    assert service.pipeline.steps == 1
    assert service.pipeline.batches == [["dog"]]
    assert len([line for line in service.log if f"POST {GENERATIONS} 499" in line]) == 2
    assert service.post().status_code == 200


def test_who_stays_is_served_when_a_neighbour_goes(serve):
    service = serve()
    service.pipeline.go.clear()

    async def both() -> Any:
        leave = asyncio.Event()
        first = asyncio.create_task(asyncio.to_thread(service.post, prompt="first"))
        await asyncio.to_thread(service.pipeline.begun.wait, 30)
        goes = asyncio.create_task(gone_after(service.app, {"steps": 2, "seed": 5}, leave))
        stays = asyncio.create_task(asyncio.to_thread(service.post))
        await asyncio.to_thread(until, lambda: len(service.worker.waiting) == 2)
        service.pipeline.go_together.clear()
        service.pipeline.go.set()
        await asyncio.to_thread(until, lambda: service.worker.running == 2)
        leave.set()
        await asyncio.gather(goes, first)
        service.pipeline.go_together.set()
        return await stays

    answer = asyncio.run(both())
    assert answer.status_code == 200
    assert answer.headers["x-batch"] == "2"


def test_a_stopping_service_takes_nothing_and_gives_up_between_steps(serve):
    service = serve()
    service.pipeline.go.clear()
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(service.post, steps=100)
        assert service.pipeline.begun.wait(30)
        waiting = pool.submit(service.post, cfg=1)
        until(lambda: len(service.worker.waiting) == 1)
        service.worker.draining = True
        assert "stopping" in problem(service.post(), 503)["detail"]
        problem(service.client.get("/healthz"), 503)
        service.worker.stop()
        problem(waiting.result(), 503)
        problem(running.result(timeout=10), 503)  # a step may take longer than the server has time
        service.pipeline.go.set()
        until(lambda: not service.worker.alive)
    assert service.pipeline.steps == 1


# -------------------- what breaks


def test_an_engine_that_fails_is_one_line_and_the_next_request_is_served(serve):
    service = serve()
    service.pipeline.fail[1] = RuntimeError("secret /path\nof the engine")
    assert problem(service.post(), 500)["detail"] == "the engine failed; the server's log has the reason"
    assert "tiny failed: RuntimeError: of the engine" in service.log
    service.pipeline.fail[1] = UserError("the engine is broken; build it again")
    assert problem(service.post(), 500)["detail"] == "the engine is broken; build it again"
    service.pipeline.fail.clear()
    assert service.post().status_code == 200
    assert service.client.get("/healthz").json() == {"status": "ok"}


def test_a_batch_that_fails_is_tried_one_by_one(serve):
    service = serve()
    service.pipeline.fail[2] = MemoryError()
    assert [answer.headers.get("x-batch") for answer in answers_behind_a_first(service, 2)] == ["1"] * 3
    assert [len(batch) for batch in service.pipeline.batches] == [1, 2, 1, 1]


def test_a_request_is_one_line_of_log_without_its_prompt(service):
    service.post(prompt="a secret", seed=3)
    service.client.get("/a%0Ab")
    made, missing = service.log
    when = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    what = "tiny seed=3 steps=2 seconds=0.768 batch=1"
    assert re.fullmatch(rf"{when} testclient POST {GENERATIONS} 200 [\d.]+ s {what}", made)
    assert re.fullmatch(rf"{when} testclient GET /a%0Ab 404 [\d.]+ s", missing)
