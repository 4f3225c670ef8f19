"""Recorded requests: which are run before a model serves, and why others keep it from serving."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penstock.wire.models import ModelSpec, TensorSpec
from penstock.worker import warmup
from penstock.worker.config import ModelConfig
from penstock.worker.model import LoadError, Model
from penstock.worker.probe import load_and_probe
from penstock.worker.repository import ModelFile, find_models
from penstock.worker.warmup import FILES_MAX, read_requests
from tests.system.models import dense, identity, lookup, two_inputs, write


def record(folder: Path, name: str = "one", **arrays: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.npz"


def load_only(repository: Path) -> None:
    [file] = find_models(repository)
    load_and_probe(file)


def why_not(repository: Path) -> str:
    """Why a repository's one model is not served."""
    with pytest.raises(LoadError) as error:
        load_only(repository)
    return str(error.value)


def spec(datatype: str = "FP32", shape: tuple[int, ...] = (-1, 2)) -> ModelSpec:
    tensors = (TensorSpec("x", datatype, shape),)
    return ModelSpec("net", "1", "onnxruntime_onnx", tensors, tensors, True, 32)


def test_requests_are_run_as_they_are_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "net", two_inputs())
    for name, rows in (("b", 3), ("a", 2), ("c", 5)):
        a = np.full((rows, 2), rows, np.int32)
        record(tmp_path / "net" / "warmup", name, b=-a, a=a)
    (tmp_path / "net" / "warmup" / "README").write_text("not a request")
    ran: list[tuple[int, ...]] = []
    run_in = Model.run_in

    def note(self: Model, staging: Any, rows: int, feeds: Any) -> Any:
        if feeds[0].ravel()[0] == rows > 1 and feeds[1].ravel()[0] == -rows:
            ran.append(feeds[0].shape)
        return run_in(self, staging, rows, feeds)

    monkeypatch.setattr(Model, "run_in", note)
    load_only(tmp_path)
    assert ran == [(2, 2), (3, 2), (5, 2)]


def test_a_versions_own_requests_are_taken_instead(tmp_path: Path) -> None:
    write(tmp_path, "net", dense(), "1", config="version_policy = 'all'\n")
    write(tmp_path, "net", dense(), "2")
    record(tmp_path / "net" / "warmup", x=np.zeros((1, 4), np.float32))
    record(tmp_path / "net" / "2" / "warmup", x=np.zeros((2, 4), np.float32))
    found = {file.version: file.warmup for file in find_models(tmp_path)}
    assert found == {"1": tmp_path / "net/warmup", "2": tmp_path / "net/2/warmup"}


def test_model_without_requests_has_none(tmp_path: Path) -> None:
    write(tmp_path, "net", dense())
    assert [file.warmup for file in find_models(tmp_path)] == [None]


def test_model_that_nothing_can_be_made_up_for_is_warmed_up_all_the_same(tmp_path: Path) -> None:
    """It wants 48 columns, which is none of the sizes that are tried."""
    port = TensorProto.FLOAT, ["N", "D"]
    node = helper.make_node("Reshape", ["x", "to"], ["y"])
    to = onnx.numpy_helper.from_array(np.array([-1, 48]), "to")
    graph = helper.make_graph(
        [node], "graph", [helper.make_tensor_value_info("x", *port)], [helper.make_tensor_value_info("y", *port)], [to]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    write(tmp_path, "net", model, config="max_batch_size = 3\n")
    record(tmp_path / "net" / "warmup", x=np.zeros((2, 48), np.float32))
    load_only(tmp_path)
    path = record(tmp_path / "net" / "warmup", x=np.zeros((2, 47), np.float32))
    assert why_not(tmp_path).startswith(f"the model fails on {path}: ")


@pytest.mark.parametrize(
    ("datatype", "recorded"),
    [
        (TensorProto.FLOAT16, np.ones((3, 2), np.float16)),
        (TensorProto.BFLOAT16, np.ones((3, 2), np.float32)),
        (TensorProto.BFLOAT16, np.ones((3, 2), np.uint16).view("V2")),
        (TensorProto.INT64, np.ones((3, 2), ">i8")),
        (TensorProto.BOOL, np.asfortranarray(np.ones((3, 2), bool))),
        (TensorProto.STRING, np.array([["a", "ü"], ["", "\U0001f600"]])),
        (TensorProto.STRING, np.array([[b"a", b"\xc3\xbc"]])),
    ],
)
def test_any_datatype_can_be_recorded(tmp_path: Path, datatype: int, recorded: np.ndarray[Any, Any]) -> None:
    write(tmp_path, "net", identity(datatype))
    record(tmp_path / "net" / "warmup", x=recorded)
    load_only(tmp_path)


def test_compressed_requests_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "one.npz", x=np.arange(4, dtype=np.float32).reshape(2, 2))
    [(path, [x])] = read_requests(spec(), tmp_path)
    assert path == tmp_path / "one.npz"
    np.testing.assert_array_equal(x, [[0, 1], [2, 3]])


def test_scalar_stays_one(tmp_path: Path) -> None:
    record(tmp_path, x=np.float32(1))
    [(_, [x])] = read_requests(spec(shape=())._replace(batchable=False), tmp_path)
    assert x.shape == ()


# --- what keeps a model from serving ---


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.zeros((1, 4), np.float32)}, "missing required input(s) ['x']"),
        ({"x": np.zeros((1, 4), np.float32), "y": np.zeros(1)}, "unexpected inference input 'y'"),
        ({"x": np.zeros((1, 4))}, "input 'x' data-type is 'FP64', but model 'net' expects 'FP32'"),
        ({"x": np.zeros((1, 5), np.float32)}, "shape for input 'x' for model 'net'. Expected [-1, 4], got [1, 5]"),
        ({"x": np.zeros((33, 4), np.float32)}, "batch-size must be <= 32 for 'net', and is 33"),
        ({"x": np.zeros((0, 4), np.float32)}, "needs at least one row"),
        ({"x": np.zeros((1, 4), complex)}, "an array of complex128 has no datatype"),
        ({}, "missing required input(s) ['x']"),
    ],
)
def test_request_that_does_not_fit_is_named(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    write(tmp_path, "net", dense())
    path = record(tmp_path / "net" / "warmup", **arrays)
    problem = why_not(tmp_path)
    assert problem.startswith(f"{path} is no request that the model takes: ")
    assert said in problem
    assert problem.endswith("; record it anew, or remove it")


def test_request_that_the_model_fails_on_is_named(tmp_path: Path) -> None:
    write(tmp_path, "net", lookup())
    path = record(tmp_path / "net" / "warmup", i=np.array([7]))
    assert why_not(tmp_path).startswith(f"the model fails on {path}: ")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    np.savez(tmp_path / "one.npz", x=np.array([[Harm()]], dtype=object))
    with pytest.raises(LoadError, match="input 'x' is an array of objects, which are not read; strings are"):
        list(read_requests(spec(), tmp_path))
    (tmp_path / "one.npz").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(LoadError, match=r"cannot be read \(File is not a zip file\); write it with numpy.savez"):
        list(read_requests(spec(), tmp_path))
    assert not (tmp_path / "harm").exists()


def test_more_files_than_allowed_are_refused(tmp_path: Path) -> None:
    for number in range(FILES_MAX + 1):
        (tmp_path / f"{number}.npz").touch()
    with pytest.raises(LoadError, match=f"has {FILES_MAX + 1} recorded requests; {FILES_MAX} are allowed"):
        list(read_requests(spec(), tmp_path))


def test_what_would_be_too_large_unpacked_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "BYTES_MAX", 1000)
    np.savez_compressed(tmp_path / "one.npz", x=np.zeros((1000, 2), np.float32))
    with pytest.raises(LoadError, match=r"one.npz holds 8\d\d\d bytes; 1000 are allowed"):
        list(read_requests(spec(), tmp_path))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_what_numpy_writes_is_unpacked(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "one.npz", "w", method) as packed:
        packed.writestr("x.npy", b"anything")
    with pytest.raises(LoadError, match=r"holds 'x.npy', which is no array; write it with numpy.savez"):
        list(read_requests(spec(), tmp_path))


def test_other_files_in_it_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "one.npz", "w") as packed:
        packed.writestr("x.txt", b"anything")
    with pytest.raises(LoadError, match=r"holds 'x.txt', which is no array"):
        list(read_requests(spec(), tmp_path))


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "one.npz")
    with pytest.raises(LoadError, match=r"one.npz is no file"):
        list(read_requests(spec(), tmp_path))


def test_directory_that_is_gone_by_then_is_named(tmp_path: Path) -> None:
    file = ModelFile("net", "1", write(tmp_path, "net", dense()), ModelConfig(), warmup=tmp_path / "gone")
    with pytest.raises(LoadError, match="gone cannot be read: No such file or directory"):
        load_and_probe(file)


@given(at=st.integers(0, 400), change=st.binary(min_size=1, max_size=8), cut=st.integers(0, 400) | st.none())
def test_broken_files_are_sentences(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes, cut: int | None
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    path = record(folder, x=np.ones((2, 2), np.float32))
    content = bytearray(path.read_bytes())
    content[at : at + len(change)] = change
    path.write_bytes(content[:cut])
    with contextlib.suppress(LoadError):  # and nothing else
        list(read_requests(spec(), folder))
