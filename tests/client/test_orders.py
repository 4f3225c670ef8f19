"""Orders of the client library: what a real broker makes of them, and what ends the wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from penstock.client import Client, PenstockError
from penstock.wire.errors import BAD_INPUT, CANCELLED, DEADLINE, NOT_FOUND, TOO_LARGE, UNAVAILABLE
from penstock.wire.messages import MAX_CONFIG

if TYPE_CHECKING:
    from tests.client.serving import Server


@pytest.fixture(scope="module")
def alone(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A broker without workers."""
    with serving.Server(tmp_path_factory.mktemp("alone")) as running:
        running.start("broker")
        yield running


@pytest.fixture
def lonely(alone: Server) -> Iterator[Client]:
    with Client(alone.runtime, timeout=20.0) as client:
        yield client


def refused(call: Any, *arguments: Any, **options: Any) -> PenstockError:
    with pytest.raises(PenstockError) as error:
        call(*arguments, **options)
    return error.value


def test_a_server_without_workers_says_so(lonely: Client) -> None:
    for call in (lonely.load_model, lonely.unload_model):
        error = refused(call, "net")
        assert (error.code, error.message[:39]) == (UNAVAILABLE, "no worker has joined this server yet; t")
    assert (lonely.models(), lonely.routes(), lonely.repository()) == ([], [], "")


def test_what_cannot_be_ordered_is_refused_before_it_is_sent(lonely: Client) -> None:
    assert refused(lonely.load_model, "../net").code == BAD_INPUT
    assert refused(lonely.load_model, "").code == BAD_INPUT
    assert refused(lonely.load_model, "net", "x" * (MAX_CONFIG + 1)).code == TOO_LARGE
    assert refused(lonely.load_model, "net", timeout=0).code == BAD_INPUT


def test_nobody_there_is_said_in_time(tmp_path: Path) -> None:
    with Client(tmp_path / "nowhere") as client:
        assert "no Penstock broker answered at" in refused(client.load_model, "net", timeout=0.05).message


def test_a_closed_client_orders_nothing(alone: Server) -> None:
    client = Client(alone.runtime, timeout=20.0)
    client.models()
    client.close()
    assert refused(client.load_model, "net").code == CANCELLED


def test_a_callback_of_a_future_does_not_wait(client: Client) -> None:
    errors: list[PenstockError] = []
    ended = threading.Event()

    def callback(future: Any) -> None:
        errors.append(refused(client.load_model, "wide"))
        ended.set()

    client.submit("strings", {"x": ["a"]}).add_done_callback(callback)
    assert ended.wait(20)
    assert "a callback of a future cannot wait" in errors[0].message


def test_a_model_that_is_there_is_loaded(client: Client) -> None:
    client.load_model("strings", timeout=20)
    assert {route.name: route.versions for route in client.routes()}["strings"] == ("1",)


def test_a_repository_that_is_followed_takes_no_other_orders(client: Client, models: Path) -> None:
    assert client.repository() == str(models)
    assert refused(client.load_model, "nope", timeout=20).code == NOT_FOUND
    for error in (refused(client.unload_model, "strings"), refused(client.load_model, "strings", "{}")):
        assert error.code == BAD_INPUT
        assert error.message.startswith("explicit model load / unload is not allowed")


def test_an_order_that_takes_too_long_goes_on(client: Client, server: Server) -> None:
    with server.worker_stopped():
        error = refused(client.load_model, "strings", timeout=0.2)
    assert error.code == DEADLINE
    assert error.message.startswith("the load of model 'strings' has not ended within 0.2 s; it goes on")
    client.load_model("strings", timeout=20)


def test_closing_ends_the_wait(server: Server) -> None:
    client = Client(server.runtime, timeout=20.0)
    client.models()
    errors: list[PenstockError] = []
    with server.worker_stopped():
        thread = threading.Thread(target=lambda: errors.append(refused(client.load_model, "strings", timeout=20)))
        thread.start()
        client.models()
        client.close()
        thread.join(20)
    assert [error.code for error in errors] == [CANCELLED]
