"""Where a gateway listens, and a gateway that finds no broker."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.gateway.listening import listen, url_of
from penstock.gateway.options import GatewayOptions
from penstock.gateway.process import GatewaySettings, _make_arena
from penstock.wire.arena import Arena
from penstock.wire.endpoints import BrokerAddress, EndpointError, RuntimeDir


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A socket that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize(
    ("where", "url"), [("127.0.0.1:0", "http://127.0.0.1:"), ("localhost:0", "http://"), ("[::1]:0", "http://[::1]:")]
)
def test_free_port_is_found(where: str, url: str) -> None:
    with listen(where) as listener:
        assert url_of(listener).startswith(url)
        assert not url_of(listener).endswith(":0")


def test_socket_is_bound_and_does_not_listen_yet() -> None:
    with listen("127.0.0.1:0") as listener, socket.socket() as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(listener.getsockname())
        listener.listen()
        with socket.create_connection(listener.getsockname(), 10):
            pass


def test_port_in_use_is_refused_with_advice(taken: socket.socket) -> None:
    where = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(EndpointError) as raised:
        listen(where)
    assert str(raised.value) == (
        f"cannot listen on {where}: Address already in use; choose another with --http HOST:PORT"
    )


def test_port_of_a_server_that_has_just_ended_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address, 10) as client:
            server.accept()[0].close()  # whoever closes first leaves its port to time out
            assert client.recv(1) == b""
    with listen(f"127.0.0.1:{address[1]}") as listener:
        assert listener.getsockname() == address


@pytest.mark.parametrize("where", ["", "8000", ":8000", "127.0.0.1", "127.0.0.1:", "a:b", "127.0.0.1:65536", "::1:80"])
def test_what_is_no_host_and_port_is_refused(where: str) -> None:
    with pytest.raises(EndpointError, match="not of the form HOST:PORT"):
        listen(where)


@pytest.mark.parametrize("where", ["no-such-host.invalid:80", "192.0.2.1:0"])
def test_host_that_is_not_this_one_is_refused(where: str) -> None:
    with pytest.raises(EndpointError, match=r"cannot listen on .*; choose another"):
        listen(where)


def test_inherited_socket_is_taken(taken: socket.socket) -> None:
    with listen(f"fd://{os.dup(taken.fileno())}") as listener:
        assert listener.getsockname() == taken.getsockname()
        with socket.create_connection(taken.getsockname(), 10):
            listener.accept()[0].close()


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "99999"])
def test_inherited_descriptor_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(EndpointError, match=f"^the inherited descriptor '{number}' is no socket"):
        listen(f"fd://{number}")


def test_inherited_file_is_no_socket(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(EndpointError, match="is no socket"):
        listen(f"fd://{file.fileno()}")


LISTEN = """
import os
from penstock.gateway.listening import listen, url_of
os.dup2({fd}, 3)
os.environ |= {{"LISTEN_PID": str({pid}), "LISTEN_FDS": "{count}"}}
print(url_of(listen("127.0.0.1:0")))
"""


def listening(fd: int, pid: str, count: str) -> str:
    """The URL of a process that is started as systemd does."""
    script = LISTEN.format(fd=fd, pid=pid, count=count)
    done = subprocess.run([sys.executable, "-c", script], pass_fds=(fd,), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_socket_from_systemd_is_taken(taken: socket.socket) -> None:
    assert listening(taken.fileno(), "os.getpid()", "1") == url_of(taken)


@pytest.mark.parametrize(("pid", "count"), [("1", "1"), ("os.getpid()", "0")])
def test_socket_for_somebody_else_is_not_taken(taken: socket.socket, pid: str, count: str) -> None:
    assert listening(taken.fileno(), pid, count) not in ("", url_of(taken))


class Gateway:
    """A gateway process of which the broker is missing, and what it tells whoever has started it."""

    def __init__(self, runtime: Path, listener: socket.socket) -> None:
        self.address: tuple[str, int] = listener.getsockname()
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(runtime / "notify"))
        self._channel.settimeout(60)
        (runtime / "run").mkdir(mode=0o700)  # the broker makes it, at other times
        fd = listener.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock.bin", "gateway", f"--http=fd://{fd}", f"--runtime-dir={runtime / 'run'}"],
            env=os.environ | {"NOTIFY_SOCKET": str(runtime / "notify")},
            pass_fds=(fd,),
        )

    def told(self) -> bytes:
        return self._channel.recv(100)

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        client = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            client.request(method, path, body)
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._channel.close()


@pytest.fixture
def gateway(tmp_path: Path, taken: socket.socket) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path, taken)
    yield gateway
    gateway.close()


def test_gateway_without_a_broker_says_so_and_ends_when_told(gateway: Gateway) -> None:
    assert gateway.told() == b"READY=1"
    assert gateway.ask("GET", "/v2/health/live") == (200, b"")
    assert gateway.ask("GET", "/v2/health/ready") == (503, b'{"error":"Server not ready: no broker answers"}')
    status, body = gateway.ask("POST", "/v2/models/digits/infer", "{}")
    assert (status, b"no broker answers at" in body) == (503, True)
    status, body = gateway.ask("GET", "/metrics")
    assert (status, b"penstock_broker_up 0.0" in body, b"penstock_http_connections{" in body) == (200, True, True)
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.told() == b"STOPPING=1"
    assert gateway.process.wait(30) == 0


@pytest.mark.parametrize("alone", [True, False])
def test_where_http_is_stays_written_down_while_somebody_is_there(
    gateway: Gateway, taken: socket.socket, tmp_path: Path, alone: bool
) -> None:
    """``alone``: nobody else has the socket, as a launcher has, and other gateways have."""
    assert gateway.told() == b"READY=1"
    sign = tmp_path / "run" / "http"
    assert sign.read_text() == url_of(taken) + "\n"
    if alone:
        taken.close()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(30) == 0
    assert sign.exists() is not alone


BROKEN = """
import sys
from pathlib import Path
from penstock.bin.run import run
from penstock.client.link import Link
from penstock.gateway.process import GatewayProcess, GatewaySettings
from penstock.wire.endpoints import parse_broker

def tick(link):
    raise ZeroDivisionError("a defect")

Link.tick = tick
settings = GatewaySettings(broker=parse_broker(Path(sys.argv[1])), http="127.0.0.1:0")
run("gateway", "text", "info", 0, lambda: GatewayProcess(settings))
"""


def test_defect_in_the_core_ends_the_process(tmp_path: Path) -> None:
    """The loop would go on with what is half done, and nobody would start it again."""
    command = [sys.executable, "-c", BROKEN, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 70
    assert "defect; what this process knows cannot be relied on" in ended.stderr
    assert "ZeroDivisionError: a defect" in ended.stderr


# --- shared memory ---


def arena_of(broker: BrokerAddress, arena_bytes: int) -> Arena | None:
    return _make_arena(GatewaySettings(broker=broker, options=GatewayOptions(arena_bytes=arena_bytes)))


def test_arena_is_as_large_as_the_configuration_says(tmp_path: Path) -> None:
    local = BrokerAddress(RuntimeDir(tmp_path))
    assert arena_of(local, 0) is None
    for size, expected in ((1 << 20, 1 << 20), (-1, 256 << 20)):
        arena = arena_of(local, size)
        assert arena is not None
        assert arena.size <= expected
        assert size < 0 or arena.size == expected
        arena.close()


def test_gateway_on_another_host_has_no_arena() -> None:
    assert arena_of(BrokerAddress(None, "127.0.0.1", 5), -1) is None


def test_arena_that_does_not_fit_is_not_made_and_its_limit_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert arena_of(BrokerAddress(RuntimeDir(tmp_path)), 1 << 60) is None
    [said] = caplog.records
    assert said.__dict__["fields"]["reason"].endswith("([gateway] arena_bytes in the configuration)")
