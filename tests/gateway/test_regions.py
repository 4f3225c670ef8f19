"""Clients' shared memory: what may be named, how it is read and written, and when it ends."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.gateway import regions as module
from penstock.gateway.changes import Changes, Style
from penstock.gateway.common import Common
from penstock.gateway.inference import Parser, read_body, render
from penstock.gateway.peers import Lease, find_peer, is_alive
from penstock.gateway.regions import READ_MAX_BYTES, Regions, Unread
from penstock.wire.codec import pack_outcome
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, TOO_LARGE, PenstockError
from penstock.wire.messages import Outcome
from penstock.wire.models import ModelSpec, Tensor, TensorSpec


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm."""
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(module, "DIRECTORY", path)
    (path / "a").write_bytes(bytes(range(100)))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Regions, Regions]:
    """Two gateways'."""
    return Regions(Common(tmp_path), True), Regions(Common(tmp_path), True)


def part(name: Any = "r", nbytes: Any = 4, **more: Any) -> dict[str, Any]:
    return {"shared_memory_region": name, "shared_memory_byte_size": nbytes, **more}


def refusal(call: Any, *given: Any) -> tuple[str, str]:
    with pytest.raises(PenstockError) as raised:
        call(*given)
    return raised.value.code, raised.value.message


def descriptors() -> int:
    gc.collect()  # of what tests before this one have left
    return len(os.listdir("/proc/self/fd"))


def test_all_gateways_know_a_region(pair: tuple[Regions, Regions]) -> None:
    one, other = pair
    one.register("r", {"key": "/a", "offset": 10, "byte_size": 50}, None)
    assert other.read("x", part()) == bytes([10, 11, 12, 13])
    assert other.read("x", part(shared_memory_offset=46)) == bytes([56, 57, 58, 59])
    assert one.status() == other.status("r") == [{"name": "r", "key": "/a", "offset": 10, "byte_size": 50}]
    other.unregister("r")
    assert refusal(one.read, "x", part()) == (NOT_FOUND, "Unable to find shared memory region: 'r'")
    assert one.status() == []


def test_a_region_that_is_registered_anew_is_another(pair: tuple[Regions, Regions], directory: Path) -> None:
    one, other = pair
    one.register("r", {"key": "a", "byte_size": 4}, None)
    assert other.read("x", part()) == bytes(range(4))
    (directory / "b").write_bytes(b"wxyz")
    one.unregister()
    one.register("r", {"key": "b", "byte_size": 4}, None)
    assert other.read("x", part()) == b"wxyz"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("/", "is a name of shared memory"),
        ("/../a", "is a name of shared memory"),
        ("..", "is a name of shared memory"),
        ("x/a", "is a name of shared memory"),
        ("a\0", "is a name of shared memory"),
        ("x" * 256, "is a name of shared memory"),
        ("/nope", "Unable to open shared memory region: '/nope'"),
        ("\ud800", "Unable to open shared memory region"),
        ("/link", "Unable to open shared memory region: '/link'"),
        ("/pipe", "which is no memory"),
        ("/folder", "Unable to open shared memory region: '/folder'"),
        ("/triton_python_backend_shm_region_1", "its name is reserved"),
        ("/penstock-x", "its name is reserved"),
        (7, "has no 'key', a string"),
        (None, "has no 'key', a string"),
    ],
)
def test_what_cannot_be_a_region(pair: tuple[Regions, Regions], directory: Path, key: Any, sentence: str) -> None:
    (directory / "link").symlink_to(directory / "a")
    os.mkfifo(directory / "pipe")
    (directory / "folder").mkdir()
    before = descriptors()
    code, message = refusal(pair[0].register, "r", {"key": key, "byte_size": 4}, None)
    assert code == BAD_INPUT
    assert sentence in message
    assert descriptors() == before
    assert pair[0].status() == []


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "has no 'byte_size'"),
        ({"byte_size": 0}, "Invalid offset + byte size for shared memory region: 'r'"),
        ({"byte_size": 101}, "Invalid offset + byte size"),
        ({"byte_size": 51, "offset": 50}, "Invalid offset + byte size"),
        ({"byte_size": 1 << 64}, "Integer overflow detected: 'byte_size'"),
        ({"byte_size": 1, "offset": 1 << 63}, "Integer overflow detected: 'offset'"),
        ({"byte_size": -1}, "'byte_size' is a whole number"),
        ({"byte_size": True}, "'byte_size' is a whole number"),
        ({"byte_size": "4"}, "'byte_size' is a whole number"),
    ],
)
def test_sizes_that_cannot_be(pair: tuple[Regions, Regions], asked: dict[str, Any], sentence: str) -> None:
    code, message = refusal(pair[0].register, "r", {"key": "a", **asked}, None)
    assert code == BAD_INPUT
    assert sentence in message


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (part(nbytes=101), "Invalid offset + byte size"),
        (part(shared_memory_offset=97), "Invalid offset + byte size"),
        (part(shared_memory_offset=101), "Invalid offset for shared memory region: 'r'"),
        (part(shared_memory_offset=-1), "is a whole number"),
        (part(nbytes=None), "is a whole number"),
        ({"shared_memory_region": "r"}, "'shared_memory_byte_size' must be specified"),
        (part(name=[]), "'shared_memory_region' of input 'x' is a string"),
    ],
)
def test_parts_that_are_not_inside(pair: tuple[Regions, Regions], parameters: Any, sentence: str) -> None:
    pair[0].register("r", {"key": "a", "byte_size": 100}, None)
    code, message = refusal(pair[1].read, "x", parameters)
    assert code == BAD_INPUT
    assert sentence in message


def test_a_file_that_is_cut_short_is_an_error_and_no_signal(pair: tuple[Regions, Regions], directory: Path) -> None:
    pair[0].register("r", {"key": "a", "byte_size": 100}, None)
    place = pair[0].place("y", part(nbytes=50))
    os.truncate(directory / "a", 20)
    for call in (
        lambda: pair[0].read("x", part(nbytes=50)),
        lambda: place.region.write(place.at, memoryview(bytes(50))),
    ):
        assert "Invalid offset + byte size" in refusal(call)[1]


def test_a_region_ends_with_its_file_but_not_for_who_uses_it(pair: tuple[Regions, Regions], directory: Path) -> None:
    one, other = pair
    one.register("r", {"key": "a", "byte_size": 100}, None)
    place = other.place("y", part())
    (directory / "a").unlink()
    assert "its file has been removed" in refusal(other.read, "x", part())[1]
    assert one.status() == []
    place.region.write(place.at, memoryview(b"done"))  # it ends as it began


def test_descriptors_are_closed_once_nobody_needs_them(pair: tuple[Regions, Regions]) -> None:
    before = descriptors()
    pair[0].register("r", {"key": "a", "byte_size": 100}, None)
    place: Any = pair[1].place("y", part())
    pair[0].unregister("r")
    assert refusal(pair[1].read, "x", part())[0] == NOT_FOUND
    assert descriptors() == before + 1
    place.region.write(place.at, memoryview(b"late"))
    del place
    assert descriptors() == before


def test_a_region_ends_with_its_process(pair: tuple[Regions, Regions]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lease = Lease(child.pid, int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]))
        pair[0].register("r", {"key": "a", "byte_size": 100}, lease)
        assert pair[1].read("x", part()) == bytes(range(4))
        assert not is_alive(Lease(child.pid, lease.started - 1))  # its number was another's
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(lease)  # though nobody has waited for it
    assert "its client has ended" in refusal(pair[1].read, "x", part())[1]
    pair[0].sweep()
    assert not pair[0].any


def test_there_is_a_bound(pair: tuple[Regions, Regions], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REGIONS_MAX", 2)
    for name in "ab":
        pair[0].register(name, {"key": "a", "byte_size": 4}, None)
    assert "there are 2 shared memory regions" in refusal(pair[1].register, "c", {"key": "a", "byte_size": 4}, None)[1]
    assert refusal(pair[1].register, "a", {"key": "a", "byte_size": 4}, None)[1].endswith("already in manager")


def test_outputs_go_where_they_are_wanted(pair: tuple[Regions, Regions], directory: Path) -> None:
    pair[0].register("r", {"key": "a", "byte_size": 100}, None)
    outcome = Outcome("m", "1", (Tensor("y", "UINT8", (2,), 0, 2), Tensor("z", "UINT8", (3,), 2, 3)))
    changes = Changes(True)
    changes.places["y"] = pair[0].place("y", part(nbytes=2, shared_memory_offset=98))
    body, payload, style = changes.apply(pack_outcome(outcome), b"abxyz", Style(False))
    head, tail = render(body, payload, style, "")
    json = (
        b'{"model_name":"m","model_version":"1","outputs":[{"name":"y","datatype":"UINT8","shape":[2],"parameters":'
        b'{"shared_memory_region":"r","shared_memory_offset":98,"shared_memory_byte_size":2}},'
        b'{"name":"z","datatype":"UINT8","shape":[3],"data":[120,121,122]}]}'
    )
    assert head.endswith(json)
    assert (tail, (directory / "a").read_bytes()[98:]) == (b"", b"ab")
    binary, tail = render(*changes.apply(pack_outcome(outcome), b"abxyz", Style(True)), "")
    assert b'"parameters":{"binary_data_size":3}' in binary
    assert bytes(tail) == b"xyz"
    changes.places["z"] = pair[0].place("z", part(nbytes=2))
    with pytest.raises(PenstockError, match=r"output 'z' \(2 bytes\) should be at least 3 bytes"):
        changes.apply(pack_outcome(outcome), b"abxyz", Style(True))


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((request.param, 0))
        except OSError:
            pytest.skip("no such address here")
        listener.listen()
        yield listener


def test_who_is_at_the_other_end_is_found(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    code = f"import socket; s = socket.create_connection(({host!r}, {port})); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        connection, _ = listener.accept()
        with connection:
            near, far = connection.getsockname()[:2], connection.getpeername()[:2]
            lease = find_peer(near, far)
            assert lease is not None
            assert lease.pid == child.pid
            assert is_alive(lease)
            child.kill()
            child.wait(10)
            assert find_peer(near, far) is None
    assert find_peer(("10.0.0.1", 1), ("nonsense", 2)) is None


def test_a_request_with_shared_memory_is_read_anew_each_time(pair: tuple[Regions, Regions], directory: Path) -> None:
    """Whatever is remembered of requests by their bytes: the same may mean other data."""
    shape: dict[str, Any] = {"name": "x", "datatype": "UINT8", "shape": [1, 4]}
    tensor = TensorSpec("x", "UINT8", (-1, 4))
    spec = ModelSpec("m", "1", "onnxruntime_onnx", (tensor,), (tensor._replace(name="y"),), True, 8)
    parser = Parser()
    parser.regions = pair[0]
    pair[0].register("r", {"key": "a", "byte_size": 100}, None)
    asked = {"inputs": [{**shape, "parameters": part()}], "outputs": [{"name": "y", "parameters": part()}]}
    given = {"inputs": [{**shape, "data": [1, 2, 3, 4]}], "outputs": [{"name": "y", "parameters": part()}]}
    for content in (b"1234", b"5678"):
        (directory / "a").write_bytes(content + bytes(96))
        query, payload = parser.parse(spec, json.dumps(asked).encode(), None)
        assert (bytes(payload), query.fleeting, query.reusable) == (content, True, False)
    queries = [parser.parse(spec, json.dumps(given).encode(), None)[0] for _ in range(2)]
    assert queries[0].change is not queries[1].change
    pair[1].unregister("r")
    for request in (asked, given):
        with pytest.raises(PenstockError, match="Unable to find shared memory region"):
            parser.parse(spec, json.dumps(request).encode(), None)
    parser.regions = None
    with pytest.raises(PenstockError, match="--allow-client-shm"):
        parser.parse(spec, json.dumps(asked).encode(), None)


def test_what_a_request_reads_has_a_limit(tmp_path: Path, directory: Path) -> None:
    os.truncate(directory / "a", 1 << 40)  # which takes no memory
    regions = Regions(Common(tmp_path), True, 1000)
    regions.register("r", {"key": "a", "byte_size": 1 << 40}, None)
    assert refusal(regions.read, "x", part(nbytes=1 << 40))[0] == TOO_LARGE
    code, message = refusal(regions.read, "x", part(nbytes=501), 500)
    assert (code, "'x' and those before it take 1001 bytes" in message) == (TOO_LARGE, True)
    assert regions.read("x", part(nbytes=500), 500)[:3] == bytes([0, 1, 2])


def test_a_large_input_is_read_later(tmp_path: Path, directory: Path) -> None:
    regions = Regions(Common(tmp_path), True)
    data = os.urandom(READ_MAX_BYTES + 4)
    (directory / "a").write_bytes(data)
    regions.register("r", {"key": "a", "byte_size": len(data)}, None)
    spec = ModelSpec(
        "m",
        "1",
        "onnxruntime_onnx",
        (TensorSpec("x", "UINT8", (-1,)), TensorSpec("z", "UINT8", (-1,))),
        (TensorSpec("y", "UINT8", (-1,)),),
        False,
        1 << 20,
    )
    x = {"name": "x", "shape": [len(data)], "datatype": "UINT8", "parameters": part(nbytes=len(data))}
    z = {"name": "z", "shape": [2], "datatype": "UINT8", "data": [7, 8]}
    parser = Parser()
    parser.regions = regions
    query, payload = parser.parse(spec, json.dumps({"inputs": [x, z]}).encode(), None)
    assert query.fleeting
    assert isinstance(payload, Unread)
    assert bytes(payload.view()) == data + bytes([7, 8])
    os.truncate(directory / "a", READ_MAX_BYTES)
    assert refusal(payload.view) == (BAD_INPUT, "Invalid offset + byte size for shared memory region: 'r'")


def test_large_json_goes_without_shared_memory() -> None:
    spec = ModelSpec("m", "1", "onnxruntime_onnx", (TensorSpec("x", "UINT8", (-1,)),), (), True, 1 << 20)
    x = {"name": "x", "shape": [4], "datatype": "UINT8", "parameters": part()}
    body = json.dumps({"inputs": [x]}).encode()
    assert "has at most some hundred KB of JSON" in refusal(read_body, None, spec, body, True)[1]
    assert "start it with --allow-client-shm" in refusal(read_body, None, spec, body)[1]
