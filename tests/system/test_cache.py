"""Answers that are kept, by real gateways that share them: across versions, replacements, stops and kills."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gateway.test_cacheredis import Server as Redis
from tests.system.models import write
from tests.system.servers import DEADLINE_S, Server, StartServer, wait_for
from tests.system.test_changing import constant, put

INPUTS_MAX = 20  # that are asked for: so most are kept


def cached(models: Path, version: int, name: str = "net") -> Path:
    (models / name).mkdir(parents=True, exist_ok=True)
    (models / name / "model.toml").write_text("response_cache = true\nmax_batch_size = 1024\n")
    return put(models, version, name)


def body_of(number: int, rows: int = 1) -> bytes:
    tensor = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "data": [float(number), 0.0] * rows}
    return json.dumps({"inputs": [tensor]}).encode()


class Told(NamedTuple):
    """An answer. ``content``: which content has computed it, by its numbers; ``began``, ``ended``: when it was asked
    for, and was there."""

    content: int
    version: str
    how: str
    began: float
    ended: float


class Connection:
    """A client of one gateway, as long as that lives."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)

    def ask(self, number: int, rows: int = 1) -> Told:
        began = time.monotonic()
        self._connection.request("POST", "/v2/models/net/infer", body_of(number, rows))
        response = self._connection.getresponse()
        content = json.loads(response.read())
        assert response.status == 200, content
        data = content["outputs"][0]["data"]
        assert data[0] - data[1] == number, "it is the answer to other inputs"
        how = response.getheader("Penstock-Cache") or ""
        return Told(int(data[1]), content["model_version"], how, began, time.monotonic())

    def close(self) -> None:
        self._connection.close()


def ask(server: Server, number: int = 0, rows: int = 1) -> Told:
    connection = Connection(server)
    try:
        return connection.ask(number, rows)
    finally:
        connection.close()


def hits(server: Server, name: str = "hits") -> float:
    series = server.metrics().items()
    return sum(value for key, value in series if key.startswith(f"penstock_cache_{name}_total"))


def kept(server: Server, number: int = 0) -> Told:
    """Ask until the answer was kept."""

    def found() -> Told | None:
        told = ask(server, number)
        return told if told.how == "hit" else None

    told: Told = wait_for(found, "an answer that is kept")
    return told


@contextmanager
def load(server: Server, clients: int = 6) -> Iterator[list[Told]]:
    """Clients that ask one after another, for few inputs, until it ends; what they were told."""
    found: list[Told] = []
    end = threading.Event()
    problems: list[str] = []

    def run() -> None:
        connection = Connection(server)
        try:
            while not end.is_set():
                found.append(connection.ask(random.randrange(INPUTS_MAX)))
        except (AssertionError, OSError, http.client.HTTPException) as error:
            problems.append(repr(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert problems == []


def test_gateways_share_what_is_kept(start_server: StartServer, tmp_path: Path) -> None:
    cached(tmp_path / "models", 1)
    server = start_server(str(tmp_path / "models"), "--gateways=2")

    def served() -> set[str]:
        series = server.metrics().items()
        return {key for key, value in series if key.startswith("penstock_cache_hits_total") and value >= 20}

    with load(server, clients=16):
        wait_for(lambda: len(served()) == 2, "hits of both gateways")
    entries = {value for key, value in server.metrics().items() if key.startswith("penstock_cache_entries")}
    assert entries == {float(INPUTS_MAX)}, "they do not keep the same"
    assert len(list(server.runtime.glob("responses-*[0-9]"))) == 1
    status, _, body = server.request("GET", "/v2/models/net/stats")
    [stats] = json.loads(body)["model_stats"]
    assert status == 200
    assert stats["inference_stats"]["cache_hit"]["count"] >= 20
    assert stats["inference_stats"]["cache_hit"]["ns"] > 0
    assert server.metrics()['nv_cache_num_hits_per_model{model="net",version="1"}'] >= 20


def test_versions_that_follow_each_other_are_never_mixed(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    cached(models, 1)
    server = start_server(str(models), "--gateways=2", "--workers=2")
    with load(server) as found:
        for version in range(1, 6):
            if version > 1:
                put(models, version)
            wait_for(
                lambda version=version: [  # type: ignore[misc]
                    told for told in found if told.version == str(version) and told.how == "hit"
                ],
                f"hits of version {version}",
            )
    for told in found:
        assert told.version == str(told.content), f"{told} is of another version than it says"
    assert {told.how for told in found} >= {"hit", "miss"}
    check_each_moves_on(found)


def check_each_moves_on(found: list[Told]) -> None:
    """Of the requests that were asked once all gateways had long heard of a version none is of an older one."""
    first = {told.content: told.ended for told in sorted(found, key=lambda told: -told.ended)}
    for told in found:
        later = [content for content, at in first.items() if at + 2.0 < told.began]
        assert told.content >= max(later, default=0), f"{told} is too old"


def replace_content(models: Path, content: int) -> None:
    """Version 1 with other weights in its place."""
    new = write(models.parent / f"content-{content}", "net", constant(content), "1")
    os.replace(new, models / "net" / "1" / "model.onnx")


@pytest.mark.parametrize("gateways", [1, 2])
def test_what_is_replaced_in_its_place_is_never_answered_with_what_was_there_before(
    start_server: StartServer, tmp_path: Path, gateways: int
) -> None:
    models = tmp_path / "models"
    cached(models, 1)
    server = start_server(str(models), f"--gateways={gateways}")
    with load(server) as found:
        for content in (1, 2, 3, 1, 4):
            since = time.monotonic()
            if content != 1 or len(found) > 100:
                replace_content(models, content)
            wait_for(
                lambda content=content, since=since: [  # type: ignore[misc]
                    told for told in found if told.content == content and told.how == "hit" and told.began > since
                ],
                f"hits of content {content}",
            )
    order = order_of(found)
    assert order == [1, 2, 3, 1, 4], f"contents came in the order {order}"


def order_of(found: list[Told]) -> list[int]:
    """In which contents were seen. Who asks while one takes the place of another may get either; but none that was
    asked for after the next had been seen is of the one before."""
    first: list[tuple[int, float]] = []  # contents, and when each was first seen
    for told in sorted(found, key=lambda told: told.ended):
        if not first or (first[-1][0] != told.content and told.began > first[-1][1]):
            first.append((told.content, told.ended))
    return [content for content, _ in first]


def test_two_workers_that_are_replaced_one_after_another_leave_nothing_old(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    cached(models, 1)
    server = start_server(str(models), "--workers=2")
    with load(server) as found:
        for content in (2, 3):
            replace_content(models, content)
            wait_for(
                lambda content=content: [  # type: ignore[misc]
                    told for told in found if told.content == content and told.how == "hit"
                ],
                f"hits of content {content}",
            )
            first = min(told.began for told in found if told.content == content and told.how == "hit")
            count = len(found)
            wait_for(lambda count=count: len(found) > count + 500, "more answers")  # type: ignore[misc]
            old = [told for told in found if told.began > first and told.content != content]
            assert old == [], "kept answers of all workers are of the new content, and this is older"


def test_a_gateway_that_is_stopped_or_killed_leaves_the_others_their_answers(
    start_server: StartServer, tmp_path: Path
) -> None:
    cached(tmp_path / "models", 1)
    server = start_server(str(tmp_path / "models"), "--gateways=2")
    for number in range(INPUTS_MAX):
        kept(server, number)
    one, other = server.children("gateway")
    for stop in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(one, stop)
        answered = 0
        for number in range(60):
            connection = http.client.HTTPConnection(server.host, server.port, timeout=1.0)
            try:
                connection.request("POST", "/v2/models/net/infer", body_of(100 + number % 30))
                content = json.loads(connection.getresponse().read())
                assert content["outputs"][0]["data"] == [101.0 + number % 30, 1.0]
                answered += 1
            except OSError:
                pass  # the kernel gave it to the one that is stopped
            finally:
                connection.close()
            if answered >= 20:
                break
        assert answered >= 20
    wait_for(lambda: len(set(server.children("gateway")) - {one}) == 2, "the gateway to be started anew")
    assert other in server.children("gateway")
    assert kept(server, 3).content == 1


def test_a_load_of_many_answers_stays_within_its_bytes(start_server: StartServer, tmp_path: Path) -> None:
    cached(tmp_path / "models", 1)
    limits = tmp_path / "limits.toml"
    limits.write_text("[gateway]\nresponse_cache_bytes = 1048576\n")
    server = start_server(str(tmp_path / "models"), "--gateways=2", f"--config={limits}")
    connection = Connection(server)
    for number in range(400):
        assert connection.ask(number, rows=32 * 8 if number % 2 else 1000).content == 1
    connection.close()
    wait_for(lambda: hits(server, "evictions") > 100, "answers to go")
    series = server.metrics()
    assert 0 < max(value for key, value in series.items() if key.startswith("penstock_cache_bytes")) <= 1 << 20
    [file] = server.runtime.glob("responses-*/data.mdb")
    assert file.stat().st_blocks * 512 <= 1 << 20
    # The other gateway opens it with the first request that it gets, and says nothing of it until it has.
    assert wait_for(lambda: ask(server, 399, rows=32 * 8).how, "a gateway to have it open") == "hit"


def test_servers_share_it_in_redis(start_server: StartServer, tmp_path: Path) -> None:
    redis = Redis(tmp_path)
    try:
        cached(tmp_path / "models", 1)
        limits = tmp_path / "limits.toml"
        limits.write_text(f'[gateway]\nresponse_cache_store = "{redis.url}"\nresponse_cache_wait_ms = 5000\n')
        server = start_server(str(tmp_path / "models"), "--gateways=2", f"--config={limits}")
        connections = [Connection(server) for _ in range(16)]
        hits = ["hit"] * len(connections)  # by both gateways, of which one may be later than the other
        wait_for(lambda: [connection.ask(0).how for connection in connections] == hits, "an answer that is kept")
        redis.process.send_signal(signal.SIGSTOP)
        redis.process.send_signal(signal.SIGKILL)
        assert [connection.ask(0).content for connection in connections] == [1] * 16
        for connection in connections:
            connection.close()
    finally:
        redis.close()
