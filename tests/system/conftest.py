"""Fixtures that own servers, processes and repositories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.system.chromium import Browser, Chromium
from tests.system.models import dense, identity, lookup, two_inputs, write
from tests.system.servers import Process, Server, StartProcess, StartServer


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers, each in a runtime directory of its own; at the end each must stop cleanly."""
    servers: list[Server] = []

    def start(*arguments: str, environment: dict[str, str] | None = None, by: Sequence[str] = ()) -> Server:
        server = Server(tmp_path / f"run{len(servers)}", *arguments, environment=environment, by=by)
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.check_clean_end()
        else:
            server.wait()  # its pipes are closed, also where it ended before its time


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[StartProcess]:
    """Start single processes; those still there at the end are told to stop and must exit with 0."""
    processes: list[Process] = []

    def start(*arguments: str) -> Process:
        process = Process(arguments)
        processes.append(process)
        return process

    yield start
    for process in reversed(processes):
        if process.process.poll() is None:
            assert process.end() == 0, process.errors
        else:
            process.wait()


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several models that serve."""
    path = tmp_path_factory.mktemp("models")
    write(path, "dense", dense())
    write(path, "lookup", lookup())
    write(path, "sums", two_inputs())
    write(path, "strings", identity(TensorProto.STRING))
    write(path, "half", identity(TensorProto.FLOAT16))
    write(path, "brain", identity(TensorProto.BFLOAT16))
    write(path, "wide", identity(TensorProto.FLOAT, ["N", 50_000]))
    write(path, "names with spaces é", dense())
    write(path, "versions", dense(1), "1")
    write(path, "versions", dense(2), "2")
    return path


@pytest.fixture(scope="module", params=["shared", "sent"])
def server(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for the tests of a module that only ask, with large tensors in shared memory and without."""
    directory = tmp_path_factory.mktemp("server")
    config = directory / "penstock.toml"
    config.write_text("" if request.param == "shared" else "[gateway]\narena_bytes = 0\n[worker]\narena_bytes = 0\n")
    server = Server(directory / "run", str(repository), f"--config={config}")
    yield server
    server.check_clean_end()


@pytest.fixture(scope="module")
def chromium(
    tmp_path_factory: pytest.TempPathFactory, require_command: Callable[[str, str], str]
) -> Iterator[Chromium]:
    started = Chromium(require_command("chromium", "chromium"), tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Browser]:
    opened = Browser(chromium)
    yield opened
    opened.close()
