"""Whether a clip or its seat (a node that is played, without Ray) is to blame for lost workers; what is no cluster."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hearing import installed

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.errors import UserError
from dit_trt.tooling.batch import cluster
from dit_trt.tooling.batch.clips import Failed
from dit_trt.tooling.batch.maker import failed

CLIPS, DEADLY = 12, 4


class Died(Exception):
    """As Ray tells of an actor's death."""


class OneNode:
    """What `Cluster` uses of the module `ray`: a node of one processor; a task is run when it is asked for."""

    exceptions = SimpleNamespace(RayError=Died)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 1}}]

    def remote(self, kind: type) -> SimpleNamespace:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: _actor(kind(*given))))

    def wait(self, refs: Sequence[Any], **_: object) -> tuple[Sequence[Any], Sequence[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Callable[[], Any]) -> Any:
        return ref()

    def kill(self, actor: object) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _actor(worker: Any) -> SimpleNamespace:
    tasks = {name: SimpleNamespace(remote=partial(partial, getattr(worker, name))) for name in ("open", "make")}
    return SimpleNamespace(**tasks)


class Maker:
    backend = "none"

    def make(self, clips: cluster.Batch) -> Iterator[Failed]:
        for clip in clips:
            if clip[0].id == str(DEADLY):
                raise Died("out of memory")
            yield failed(clip, "made")


def test_a_deadly_clip_does_not_close_the_only_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)  # type: ignore[arg-type]
    monkeypatch.setattr(cluster, "_connected", lambda address: OneNode())
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0)
    batches = [[(Caption(str(i), "rain"), i)] for i in range(CLIPS)]
    with cluster.Cluster("auto", None, False, lambda told: None) as one:
        made: list[Any] = [*one.make(None, batches, lambda *_: Maker())]  # type: ignore[arg-type,return-value]
    errors = {each.id: each.error for each in made}
    assert len(made) == len(errors) == CLIPS
    assert errors.pop(str(DEADLY)).startswith("3 workers were lost while making it (out of memory?): Died")
    assert {*errors.values()} == {"made"}
    assert len([worker for worker in one.workers if worker["error"]]) == cluster.LIVES


def test_what_listens_and_is_no_cluster_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed("ray", "pip install ray")
    monkeypatch.setattr(cluster, "HEALTH_SECONDS", 4)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"no Ray cluster answers at {address} .it is none, or it is ill.; give --ray auto"
        ):
            cluster._connected(address)
