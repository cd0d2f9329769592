"""What `dit-trt serve` does under load: rate, latency and processor time by clients, micro-batching off and on.

    python -m dit_trt.tooling.serve_load --output load.md

starts a server for each `--batches` on a free port of this machine; they take turns, so that a busy hour hits all of
them. A client asks again as soon as it has its answer. Writes a Markdown table, and the numbers as JSON beside it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..engines.bundle import find_bundle
from ..engines.errors import UserError
from .cli.common import dit_command, path_option, progress, say, show
from .timed_steps import cores

SERVE = "from dit_trt.tooling.cli import main; main(prog_name='dit-trt')"


@dataclass
class Load:
    """What one server did with so many clients at once. latencies, batches: of each answer.

    seconds: of all rounds; processor: the server's seconds of it, which other work on the machine hardly changes.
    """

    max_batch: int
    clients: int
    seconds: float = 0.0
    processor: float = 0.0
    latencies: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.seconds


@click.command()
@click.option("--bundle", metavar="DIR|NAME", help="Which bundle (default: the newest).")
@click.option("--clients", default="1,4,16", show_default=True, help="How many at once.")
@click.option("--batches", default="1,4", show_default=True, help="--max-batch of each server; 1 is off.")
@click.option("--requests", type=click.IntRange(1), default=16, show_default=True, help="Of a client count and round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="All take turns so often.")
@click.option("--steps", type=click.IntRange(1, 1000), default=100, show_default=True, help="Of every request.")
@click.option("--output", metavar="FILE.md", required=True, help="Write the table here, the numbers beside it.")
@dit_command
def command(
    bundle: str | None, clients: str, batches: str, requests: int, rounds: int, steps: int, output: str
) -> dict:
    """Time `dit-trt serve` with several clients at once."""
    path = path_option(output)
    if path is None or path.suffix == ".json" or not path.parent.is_dir():
        raise UserError(f"cannot write {output}; give --output a file like load.md in a folder that exists")
    folder = find_bundle(bundle).folder
    loads = [Load(batch, n) for n in _numbers("--clients", clients) for batch in _numbers("--batches", batches)]
    with contextlib.ExitStack() as stack:
        sizes = sorted({load.max_batch for load in loads})
        say(f"starting {len(sizes)} servers of {folder.name}")
        ports = {size: stack.enter_context(_server(folder, size, loads[-1].clients)) for size in sizes}
        done = stack.enter_context(progress("loading", rounds * len(loads)))
        seeds = count()
        for turn in range(rounds):
            for i, load in enumerate(loads):
                _round(load, ports[load.max_batch], max(requests, load.clients), steps, seeds)
                done(turn * len(loads) + i + 1)
    return _write(path, folder, steps, loads)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{option} {text} must be whole numbers from 1 on, like 1,4,16")
    return sorted(numbers)


@contextlib.contextmanager
def _server(bundle: Path, max_batch: int, places: int) -> Iterator[int]:
    """A server in a process of its own -> its port."""
    options = ["--port", "0", "--max-batch", str(max_batch), "--queue", str(places), "--max-steps", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", str(bundle), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().rpartition(":")[2].strip()
        if not port.isdigit():
            raise UserError(f"`dit-trt serve {bundle}` did not start; start it yourself to see why")
        yield int(port)
    finally:
        process.terminate()
        process.communicate()


def _round(load: Load, port: int, requests: int, steps: int, seeds: Iterator[int]) -> None:
    """So many requests by all clients together, added to the load. Raises UserError for another answer than a sound."""
    left, lock = count(1), threading.Lock()
    faults: list[str] = []

    def client() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            while next(left) <= requests and not faults:
                body: dict[str, Any] = {"prompt": "dog barking", "steps": steps, "seed": next(seeds)}
                begun = time.perf_counter()
                try:
                    connection.request(
                        "POST", "/v1/audio/generations", json.dumps(body), {"Content-Type": "application/json"}
                    )
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    faults.append(str(error))
                    return
                with lock:
                    load.latencies.append(time.perf_counter() - begun)
                    load.batches.append(int(answer.headers.get("X-Batch", 0)))
                if answer.status != 200:
                    faults.append(content.decode(errors="replace"))

    threads = [threading.Thread(target=client) for _ in range(load.clients)]
    begun, before = time.perf_counter(), _processor(port)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds += time.perf_counter() - begun
    load.processor += _processor(port) - before
    if faults:
        raise UserError(f"the server refused a request: {faults[0]}")


def _processor(port: int) -> float:
    """Seconds of the processor that the server has taken so far."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("process_cpu_seconds_total "))


def load_table(loads: Sequence[Load]) -> str:
    """As Markdown; a rate is compared with that of the smallest batch at as many clients."""
    titles = ("clients", "`--max-batch`", "clips a batch", "requests/s", "of the first's", "p50, s", "p95, s")
    lines = [f"| {' | '.join((*titles, 'processor, s a clip'))} |", f"|{'---|' * (len(titles) + 1)}"]
    for load in loads:
        p50, p95 = np.percentile(load.latencies, (50, 95))
        first = next(other for other in loads if other.clients == load.clients)
        cells = [f"{load.rate:.2f}", f"{load.rate / first.rate:.2f}", f"{p50:.2f}", f"{p95:.2f}"]
        cells = [f"{np.mean(load.batches):.1f}", *cells, f"{load.processor / len(load.latencies):.2f}"]
        lines.append(f"| {load.clients} | {load.max_batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(path: Path, bundle: Path, steps: int, loads: Sequence[Load]) -> dict:
    table = load_table(loads)
    head = f"{bundle.name}, {steps} steps, {cores()} cores, {len(loads[0].latencies)} requests or more a row"
    path.write_text(f"{head}.\n\n{table}\n", "utf-8")
    numbers = {"bundle": bundle.name, "steps": steps, "cores": cores(), "loads": [asdict(load) for load in loads]}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    show(table)
    say(f"written to {path} and {path.with_suffix('.json')}")
    return numbers


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.serve_load")
