"""One POST to a stranger: within its time, to the address that was checked, whatever answers there."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.jobs.address import CallbackRefused, Target, read_networks
from penstock.jobs.post import PostFailed, look_up, post
from tests.jobs.conftest import RequireCommand
from tests.jobs.strangers import Stranger, certificate, raw

LOOPBACK = read_networks(["127.0.0.0/8"])


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as stranger:
        yield stranger


def send(
    port: int,
    body: bytes = b"{}",
    *,
    host: str = "stranger.example",
    addresses: tuple[str, ...] = ("127.0.0.1",),
    timeout_s: float = 20.0,
    answer_bytes_max: int = 1000,
    tls: ssl.SSLContext | None = None,
    path: str = "/",
) -> int:
    return post(
        Target(tls is not None, host, port, path),
        {"X-Test": "yes"},
        body,
        allowed=LOOPBACK,
        timeout_s=timeout_s,
        answer_bytes_max=answer_bytes_max,
        tls=tls,
        look=lambda *_: addresses,
    )


def says(answer: bytes) -> Callable[[socket.socket], None]:
    """Reads a request with its body of two bytes, and says this."""

    def talk(connection: socket.socket) -> None:
        got = b""
        while not got.endswith(b"\r\n\r\n{}"):
            got += connection.recv(1 << 16)
        connection.sendall(answer)

    return talk


def test_what_is_sent(stranger: Stranger) -> None:
    body = bytes(range(256)) * 10_000
    assert send(stranger.port, body, path="/a?b=%20") == 200
    call = stranger.next()
    assert (call.path, call.body) == ("/a?b=%20", body)
    assert call.headers == {
        "host": f"stranger.example:{stranger.port}",
        "x-test": "yes",
        "content-length": str(len(body)),
        "connection": "close",
    }


@pytest.mark.parametrize("status", [200, 204, 299, 301, 307, 404, 500])
def test_every_status_is_told_and_none_is_followed(stranger: Stranger, status: int) -> None:
    stranger.says = [status]
    stranger.location = f"http://127.0.0.1:{stranger.port}/elsewhere"
    assert send(stranger.port) == status
    assert stranger.next().path == "/"
    assert stranger.calls.empty()


def test_one_address_that_may_not_be_called_is_enough(stranger: Stranger) -> None:
    with pytest.raises(CallbackRefused, match=r"stranger\.example has the address 10\.0\.0\.1, which is not public"):
        send(stranger.port, addresses=("127.0.0.1", "10.0.0.1"))
    assert stranger.calls.empty()


def test_a_name_is_looked_up_once(stranger: Stranger) -> None:
    """Whoever answers for it could say something else the second time."""
    asked: list[tuple[str, int]] = []

    def look(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    target = Target(False, "rebinding.example", stranger.port, "/")
    told = post(target, {}, b"", allowed=LOOPBACK, timeout_s=20, answer_bytes_max=1000, tls=None, look=look)
    assert (told, asked) == (200, [("rebinding.example", stranger.port)])


def test_the_next_address_is_tried(stranger: Stranger) -> None:
    assert send(stranger.port, addresses=("127.0.0.2", "127.0.0.1")) == 200
    with pytest.raises(PostFailed, match="cannot be asked: Connection refused"):
        send(stranger.port, addresses=("127.0.0.2", "127.0.0.3"))


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(PostFailed, match=r"nobody\.invalid cannot be looked up"):
        post(
            Target(False, "nobody.invalid", 80, "/"),
            {},
            b"",
            allowed=(),
            timeout_s=60,
            answer_bytes_max=10,
            tls=None,
        )


def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1" in look_up("localhost", 80)
    with pytest.raises(CallbackRefused, match="localhost has the address"):
        post(Target(False, "localhost", 80, "/"), {}, b"", allowed=(), timeout_s=60, answer_bytes_max=10, tls=None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the connection ended without an answer"),
        (b"HTTP/1.1", "the connection ended without an answer"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", r"does not speak HTTP/1\.1"),
        (b"HTTP/2 200 OK\r\n\r\n", r"does not speak HTTP/1\.1"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", r"does not speak HTTP/1\.1"),
        (b"HTTP/1.1 000 OK\r\n\r\n", r"does not speak HTTP/1\.1"),
        (b"\r\n\r\n", r"does not speak HTTP/1\.1"),
        (b"HTTP/1.1 103 Early\r\n\r\n" * 100, r"no status in 1000 bytes of answer \(callback_answer_bytes_max\)"),
        (b"HTTP/1.1 100 " + b"x" * 5000, "no status in 1000 bytes"),
    ],
)
def test_what_is_no_answer(answer: bytes, why: str) -> None:
    with raw(says(answer)) as port, pytest.raises(PostFailed, match=why):
        send(port)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.0 202 \r\n\r\n",
        b"HTTP/1.1 202\r\n\r\n",
        b"HTTP/1.1 202 Accepted\r\nX: " + b"x" * 100_000,
    ],
)
def test_what_is_one(answer: bytes) -> None:
    with raw(says(answer)) as port:
        assert send(port) == 202


def test_who_never_answers_is_given_up() -> None:
    done = threading.Event()
    with raw(lambda _: (done.wait(30), None)[1]) as port:
        began = time.monotonic()
        with pytest.raises(PostFailed, match=r"there was no answer within 0\.3 s \(callback_timeout_s\)"):
            send(port, timeout_s=0.3)
        assert time.monotonic() - began < 5.0
        done.set()


def test_who_answers_a_byte_at_a_time_is_given_up() -> None:
    def drip(connection: socket.socket) -> None:
        done = threading.Event()
        for byte in b"HTTP/1.1 " + b"x" * 10_000:
            done.wait(0.05)
            connection.sendall(bytes([byte]))

    with raw(drip) as port:
        began = time.monotonic()
        with pytest.raises(PostFailed, match=r"within 0\.4 s"):
            send(port, timeout_s=0.4)
        assert time.monotonic() - began < 5.0


def test_who_does_not_read_is_given_up() -> None:
    done = threading.Event()
    with raw(lambda _: (done.wait(30), None)[1]) as port:
        with pytest.raises(PostFailed, match=r"within 0\.3 s"):
            send(port, bytes(64 << 20), timeout_s=0.3)
        done.set()


def test_who_says_more_and_more_is_left_when_the_status_is_there() -> None:
    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(1 << 16))

    with raw(flood) as port:
        assert send(port) == 200


@pytest.fixture(scope="module")
def keys(require_command: RequireCommand, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(require_command("openssl", "openssl"), tmp_path_factory.mktemp("tls"), "stranger.example")


def trusting(path: Path | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=None if path is None else str(path))


@pytest.fixture
def secure(keys: tuple[Path, Path]) -> Iterator[Stranger]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*keys)
    with Stranger(context) as stranger:
        yield stranger


def test_tls_to_whom_the_name_belongs(secure: Stranger, keys: tuple[Path, Path]) -> None:
    body = bytes(1 << 20)
    assert send(secure.port, body, tls=trusting(keys[0])) == 200
    assert secure.next().body == body


def test_tls_to_another_name_is_refused(secure: Stranger, keys: tuple[Path, Path]) -> None:
    with pytest.raises(PostFailed, match="its certificate is not to be trusted: Hostname mismatch"):
        send(secure.port, host="other.example", tls=trusting(keys[0]))
    assert secure.calls.empty()


def test_tls_of_nobody_who_is_trusted_is_refused(secure: Stranger) -> None:
    with pytest.raises(PostFailed, match="its certificate is not to be trusted: self"):
        send(secure.port, tls=trusting(None))
    assert secure.calls.empty()


def test_tls_to_who_speaks_none_or_is_silent(stranger: Stranger) -> None:
    with pytest.raises(PostFailed, match="cannot be asked"):
        send(stranger.port, tls=trusting(None))
    done = threading.Event()
    with raw(lambda _: (done.wait(30), None)[1]) as port:
        with pytest.raises(PostFailed, match=r"within 0\.3 s"):
            send(port, tls=trusting(None), timeout_s=0.3)
        done.set()
