"""``penstock top``: what it says of a view, at every size; and on a real terminal, of a real server."""

from __future__ import annotations

import fcntl
import http.client
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from penstock.bin.cli import cli
from penstock.bin.listen import Listener, ListenError, parse
from penstock.bin.screen import Screen, bars, duration, number
from penstock.gateway.figures import GpuFigures, ModelFigures, ProcessFigures, View
from penstock.wire.metrics import ROWS
from tests.system.servers import DEADLINE_S, PENSTOCK, Process, Server, wait_for

VIEW = View(
    seconds=5.0,
    broker=True,
    gateway="gateway-0",
    problems=[],
    rate=1234.5,
    failures={},
    queue=7,
    running=3,
    p50_s=0.0012,
    p95_s=0.25,
    rows=3.5,
    batches=[1.0, 0, 3.0] + [0.0] * (len(ROWS) - 2),
    bounds=list(ROWS),
    clients=2,
    models=[ModelFigures("dense", "3", "READY", "", 2, 7, 3, 1234.5, 0.0, 0.0012, 0.25, 3.5)],
    models_left_out=0,
    processes=[
        ProcessFigures("broker", "broker", None, 0.22, 44 << 20, 0, 0, 1234.5, None, None, 0),
        ProcessFigures("cpu-0", "worker", 12.4, 0.0, 0, 0, 0, 0.0, None, None, 0),
        ProcessFigures("cpu-1", "worker", None, 0.5, 78 << 20, 256 << 20, 64 << 20, 617.0, 0.001, 0.2, 0),
    ],
)


def shown(screen: Screen, width: int = 160, height: int = 50) -> list[str]:
    """Lines as they stand on a terminal of that size."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, color_system=None, legacy_windows=False)
    console.print(screen, end="")
    return file.getvalue().splitlines()


# --- what it says ---


def test_all_of_a_view_is_shown() -> None:
    lines = shown(Screen(VIEW, "http://here", whole=True))
    text = "\n".join(lines)
    assert lines[0] == "Penstock  http://here"
    assert "requests/s 1,234   p50 1.2 ms   p95 250 ms   waiting 7   running 3   clients 2" in text
    assert "rows/batch 3.5   batches by rows 1: 25%, 4: 75%" in text
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["dense"] == ["dense", "3", "READY", "2", "1,234", "0", "7", "3", "1.2", "ms", "250", "ms", "3.5"]
    assert rows["cpu-1"] == [
        "cpu-1",
        "worker",
        "up",
        "50%",
        "78",
        "MiB",
        "25%",
        "of",
        "256",
        "MiB",
        "617",
        "1.0",
        "ms",
        "200",
        "ms",
    ]
    assert rows["cpu-0"][:6] == ["cpu-0", "worker", "missing", "for", "12", "s"]
    assert lines.index(next(line for line in lines if line.startswith("cpu-0"))) < lines.index(
        next(line for line in lines if line.startswith("broker"))
    ), "what is missing comes first"
    assert all(line == line.rstrip() for line in lines)


def test_problems_and_failures_are_named() -> None:
    changed = replace(VIEW, problems=["model x is LOADING", "requests fail"], failures={"lost": 2.5, "bad_input": 1.0})
    text = "\n".join(shown(Screen(changed, "here")))
    assert "model x is LOADING\nrequests fail" in text
    assert "failures/s 3.5  lost 2.5, bad_input 1" in text
    assert "all is well" not in text


def test_before_there_is_anything_to_compare_there_are_no_rates() -> None:
    fresh = replace(VIEW, seconds=0.0)
    text = "\n".join(shown(Screen(fresh, "here")))
    assert "requests/s -" in text
    assert "1,234" not in text


GPUS = [
    GpuFigures("GPU-1", ["cuda:0"], False, 0.934, 20 << 30, 80 << 30, 61.0, 512.3, 700.0, ["heat", "power"]),
    GpuFigures("MIG-2", ["cuda:1"], False, None, 1 << 30, 40 << 30, None, 90.0, None, []),
    GpuFigures("GPU-3", ["cuda:2"], True, None, None, None, None, None, None, []),
]


def test_gpus_have_a_table_of_their_own_where_there_are_any() -> None:
    assert "GPU of" not in "\n".join(shown(Screen(VIEW, "here", whole=True)))
    lines = shown(Screen(replace(VIEW, gpus=GPUS), "here", whole=True), width=160)
    at = next(number for number, line in enumerate(lines) if line.startswith("GPU of"))
    assert [re.split(r"  +", line.strip()) for line in lines[at : at + 4]] == [
        ["GPU of", "State", "Busy", "Memory", "Temperature", "Power", "UUID"],
        ["cuda:2", "lost", "-", "-", "-", "-", "GPU-3"],
        ["cuda:0", "heat, power", "93%", "20 GiB of 80 GiB", "61 °C", "512 of 700 W", "GPU-1"],
        ["cuda:1", "up", "-", "1.0 GiB of 40 GiB", "-", "90 W", "MIG-2"],
    ]


@pytest.mark.parametrize("height", [8, 14, 24, 50])
def test_gpus_leave_room_for_the_rest(height: int) -> None:
    many = [replace(GPUS[0], uuid=f"GPU-{number}", workers=[f"cuda:{number}"]) for number in range(16)]
    lines = shown(Screen(replace(VIEW, gpus=many), "here"), height=height)
    assert len(lines) <= height
    if height >= 24:
        assert any(line.startswith("dense") for line in lines)
        assert any(line.startswith("and ") for line in lines)


def test_why_nothing_new_comes_is_said_beside_the_last_view() -> None:
    lines = shown(Screen(VIEW, "here", lost="http://here cannot be reached"))
    assert lines[1] == "trying again: http://here cannot be reached"
    assert any(line.startswith("dense") for line in lines)
    assert shown(Screen(None, "here", lost="gone")) == ["Penstock  here", "trying again: gone"]


def test_a_name_says_nothing_to_the_terminal() -> None:
    name = "[red]m[/red]\x1b]0;owned\x07\x9b2J\r\n\u202e"
    view = replace(VIEW, models=[replace(VIEW.models[0], name=name)], problems=[f"model {name} is LOADING"])
    text = "\n".join(shown(Screen(view, name, lost=name)))
    assert "[red]m[/red]" in text
    assert all(each.isprintable() or each == "\n" for each in text)


def test_where_there_is_no_room_the_busiest_and_the_broken_are_shown() -> None:
    def model(at: int) -> ModelFigures:
        state = "LOADING" if at == 40 else "READY"
        return ModelFigures(f"m{at}", "1", state, "", 1, 0, 0, 500.0 if at == 30 else 0.0, 0.0, None, None, None)

    view = replace(VIEW, models=[model(at) for at in range(50)], models_left_out=5)
    lines = shown(Screen(view, "here"), height=24)
    models = [line.split()[0] for line in lines if re.match(r"m\d", line)]
    assert models[:2] == ["m40", "m30"]
    assert lines[-1] == f"and {55 - len(models)} more"
    assert len([line for line in shown(Screen(view, "here", whole=True)) if re.match(r"m\d", line)]) == 50


words = st.text(max_size=30)
floats = st.floats(0, 1e7)
maybe = st.none() | floats
counts = st.integers(0, 10**9)
states = st.sampled_from(["READY", "LOADING", "UNAVAILABLE"])
roles = st.sampled_from(["broker", "gateway", "worker"])
models = st.builds(
    ModelFigures, words, words, states, words, counts, counts, counts, floats, floats, maybe, maybe, maybe
)
processes = st.builds(
    ProcessFigures, words, roles, maybe, floats, counts, st.just(1 << 28), counts, floats, maybe, maybe, counts
)
views = st.builds(
    View,
    seconds=st.sampled_from([0.0, 5.0]),
    broker=st.booleans(),
    gateway=words,
    problems=st.lists(words, max_size=8),
    rate=floats,
    failures=st.dictionaries(words, floats, max_size=5),
    queue=counts,
    running=counts,
    p50_s=maybe,
    p95_s=maybe,
    rows=maybe,
    batches=st.lists(floats, min_size=len(ROWS) + 1, max_size=len(ROWS) + 1),
    bounds=st.just(list(ROWS)),
    clients=counts,
    models=st.lists(models, max_size=30),
    models_left_out=counts,
    processes=st.lists(processes, max_size=20),
)


@settings(max_examples=60, deadline=None)
@given(st.none() | views, words, words, st.lists(floats, max_size=400), st.integers(1, 300), st.integers(1, 80))
def test_it_fits_every_terminal(
    view: View | None, note: str, lost: str, rates: list[float], width: int, height: int
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, color_system=None, legacy_windows=False)
    console.print(Screen(view, note, lost, rates, rates), end="")
    lines = file.getvalue().split("\n")
    assert len(lines) <= height
    assert all(console.measure(line).maximum <= width for line in lines)


@given(views)
def test_a_view_travels_as_it_is(view: View) -> None:
    data = b"retry: 1000\n\ndata: %b\n\n" % orjson.dumps(view)
    assert list(parse(io.BytesIO(data))) == [view]


@pytest.mark.parametrize(
    "data", [b"data: {}\n\n", b"data: nonsense\n\n", b"data: [1]\n\n", b'data: {"seconds": "5"}\n\n']
)
def test_what_is_no_view_is_said(data: bytes) -> None:
    with pytest.raises(ListenError, match="not understood"):
        list(parse(io.BytesIO(data)))


def test_half_an_event_is_none() -> None:
    assert list(parse(io.BytesIO(b": hello\n\nevent: x\n\ndata: " + orjson.dumps(VIEW)))) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01, "<0.1"), (2.25, "2.2"), (99.6, "100"), (12345.0, "12.3k"), (None, "-")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.000042, "0.04 ms"), (0.0012, "1.2 ms"), (0.25, "250 ms"), (2.0, "2.0 s"), (30.0, "30 s")]
)
def test_durations_are_short(value: float, text: str) -> None:
    assert duration(value) == text


def test_bars_are_as_high_as_their_values() -> None:
    assert bars([0, 1, 4, 8]) == " ▁▄█"
    assert bars([]) == ""


# --- once ---


def top(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["top", *arguments])


def test_once_prints_what_the_server_does(server: Server) -> None:
    told = top("--once", f"--url={server.url}")
    assert (told.exit_code, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    assert lines[0].startswith(f"Penstock  {server.url}, seen by gateway-0")
    names = {line.split()[0] for line in lines if line.split()}
    assert {"broker", "gateway-0", "cpu-0", "dense", "sums", "strings", "brain", "square", "broken"} <= names
    assert any(line.startswith("model broken version 1 is UNAVAILABLE: ") for line in lines)
    assert "\x1b" not in told.stdout, "no colours for what is no terminal"


def test_nobody_there_is_a_sentence() -> None:
    told = top("--once", "--url=http://127.0.0.1:1")
    assert (told.exit_code, told.stdout) == (1, "")
    assert told.stderr.startswith("penstock: http://127.0.0.1:1 cannot be reached: ")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "tcp://127.0.0.1:8000", "http://", "http://a:b", "http://a:99999"])
def test_what_is_no_url_is_bad_usage(url: str) -> None:
    told = top("--once", f"--url={url}")
    assert told.exit_code == 2
    assert "is not of the form http://HOST:PORT" in told.stderr


def test_without_a_terminal_it_says_what_to_do(server: Server) -> None:
    told = top(f"--url={server.url}")
    assert told.exit_code == 2
    assert "--once prints one view" in told.stderr


@pytest.fixture
def stranger() -> Iterator[Callable[[bytes], str]]:
    """``stranger(response)``: the URL of somebody who answers everything so."""
    servers: list[ThreadingHTTPServer] = []

    def start(response: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.wfile.write(response)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\nno",
            "answers 404 Not Found and text/html; is it a Penstock",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\nhello", "answers 200 OK and text/html; is it a Penstock"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", "has ended its answer"),
        (b"SSH-2.0-x\r\n", "cannot be reached"),
    ],
)
def test_who_is_no_gateway_is_told_from_one(stranger: Callable[[bytes], str], response: bytes, words: str) -> None:
    told = top("--once", f"--url={stranger(response)}")
    assert told.exit_code == 1
    assert words in told.stderr


def test_silence_has_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listener = Listener(f"http://127.0.0.1:{silent.getsockname()[1]}", silence_s=0.05)
        with pytest.raises(ListenError, match=r"has said nothing for 0\.05 s"):
            next(listener.views())


def test_what_a_gateway_tells_without_an_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.bin.listen._LINE_MAX", 1 << 20)
    lines = (b"data: %b\n" % bytes(1000) for _ in range(2000))
    with pytest.raises(ListenError, match="more than 1 MB at once"):
        list(parse(lines))


def test_a_listener_that_is_closed_hears_nothing_more(server: Server) -> None:
    listener = Listener(server.url)
    views = listener.views()
    next(views)
    listener.close()
    with pytest.raises(ListenError):
        list(views)
    with pytest.raises(ListenError, match="nobody listens"):
        next(listener.views())


# --- on a terminal ---


class Terminal:
    """``penstock top`` on a terminal of its own. ``seen``: all that was written to it."""

    def __init__(self, url: str, width: int = 120, height: int = 40) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(width, height)
        self.before = termios.tcgetattr(self._ours)
        self.process = subprocess.Popen(
            [*PENSTOCK, "top", f"--url={url}"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # The terminal is its own, so that Ctrl-C on it is a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color"},
        )
        os.close(theirs)
        self.seen = ""

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def until(self, text: str) -> None:
        """Wait until that, a regular expression, has been written since the last time."""
        until = time.monotonic() + DEADLINE_S
        while not (found := re.search(text, self.seen)):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"waited in vain for {text!r}: {self.seen[-3000:]!r}"
            self._read()
        self.seen = self.seen[found.end() :]

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.seen += re.sub(r"\x1b\[[0-9;]*m", "", data.decode(errors="replace"))
        return bool(data)

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self) -> int:
        """Its exit code; by then the terminal is as it was."""
        while self._read():
            pass
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(url: str, width: int = 120, height: int = 40) -> Terminal:
        terminals.append(Terminal(url, width, height))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


ALTERNATE, BACK = r"\x1b\[\?1049h", r"\x1b\[\?1049l"


@pytest.mark.parametrize("keys", [b"q", b"\x03"])
def test_it_is_live_until_a_key_ends_it(server: Server, terminal: Callable[..., Terminal], keys: bytes) -> None:
    seen = terminal(server.url)
    seen.until(ALTERNATE)
    seen.until("gateway-0")
    for _ in range(2):
        seen.until("dense")
    seen.press(b"x")  # which means nothing
    seen.until("dense")
    seen.press(keys)
    seen.until(BACK)
    assert seen.end() == 0
    assert "Traceback" not in seen.seen


def test_it_shows_what_happens(server: Server, terminal: Callable[..., Terminal]) -> None:
    seen = terminal(server.url)
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    seen.until("rows/batch -")

    def busy() -> bool:
        for _ in range(20):
            assert server.infer("dense", body)[0] == 200
        while select.select([seen._ours], [], [], 0)[0]:
            seen._read()
        return "rows/batch 1" in seen.seen

    wait_for(busy, "batches")


def test_it_follows_the_size_of_the_terminal(server: Server, terminal: Callable[..., Terminal]) -> None:
    seen = terminal(server.url, width=60)
    seen.until("dense")
    assert "Rows/batch" not in seen.seen
    seen.resize(160, 50)
    seen.until("Rows/batch")
    seen.resize(20, 5)
    seen.until("Penstock")
    seen.press(b"q")
    assert seen.end() == 0


def test_it_survives_a_gateway_that_goes_and_comes_back(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    gateway = Process(["gateway", "--http=127.0.0.1:0", f"--runtime-dir={tmp_path / 'run'}"])
    found = wait_for(lambda: re.search(r"url=(http://\S+)", "\n".join(gateway.errors)), "the gateway to listen")
    url = found[1]
    seen = terminal(url)
    seen.until(r"q ends\s*no broker answers")
    gateway.end(signal.SIGKILL)
    seen.until(r"q ends\s*trying again: ")
    again = Process(["gateway", f"--http={url.removeprefix('http://')}", f"--runtime-dir={tmp_path / 'run'}"])
    try:
        seen.until(r"q ends\s*no broker answers")
        seen.press(b"q")
        assert seen.end() == 0
    finally:
        assert again.end() == 0


def test_a_stream_ends_when_the_terminal_has_gone(server: Server, terminal: Callable[..., Terminal]) -> None:
    """Nobody is left who listens."""
    seen = terminal(server.url)
    seen.until("dense")
    seen.press(b"q")
    assert seen.end() == 0

    def alone() -> bool:
        channel = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        try:
            channel.request("GET", "/events")
            response = channel.getresponse()
            while not (line := response.readline()).startswith(b"data: "):
                pass
            [door] = [each for each in json.loads(line[6:])["processes"] if each["role"] == "gateway"]
            return bool(door["connections"] == 1)
        finally:
            channel.close()

    wait_for(alone, "its connection to end")
