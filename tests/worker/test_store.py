"""The store of prepared models: real files, real locks, real processes that share and die."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from penstock.wire.tensors import Array
from penstock.worker.config import ModelConfig
from penstock.worker.manifest import (
    MANIFEST,
    MODEL,
    WEIGHTS,
    FileSum,
    Setting,
    Unusable,
    check_entry,
    cpu_digest,
    find_source,
    make_key,
)
from penstock.worker.model import Model, load
from penstock.worker.onnxfile import read_onnx
from penstock.worker.prepare import NotPrepared, find_setting, prepare
from penstock.worker.prune import Found, find_entries
from penstock.worker.store import Store, StoreError, Weights, default_root
from tests.system.servers import wait_for
from tests.worker.conftest import Workshop

T = TensorProto
SIZE = 128
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def dense(workshop: Workshop) -> Path:
    return workshop.save(build_dense(workshop, SIZE))


def build_dense(workshop: Workshop, size: int, seed: int = 0) -> bytes:
    weights = np.random.default_rng(seed).standard_normal((size, size), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return workshop.build(nodes, {"x": (1, ["N", size])}, {"y": (1, ["N", size])}, {"w": weights})


def open_(store: Store, path: Path, events: list[str] | None = None) -> Weights:
    said = [] if events is None else events
    return store.open(path, "m", lambda event, about: said.append(event))


def run(path: Path, rows: int = 3) -> Array:
    x = np.random.default_rng(1).standard_normal((rows, SIZE), np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def entry_of(weights: Weights) -> Path:
    assert weights.prepared is not None
    return weights.prepared.parent


# --- preparing and sharing ---


def test_model_is_prepared_once_and_answers_bit_for_bit(store: Store, dense: Path) -> None:
    events: list[str] = []
    weights = open_(store, dense, events)
    entry = entry_of(weights)
    assert (events[0], events[-1]) == ("preparing model", "model prepared")
    assert weights.nbytes == SIZE * SIZE * 4
    assert sorted(os.listdir(entry)) == [MANIFEST, MODEL, WEIGHTS]
    assert {oct(os.stat(entry / name).st_mode & 0o777) for name in os.listdir(entry)} == {"0o400"}
    assert run(entry / MODEL).tobytes() == run(dense).tobytes()
    again: list[str] = []
    assert entry_of(open_(store, dense, again)) == entry
    assert again == []
    assert list(store.root.glob("tmp-*")) == []


def test_model_loaded_from_the_store_maps_it(store: Store, dense: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(dense, "m", "1", ModelConfig(), store)
    assert model.weights is not None
    assert model.weights.shared
    assert str(entry_of(model.weights) / WEIGHTS) in Path("/proc/self/maps").read_text()
    x = np.ones((2, SIZE), np.float32)
    assert model.run([x])[0].tobytes() == load(dense, "m", "1", ModelConfig()).run([x])[0].tobytes()


def test_for_a_gpu_weights_are_mapped_as_they_are(store: Store, dense: Path) -> None:
    """It is another entry, made without a GPU; what the CPU's kernels want of it is left out."""
    other = Store(store.root, on_gpu=True)
    entry, plain = entry_of(open_(other, dense, [])), entry_of(open_(store, dense, []))
    assert entry != plain
    assert json.loads((entry / MANIFEST).read_text())["provider"] == "CUDAExecutionProvider"
    assert run(entry / MODEL) == pytest.approx(run(dense), rel=1e-5)
    weights = read_onnx(entry / MODEL)
    assert (weights.external_files, weights.weight_bytes) == ((WEIGHTS,), SIZE * SIZE * 4)


def test_what_is_built_for_another_gpu_lies_elsewhere(store: Store, dense: Path) -> None:
    hopper, ada = "sm9.0-tensorrt101300-cuda13000", "sm8.9-tensorrt101300-cuda13000"
    folders = {store.engines(dense, about) for about in (hopper, ada)}
    assert len(folders) == 2
    assert all(folder.is_dir() and folder.is_relative_to(store.root) for folder in folders)
    assert store.engines(dense, hopper) in folders
    assert list(store.entries()) == []


def test_small_models_are_left_out(dense: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", SIZE * SIZE * 4 + 1)
    assert not store.take(dense, "m").shared
    assert not store.root.exists()


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_what_is_no_model_is_left_to_onnx_runtime(store: Store, workshop: Workshop, content: bytes) -> None:
    assert not store.take(workshop.save(content), "m").shared
    assert not store.root.exists()


def declared(model: Model) -> list[Any]:
    return [model.spec, model.dims, model.why_alone]


def test_inputs_and_outputs_stay_as_they_were(store: Store, workshop: Workshop) -> None:
    weights = np.ones((64, 64), np.float32)
    strings = helper.make_tensor("table", T.STRING, [2], np.array([b"a", b"b"], dtype=object))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "given"], ["y"]),
        helper.make_node("Identity", ["s"], ["t"]),
        helper.make_node("Gather", ["table", "i"], ["u"]),
        helper.make_node("Shape", ["unused"], ["v"]),
    ]
    content = workshop.build(
        nodes,
        {
            "unused": (1, ["M"]),
            "s": (T.STRING, ["N", None]),
            "x": (1, ["batch", "seq", 64]),
            "given": (1, [64]),  # has a value, and may be given another
            "i": (T.INT64, []),
        },
        {"v": (T.INT64, ["rank"]), "t": (T.STRING, ["N", None]), "y": (1, ["batch", "seq", 64]), "u": (T.STRING, [])},
        {"w": weights, "given": np.full(64, 2, np.float32), "table": strings},
    )
    path = workshop.save(content)
    plain, shared = load(path, "m", "1", ModelConfig()), load(path, "m", "1", ModelConfig(), store)
    assert shared.weights is not None
    assert shared.weights.shared
    assert declared(shared) == declared(plain)
    feeds = [np.ones(1, "f4"), np.array([["é"]], object), np.ones((2, 3, 64), "f4"), np.array(1)]
    for one, other in zip(plain.run(feeds), shared.run(feeds), strict=True):
        assert one.tolist() == other.tolist()


TAKE = """
import sys
from pathlib import Path
from penstock.worker.config import ModelConfig
from penstock.worker.model import load
from penstock.worker.store import Store
store = Store(Path(sys.argv[1]))
take = store.open
store.open = lambda path, name, tell: take(path, name, lambda event, about: print(event, flush=True))
model = load(Path(sys.argv[2]), "m", "1", ModelConfig(), store)
print("shared" if model.weights.shared else "private", flush=True)
sys.stdin.read()
"""
TAKEN = {"shared", "private"}


class Taker:
    """Another process that loads a model through the store, and holds it until it is told to end."""

    def __init__(self, root: Path, path: Path, before: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join([*before, TAKE]), str(root), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def wait(self, last: set[str] = TAKEN) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if self.said[-1] in last:
                return self.said
        pytest.fail(f"it ended: {self.said} {self.process.communicate()[1]}")

    def preparing(self) -> int:
        """The process that prepares for this one and will end with it, or 0."""
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    if int(Path(f"/proc/{child}/oom_score_adj").read_text()) == 1000:
                        return int(child)
        return 0

    def end(self) -> str:
        """What it said to standard error."""
        return self.process.communicate()[1]


@pytest.fixture
def take(store: Store) -> Iterator[Callable[..., Taker]]:
    takers: list[Taker] = []

    def start(path: Path, *before: str) -> Taker:
        takers.append(Taker(store.root, path, before))
        return takers[-1]

    yield start
    for taker in takers:
        taker.process.kill()
        taker.process.communicate()


def test_two_processes_at_once_prepare_once(store: Store, dense: Path, take: Callable[..., Taker]) -> None:
    takers = [take(dense) for _ in range(2)]
    said = [taker.wait() for taker in takers]
    assert [lines[-1] for lines in said] == ["shared", "shared"]
    assert sum(line == "model prepared" for lines in said for line in lines) == 1


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_killed_in_the_middle_is_made_again(store: Store, workshop: Workshop, take: Callable[..., Taker]) -> None:
    path = workshop.save(build_dense(workshop, 2048))
    killed = take(path)
    child = wait_for(killed.preparing, "a process that prepares")
    os.kill(child, signal.SIGSTOP)  # in the middle of it, and there it stays
    assert not any(each.is_dir() for each in store.entries())
    waiter = take(path)
    waiter.wait({"waiting while another model is prepared"})
    killed.process.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(child), "the end of who prepared")
    assert waiter.wait()[-2:] == ["model prepared", "shared"]
    assert list(store.root.glob("tmp-*")) == []


def test_who_prepares_alone_may_die(store: Store, workshop: Workshop, take: Callable[..., Taker]) -> None:
    taker = take(workshop.save(build_dense(workshop, 2048)))
    child = wait_for(taker.preparing, "a process that prepares")
    os.kill(child, signal.SIGKILL)
    assert taker.wait()[-1] == "private"
    said = taker.end()
    assert "weights are not shared" in said
    assert list(store.root.glob("tmp-*")) == []
    assert list(store.entries()) == []


# --- what must not be believed ---


def flip(entry: Path) -> None:
    path = entry / WEIGHTS
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o400)


def cut(entry: Path) -> None:
    (entry / WEIGHTS).chmod(0o600)
    os.truncate(entry / WEIGHTS, 100)
    (entry / WEIGHTS).chmod(0o400)


def link(entry: Path) -> None:
    (entry / WEIGHTS).rename(entry.parent / "elsewhere")
    (entry / WEIGHTS).symlink_to(entry.parent / "elsewhere")


def link_all(entry: Path) -> None:
    entry.rename(entry.parent / "elsewhere")
    entry.symlink_to("elsewhere")


def garble(entry: Path) -> None:
    (entry / MANIFEST).chmod(0o600)
    (entry / MANIFEST).write_bytes(b'{"format": 1, \xff')


def rename(entry: Path) -> None:
    """The whole of another entry."""
    about = json.loads((entry / MANIFEST).read_bytes())
    (entry / MANIFEST).unlink()
    (entry / MANIFEST).write_text(json.dumps(about | {"key": "0" * 64}))
    (entry / MANIFEST).chmod(0o400)


def replace_by_file(entry: Path) -> None:
    entry.rename(entry.parent / "elsewhere")
    entry.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut off": cut,
    "missing": lambda entry: (entry / WEIGHTS).unlink(),
    "no model": lambda entry: (entry / MODEL).unlink(),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "linked": link,
    "linked entry": link_all,
    "garbled": garble,
    "another one's": rename,
    "more": lambda entry: (entry / "more").touch(),
    "open file": lambda entry: (entry / WEIGHTS).chmod(0o444),
    "open entry": lambda entry: entry.chmod(0o755),
    "a file": replace_by_file,
    "another user's": lambda entry: os.chown(entry / WEIGHTS, 12345, 12345),
    "another user's entry": lambda entry: os.chown(entry, 12345, 12345),
}


@pytest.fixture(scope="module")
def prepared(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the model ``dense`` already, to be copied."""
    store = Store(tmp_path_factory.mktemp("prepared") / "store")
    open_(store, workshop.save(build_dense(workshop, SIZE)))
    return store.root


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_made_is_made_again(store: Store, dense: Path, prepared: Path, damage: str) -> None:
    if damage.startswith("another user's") and not IS_ROOT:
        pytest.skip("only root can give files away")
    shutil.copytree(prepared, store.root, dirs_exist_ok=True)
    events: list[str] = []
    entry = entry_of(open_(store, dense, events))
    assert events == [], "the copy is as it was made"
    DAMAGES[damage](entry)
    with pytest.raises(Unusable):
        check_entry(entry)
    assert entry_of(open_(store, dense, events)) == entry
    assert events[0] == "prepared model is not usable"
    assert events.count("prepared model is not usable") == 1
    assert events[-1] == "model prepared"
    assert run(entry / MODEL).tobytes() == run(dense).tobytes()
    check_entry(entry)


def test_who_has_mapped_what_is_made_again_keeps_it(store: Store, dense: Path) -> None:
    model = load(dense, "m", "1", ModelConfig(), store)
    assert model.weights is not None
    x = np.ones((2, SIZE), np.float32)
    before = model.run([x])[0].tobytes()
    entry = entry_of(model.weights)
    inode = (entry / WEIGHTS).stat().st_ino
    (entry / MANIFEST).unlink()
    open_(store, dense)
    assert (entry / WEIGHTS).stat().st_ino != inode
    assert model.run([x])[0].tobytes() == before


# --- keys ---


def test_key_is_of_all_that_decides_what_is_prepared() -> None:
    setting = Setting("1.31.1", "CPUExecutionProvider", {"a": "1"}, "cpu")
    model, weights = FileSum(10, "aa"), FileSum(20, "bb")
    keys = [
        make_key(setting, model, []),
        make_key(setting, FileSum(10, "ab"), []),
        make_key(setting, model, [("w.bin", weights)]),
        make_key(setting, model, [("v.bin", weights)]),
        make_key(setting, model, [("w.bin", FileSum(20, "bc"))]),
        make_key(Setting("1.31.2", "CPUExecutionProvider", {"a": "1"}, "cpu"), model, []),
        make_key(Setting("1.31.1", "CUDAExecutionProvider", {"a": "1"}, "cpu"), model, []),
        make_key(Setting("1.31.1", "CPUExecutionProvider", {"a": "2"}, "cpu"), model, []),
        make_key(Setting("1.31.1", "CPUExecutionProvider", {"a": "1"}, "another"), model, []),
    ]
    assert len(set(keys)) == len(keys)
    assert make_key(setting, model, []) == keys[0]


def test_processor_is_known_by_what_it_can_and_not_by_its_clock() -> None:
    def block(number: int, mhz: str, flags: str) -> str:
        return f"processor\t: {number}\nvendor_id\t: X\nmodel\t\t: 1\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n"

    one = cpu_digest(block(0, "2000.1", "fpu avx2"))
    assert cpu_digest(block(0, "1800.0", "avx2 fpu") + "\n" + block(1, "2.0", "fpu avx2") + "\n") == one
    assert cpu_digest(block(0, "2000.1", "fpu avx2 avx512f")) != one
    assert cpu_digest(block(0, "1", "fpu avx2") + "\n" + block(1, "1", "fpu")) != one
    assert cpu_digest("") == cpu_digest("processor: 0\n")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model whose weights lie in a file beside it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    (folder / "w.bin").write_bytes(weights.tobytes())
    write_outside(folder, "w.bin")
    return folder / "model.onnx"


def write_outside(folder: Path, location: str) -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[SIZE, SIZE], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    ports = [helper.make_tensor_value_info(name, 1, ["N", SIZE]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_other_weights_beside_the_model_are_another_entry(store: Store, outside: Path) -> None:
    first = entry_of(open_(store, outside))
    assert run(first / MODEL).tobytes() == run(outside).tobytes()
    (outside.parent / "w.bin").write_bytes(bytes(SIZE * SIZE * 4))
    second = entry_of(open_(store, outside))
    assert second != first
    assert not run(second / MODEL).any()


@pytest.mark.parametrize("location", ["/dev/zero", "../outside/w.bin", "", "a/../../w.bin"])
def test_weights_are_read_below_the_model_only(outside: Path, location: str) -> None:
    write_outside(outside.parent, location)
    with pytest.raises(Unusable, match="not below its own directory"):
        find_source(outside, find_setting())


def test_pipe_in_place_of_weights_is_not_waited_for(store: Store, outside: Path) -> None:
    (outside.parent / "w.bin").unlink()
    os.mkfifo(outside.parent / "w.bin")
    with pytest.raises(StoreError, match="is no file"):
        open_(store, outside)


def test_model_that_is_replaced_meanwhile_is_not_published(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotPrepared, match="it was replaced while it was being prepared"):
        prepare(dense, "0" * 64, dense.stat().st_size, tmp_path / "folder", [], lambda event, about: None)


# --- where there can be no store ---


def warning(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert record.getMessage() == "weights are not shared"
    found: dict[str, Any] = vars(record)["fields"]
    assert found["cost"] == "each worker holds its own copy of 0.07 MB of weights"
    return found


def block_by_file(root: Path) -> None:
    root.write_bytes(b"")


def block_parent(root: Path) -> None:
    root.parent.rmdir()
    root.parent.write_bytes(b"")


def open_to_others(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)


def give_away(root: Path) -> None:
    root.mkdir(0o700)
    os.chown(root, 12345, 12345)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (block_by_file, "is no directory"),
        (block_parent, "File exists"),
        (open_to_others, "others may write to it"),
        pytest.param(
            give_away, "belongs to somebody else", marks=pytest.mark.skipif(not IS_ROOT, reason="only root gives away")
        ),
    ],
)
def test_without_a_store_each_has_its_own_copy_and_it_is_said(
    tmp_path: Path, dense: Path, caplog: pytest.LogCaptureFixture, block: Callable[[Path], None], reason: str
) -> None:
    root = tmp_path / "parent" / "store"
    root.parent.mkdir()
    block(root)
    model = load(dense, "m", "1", ModelConfig(), Store(root))
    assert model.weights is not None
    assert not model.weights.shared
    assert reason in warning(caplog)["reason"]


def test_full_disk_is_found_before_anything_is_prepared(store: Store, dense: Path, take: Callable[..., Taker]) -> None:
    """A limit on files stands for a disk: the same call fails, with another word."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    taker = take(dense, limit + "; sys.dont_write_bytecode = True")  # it would be cut off, and believed later
    assert taker.wait()[-1] == "private"
    assert "weights are not shared" in taker.end()
    assert list(store.entries()) == []
    assert list(store.root.glob("tmp-*")) == []
    assert entry_of(open_(store, dense)), "another day there is room"


MOUNTED = """
set -e
mount -t tmpfs -o size=400k none "$1"
"$2" -c "$3" "$1/store" "$4" < /dev/null
mount -o remount,ro "$1"
"$2" -c "$3" "$1/store" "$4" < /dev/null
"$2" -c "$3" "$1/store" "$5" < /dev/null
mount -o remount,rw "$1"
"$2" -c "$3" "$1/store" "$6" < /dev/null
"""


def test_read_only_disk_and_full_disk(tmp_path: Path, dense: Path, workshop: Workshop) -> None:
    """In a name space of mounts of its own, where the kernel lets this user have one."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may mount nothing: {error}")
    other = workshop.save(build_dense(workshop, SIZE, seed=1))
    large = workshop.save(build_dense(workshop, 1000))
    (tmp_path / "mounted").mkdir()
    arguments = [str(each) for each in (tmp_path / "mounted", sys.executable, TAKE, dense, other, large)]
    done = subprocess.run([*unshare, "sh", "-c", MOUNTED, "sh", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *("preparing model", "model prepared", "shared"),
        "shared",  # what was prepared before can be read
        *("preparing model", "private"),
        *("preparing model", "private"),
    ]
    assert done.stderr.splitlines() == ["weights are not shared"] * 2


def test_memory_of_preparing_is_bounded(store: Store, workshop: Workshop, take: Callable[..., Taker]) -> None:
    """A limit of this test's own stands for the one that is reckoned from the weights: never more than is allowed."""
    path = workshop.save(build_dense(workshop, 5000))  # 100 MB
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (330 << 20, 330 << 20))"
    show = "import logging; logging.basicConfig(format='%(message)s %(fields)s')"
    taker = take(path, limit, show)
    assert taker.wait()[-1] == "private"
    assert "preparing it takes more than 346 MB of memory" in taker.end()
    assert list(store.entries()) == []


def test_what_cannot_be_prepared_is_found_out_once(
    store: Store, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """A value of 4 bytes that ONNX Runtime, when it optimizes, writes out as 100 MB."""
    nodes = [helper.make_node("Expand", ["one", "to"], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])]
    dims: list[int | str | None] = ["N", 5000, 5000]
    constants = {"one": np.ones(1, np.float32), "to": np.array([5000, 5000])}
    path = workshop.save(workshop.build(nodes, {"x": (1, dims)}, {"y": (1, dims)}, constants))
    for attempt in range(2):
        events: list[str] = []
        with pytest.raises(StoreError):
            open_(store, path, events)
        assert ("preparing model" in events) == (attempt == 0)
    assert not store.take(path, "m").shared


def test_prepared_model_that_cannot_be_opened_is_left(
    store: Store, dense: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it went between the check and the opening."""
    opened = store.open

    def open_and_lose(*arguments: Any) -> Weights:
        weights = opened(*arguments)
        (entry_of(weights) / MODEL).unlink()
        return weights

    monkeypatch.setattr(store, "open", open_and_lose)
    model = load(dense, "m", "1", ModelConfig(), store)
    assert model.weights is not None
    assert not model.weights.shared
    assert warning(caplog)["reason"].startswith("its prepared form cannot be opened: ")


def test_root_is_the_users_cache_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/my cache")
    assert default_root() == Path("/var/my cache/penstock/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == Path("/home/me/.cache/penstock/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path("/home/me/.cache/penstock/models")
    assert default_root("/srv/models") == Path("/srv/models")
    assert default_root("~/m") == Path("/home/me/m")
    with pytest.raises(StoreError, match="no home directory"):
        default_root("~nobody-of-this-name/m")


# --- pruning ---


def prune(store: Store, wanted: Sequence[str] = (), remove: bool = True) -> list[Found]:
    return list(find_entries(store, wanted, remove))


def test_what_its_source_still_gives_is_kept(store: Store, dense: Path) -> None:
    entry = entry_of(open_(store, dense))
    [found] = prune(store)
    assert (found.name, found.kept, found.reason) == ("m", True, "it is needed")
    assert found.nbytes > SIZE * SIZE * 4
    check_entry(entry)


@pytest.mark.parametrize("how", ["gone", "replaced", "damaged"])
def test_what_no_model_needs_is_removed(store: Store, dense: Path, workshop: Workshop, how: str) -> None:
    entry = entry_of(open_(store, dense))
    key = entry.name
    if how == "gone":
        dense.unlink()
    elif how == "replaced":
        dense.write_bytes(build_dense(workshop, SIZE, seed=1))
    else:
        (entry / MANIFEST).unlink()
    if how != "damaged":
        assert [each.kept for each in prune(store, [key])] == [True], "somebody says that it is wanted"
    [found] = prune(store, remove=False)
    assert not found.kept
    assert entry.exists()
    [found] = prune(store)
    assert not found.kept
    assert sorted(os.listdir(store.root)) == ["prepare.lock"]
    assert prune(store) == []


def test_what_is_for_a_gpu_is_kept_as_long_as_its_model(store: Store, workshop: Workshop) -> None:
    path = workshop.save(build_dense(workshop, SIZE))
    open_(Store(store.root, on_gpu=True), path, [])
    engines = store.engines(path, "sm9.0-tensorrt101300-cuda13000")
    (engines / "x.engine").write_bytes(b"x" * 1000)
    assert [each.kept for each in find_entries(store, (), remove=True)] == [True, True]
    path.unlink()
    gc.collect()
    found = list(find_entries(store, (), remove=True))
    assert [(each.kept, each.reason) for each in found] == [(False, f"{path} is gone")] * 2
    assert found[1].nbytes > 1000
    assert not engines.exists()


def test_what_a_process_has_mapped_is_kept(store: Store, dense: Path, take: Callable[..., Taker]) -> None:
    taker = take(dense)
    taker.wait()
    dense.unlink()
    [found] = prune(store)
    assert found.kept
    assert found.reason.startswith("it is in use, though ")
    taker.end()
    [found] = prune(store)
    assert not found.kept
    assert sorted(os.listdir(store.root)) == ["prepare.lock"]


def test_what_killed_processes_left_is_removed(store: Store, dense: Path) -> None:
    entry_of(open_(store, dense))
    (store.root / "tmp-abc").mkdir()
    (store.root / "tmp-abc" / "weights.bin").touch()
    (store.root / f"{'0' * 64}.lock").touch()
    (store.root / "somebody's notes").touch()
    prune(store)
    assert len(os.listdir(store.root)) == 4  # the entry, its lock, that of all, and what is not ours to judge


def test_nothing_there_is_nothing_to_remove(store: Store) -> None:
    assert prune(store) == []


def test_a_process_that_says_its_last_and_stays_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = tmp_path / "stays"
    stays.write_text("#!/bin/sh\nexec sleep 1000 >&-\n")
    stays.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stays))
    monkeypatch.setattr("penstock.worker.prepare._END_S", 0.05)
    with pytest.raises(NotPrepared, match=r"^preparing it said nothing, and did not end within 0.05 s$"):
        prepare(tmp_path / "model.onnx", "key", 1, tmp_path, (), lambda event, about: None)
