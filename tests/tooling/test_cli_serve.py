"""`dit-trt serve` as a process of its own, met over TCP; and what it refuses to start with."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import error_of, invoke
from processes import COMMAND, dit_trt

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.runtime.hosts import listening

TOKEN = "a-token-for-the-tests"
BEARING = {"Authorization": f"Bearer {TOKEN}"}
LONG = 1000  # steps; seconds of work even for the tiny model
GENERATIONS = "/v1/audio/generations"


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: dict | None = None, headers: dict = BEARING) -> tuple[int, Any, bytes]:
        """-> status, headers, content"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), {**headers, **kind})
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def make(self, **body: Any) -> tuple[int, Any, bytes]:
        return self.ask("POST", GENERATIONS, {"prompt": "dog barking", **body})

    def number(self, name: str) -> float:
        """Of /metrics; 0 for one that was never counted."""
        text = self.ask("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, name: str, value: float) -> None:
        end = time.monotonic() + 30
        while self.number(name) != value:
            assert time.monotonic() < end, name
            time.sleep(0.01)

    def refuses(self) -> str:
        """Wait until it does -> the reason."""
        end = time.monotonic() + 10
        while (answer := self.ask("GET", "/healthz"))[0] != 503:
            assert time.monotonic() < end
        return json.loads(answer[2])["detail"]

    def end(self) -> tuple[int, str, str]:
        """-> exit code, the rest of stdout, stderr"""
        stdout, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stdout, stderr


def start(bundle: Bundle, *options: str) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", str(bundle.folder), "--port", "0", "--max-steps", str(LONG), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DIT_TRT_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"serving tiny-sqs on http://127\.0\.0\.1:(\d+)\n", line)
    if found is None:
        process.kill()
        pytest.fail(f"{line!r} {process.communicate()}")
    return Server(process, int(found[1]))


@pytest.fixture(scope="module")
def server(tiny_sqs: Bundle) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    started = start(tiny_sqs, "--queue", "2", "--max-batch", "2")
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_the_answer_is_the_file_that_run_writes(server: Server, tiny_sqs: Bundle, tmp_path: Path) -> None:
    invoke(
        "run", "--bundle", tiny_sqs.folder, "dog barking", "--seed", "5", "--steps", "4", "--output", tmp_path / "a.wav"
    )
    status, headers, content = server.make(seed=5, steps=4)
    assert (status, headers["content-type"], headers["x-seed"]) == (200, "audio/wav", "5")
    assert content == (tmp_path / "a.wav").read_bytes()
    assert server.make(seed=6, steps=4)[2] != content


def test_the_lengths_that_it_names_are_taken(server: Server) -> None:
    [model] = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    lengths = model["max_seconds"], model["defaults"]["seconds"]
    assert [server.make(steps=1, seconds=seconds)[0] for seconds in lengths] == [200, 200]


def test_a_wrong_field_and_a_missing_token(server: Server) -> None:
    status, headers, content = server.make(steps=LONG + 1)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert json.loads(content)["detail"] == "steps is outside 1..1000"
    assert server.ask("POST", GENERATIONS, {"prompt": "dog"}, headers={})[0] == 401
    assert server.ask("GET", "/healthz", headers={})[0] == 200


def test_a_full_list_is_429_and_those_who_waited_are_served(server: Server, pool: ThreadPoolExecutor) -> None:
    running = pool.submit(server.make, steps=LONG)
    server.until("dit_trt_running", 1)
    waiting = [pool.submit(server.make, steps=3, seed=seed) for seed in range(2)]
    server.until("dit_trt_queue_length", 2)
    status, headers, content = server.make()
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert "2 requests wait already" in json.loads(content)["detail"]
    assert running.result()[0] == 200
    answers = [future.result() for future in waiting]
    assert [(status, headers["x-batch"]) for status, headers, _ in answers] == [(200, "2")] * 2
    assert [content for _, _, content in answers] == [server.make(steps=3, seed=seed)[2] for seed in range(2)]


def test_who_hangs_up_cancels(server: Server, pool: ThreadPoolExecutor) -> None:
    def gone() -> float:
        return server.number(f'dit_trt_requests_total{{path="{GENERATIONS}",status="499"}}')

    before, made = gone(), server.number("dit_trt_generation_seconds_count")
    body = json.dumps({"prompt": "dog", "steps": LONG}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as first:
        first.sendall(head.encode() + body)
        server.until("dit_trt_running", 1)
        with socket.create_connection(("127.0.0.1", server.port)) as second:
            second.sendall(head.encode() + body)
            server.until("dit_trt_queue_length", 1)
        server.until("dit_trt_queue_length", 0)
        assert server.number("dit_trt_running") == 1
    server.until("dit_trt_running", 0)
    assert gone() == before + 2
    assert server.number("dit_trt_generation_seconds_count") == made  # nothing was finished
    assert server.make(steps=2)[0] == 200


def test_sigterm_finishes_what_was_accepted(server: Server, pool: ThreadPoolExecutor) -> None:
    """The last of the tests that share the server."""
    running = pool.submit(server.make, steps=LONG)
    server.until("dit_trt_running", 1)
    waiting = pool.submit(server.make, steps=2)
    server.until("dit_trt_queue_length", 1)
    server.process.send_signal(signal.SIGTERM)
    assert "stopping" in server.refuses()
    assert server.make()[0] == 503
    assert running.result()[0] == waiting.result()[0] == 200
    code, stdout, stderr = server.end()
    assert (code, stdout) == (0, "")
    assert stderr.endswith("all that was accepted is finished\n")
    assert "Traceback" not in stderr
    assert TOKEN not in stderr
    assert "dog" not in stderr


def test_a_second_signal_ends_between_two_steps(tiny_sqs: Bundle, pool: ThreadPoolExecutor) -> None:
    server = start(tiny_sqs, "--max-batch", "1")
    try:
        running = pool.submit(server.make, steps=LONG)
        server.until("dit_trt_running", 1)
        server.process.send_signal(signal.SIGINT)
        server.refuses()
        server.process.send_signal(signal.SIGINT)
        assert running.result()[0] == 503
        code, _, stderr = server.end()
    finally:
        server.process.kill()
    assert code == 0
    assert stderr.endswith("stopped; what was not finished was answered with 503\n")
    assert "Traceback" not in stderr


# -------------------- what it does not start with


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_that_others_reach_needs_a_token(tiny_sqs: Bundle, host: str) -> None:
    error = error_of("serve", tiny_sqs.folder, "--host", host, "--port", "0", code=2)
    assert "can be reached from outside; give --token-file" in error


def test_tokens_that_are_none(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("serve", tiny_sqs.folder, "--port", "0")
    file = tmp_path / "token"
    assert "cannot be read (No such file" in error_of(*command, "--token-file", file)
    for content in (
        b"",
        b"short",
        b"two words are no token",
        b"gr\xc3\xbc\xc3\x9fe-gr\xc3\xbc\xc3\x9fe-gr\xc3\xbc\xc3\x9fe",
    ):
        file.write_bytes(content)
        assert "must hold one line of 16 or more letters" in error_of(*command, "--token-file", file, code=2)
    file.write_bytes(b"\xff" * 20)
    assert "cannot be read (it is no text)" in error_of(*command, "--token-file", file)
    monkeypatch.setenv("DIT_TRT_TOKEN", "short-secret")
    error = error_of(*command, code=2)
    assert "DIT_TRT_TOKEN must hold" in error
    assert "short-secret" not in error


def test_a_port_in_use_and_a_host_of_nobody(tiny_sqs: Bundle) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: " in error_of("serve", tiny_sqs.folder, "--port", port)
    assert "is no address of this machine" in error_of("serve", tiny_sqs.folder, "--host", "no.such.host.invalid")
    assert "cannot listen on 192.0.2.1" in error_of("serve", tiny_sqs.folder, "--host", "192.0.2.1")


def test_a_port_is_taken_from_the_start() -> None:
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match="choose another --port"):
            listening("127.0.0.1", port)


def test_bundles_that_are_not_there_or_twice(tiny_sqs: Bundle, tmp_path: Path) -> None:
    assert "nowhere" in error_of("serve", tmp_path / "nowhere", "--port", "0")
    error = error_of("serve", tiny_sqs.folder, tiny_sqs.folder, "--port", "0")
    assert "two bundles are called tiny-sqs" in error


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_is_named(package: str) -> None:
    finished = dit_trt("serve", without=(package,))
    assert finished.returncode == 1
    assert finished.stderr.splitlines() == [
        f"Error: this command needs the package {package}, which comes with the serve extra: "
        'pip install -c constraints.txt -e ".[serve]" in a clone of dit-trt'
    ]
