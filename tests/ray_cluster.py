"""`dit-trt batch --ray` on a real Ray cluster of two nodes that suffers; a script that prints what happened as JSON.

It runs in network and process namespaces of its own: Ray listens at the machine's outer address whatever it is told,
and so nothing of it outlives the script.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hearing import installed
from processes import COMMAND

from dit_trt.tooling.batch import cluster

WORDS = ["dog barking", "rain", "a puppy woofs", "dog barking rain"]
CLIPS, SECONDS, STEPS = 40, 0.3, 2
KILLS = 2  # of the driver
LIMIT = 240  # seconds for everything


def isolated() -> list[str]:
    """A command's beginning that gives it namespaces of its own. Without, the test skips here and fails in CI."""
    installed("ray", 'pip install -c constraints.txt -e ".[ray]"')
    own = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    for prefix in (own, [*own, "--map-root-user"]):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    told = "unshare --net --pid is not permitted here, and without it Ray would listen at the outer address"
    return pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)


def on_a_cluster(folder: Path, bundle: Path) -> dict[str, Any]:
    """All scenarios -> by name what each came to; the clips are in folders of their names."""
    prefix = isolated()
    temporary = tempfile.mkdtemp(prefix="ray-")  # sockets are in it, whose paths must be short
    environment = {
        **os.environ,
        **{"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_TMPDIR": temporary},
        **{"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},  # 15 by default: starved where others work
    }
    command = [*prefix, sys.executable, __file__, str(folder), str(bundle)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)  # and nothing else, whatever Ray prints


class Desk:
    """The cluster and the means to hurt it. `run` is a driver in this process, `start` one in another."""

    def __init__(self, folder: Path, bundle: Path):
        from ray.cluster_utils import Cluster

        from dit_trt.calib_data.reader import read_captions
        from dit_trt.engines.bundle import Bundle

        self.folder, self.bundle = folder, Bundle(bundle)
        self.file = folder / "captions.jsonl"
        lines = [{"id": f"{i:03}", "caption": WORDS[i % len(WORDS)]} for i in range(CLIPS)]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.captions = read_captions(self.file)
        small = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self.cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        self._small, self.rng = small, random.Random(0)
        self.node = self.cluster.add_node(**small)

    def run(
        self,
        name: str,
        opener: str | None = None,
        at: dict[int, Callable[[], object]] | None = None,
        captions: dict[str, str] | None = None,
        **more: object,
    ) -> dict[str, Any]:
        """at: so many clips -> what is done then."""
        import ray_faults

        from dit_trt.calib_data.reader import Caption
        from dit_trt.tooling.batch.batch import generate_batch
        from dit_trt.tooling.batch.store import open_store

        texts = self.captions if captions is None else [Caption(i, text) for i, text in captions.items()]
        if opener is not None:
            more["opener"] = partial(getattr(ray_faults, opener), self.folder / f"{name}-workers")
        said: list[str] = []

        @contextlib.contextmanager
        def watch(what: str, total: int) -> Iterator[Callable[[int], object]]:
            print(f"{what}: Ray would say this on stdout")
            yield lambda n: (at or {}).get(n, lambda: None)()

        begun = time.monotonic()
        done = generate_batch(
            *(self.bundle, texts, open_store(str(self.folder / name)), SECONDS, {"steps": STEPS}),
            **{"ray": self.cluster.address, "watch": watch, "say": said.append, **more},  # type: ignore[arg-type]
        )
        return {**asdict(done), "said": said, "took": time.monotonic() - begun}

    def start(self, name: str) -> subprocess.Popen[str]:
        made = ["--bundle", self.bundle.folder, "--steps", STEPS, "--seconds", SECONDS]
        words = ["batch", self.file, "--output", self.folder / name, "--ray", self.cluster.address, "--json", *made]
        command = [sys.executable, "-c", COMMAND, *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill_a_worker(self) -> None:
        """Whoever is chosen."""
        os.kill(self.rng.choice(sorted(_workers())), signal.SIGKILL)

    def remove_the_node(self) -> None:
        """With its worker, as a machine that loses its power."""
        raylet = self.node.all_processes["raylet"][0].process.pid
        there = [worker for worker, parent in _workers().items() if parent == raylet]
        self.cluster.remove_node(self.node, allow_graceful=False)
        for worker in there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def add_the_node(self) -> None:
        self.node = self.cluster.add_node(**self._small)


def _workers() -> dict[int, int]:
    """Workers' processes and their parents; the process namespace holds this cluster's alone."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _scenarios(desk: Desk) -> Iterator[tuple[str, dict[str, Any]]]:
    few = {"a": "rain", "b": "a cat", "c": "dog barking", "d": "the siren", "e": "a puppy", "f": "the rain"}
    yield "plain", desk.run("plain", "together")
    yield "one", desk.run("one", workers=1, batch=4)
    yield "nothing left", desk.run("plain")
    yield "faulty", desk.run("faulty", "faulty", captions=few, batch=3)
    yield "nowhere", desk.run("nowhere", "nowhere", captions=few)
    yield "deadly", desk.run("nowhere", "deadly", captions=few)
    yield "mended", desk.run("nowhere", captions=few)
    half = CLIPS // 2
    kills = {desk.rng.randrange(4, half): desk.kill_a_worker, desk.rng.randrange(half, CLIPS - 4): desk.kill_a_worker}
    yield "worker killed", desk.run("worker-killed", "together", at=kills)
    gone = {desk.rng.randrange(5, half): desk.remove_the_node}
    yield "node removed", desk.run("node-removed", "together", at=gone, batch=2)
    yield "node joins", desk.run("node-joins", "together", at={3: desk.add_the_node})
    lines = desk.folder / "driver-killed" / "clips.jsonl"
    limit, counts = time.monotonic() + 60, []
    while time.monotonic() < limit:
        driver = desk.start("driver-killed")
        target = 10 * len(counts) + desk.rng.randrange(1, 10)
        while len(counts) < KILLS and driver.poll() is None and time.monotonic() < limit:
            if lines.is_file() and lines.read_bytes().count(b"\n") >= target:
                driver.kill()
                break
            time.sleep(0.002)
        out, error = driver.communicate(timeout=60)
        if driver.returncode == -signal.SIGKILL:
            counts.append(lines.read_bytes().count(b"\n"))
            continue
        yield "driver killed", {"counts": counts, "code": driver.returncode, "stderr": error, **json.loads(out or "{}")}
        break


def _loopback_up() -> None:
    """What `ip link set lo up` does, which not every system has: SIOCSIFFLAGS of IFF_UP and IFF_RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))


def main() -> None:
    folder, bundle = map(Path, sys.argv[1:])
    _loopback_up()
    cluster.LOOK_SECONDS = 0.3
    desk = Desk(folder, bundle)
    print(json.dumps(dict(_scenarios(desk))), flush=True)
    os._exit(0)  # the cluster ends with the namespace: faster than it would shut down


if __name__ == "__main__":
    main()
