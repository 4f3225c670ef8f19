"""Batches that run in a device's own memory get the same answers; nothing is left behind there."""

from __future__ import annotations

import gc
from contextlib import closing
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penstock.wire.arena import Arena
from penstock.wire.slots import Slots
from penstock.worker.cuda import Gpu
from penstock.worker.execute import execute
from penstock.worker.model import Model
from penstock.worker.ondevice import DeviceStaging
from tests.worker.hostdevice import HostDevice
from tests.worker.test_staging import same, sample

if TYPE_CHECKING:
    from tests.worker.conftest import Ports, Requests, Workshop

T = TensorProto
node = helper.make_node
A = b"caller a"
ROWS_MAX = 7
WIDE = 4096  # floats of a row that is worth a slot


def on_device(model: Model, device: HostDevice) -> Model:
    model.gpu = cast(Gpu, device)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "graphs"])
def dense(workshop: Workshop, request: pytest.FixtureRequest) -> Model:
    """y = x w, 3 -> 2, and z = -k of whole numbers."""
    weights = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Neg", ["k"], ["z"])]
    inputs: Ports = {"x": (T.FLOAT, ["N", 3]), "k": (T.INT64, ["N"])}
    outputs: Ports = {"y": (T.FLOAT, ["N", 2]), "z": (T.INT64, ["N"])}
    model = workshop.make(
        nodes, inputs, outputs, {"w": weights}, name="dense", max_batch_size=ROWS_MAX, cuda_graphs=request.param
    )
    assert on_device(model, HostDevice()).stage()
    return model


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4))
def test_batches_one_after_another_get_what_they_would_get_alone(
    dense: Model, requests: Requests, sizes: list[list[int]]
) -> None:
    for number, batch in enumerate(sizes):
        lots, expected, rows = [], {}, 0
        for at, size in enumerate(batch):
            if rows + size > ROWS_MAX:
                break
            rows += size
            inputs = sample(size, 100 * number + at)
            lots.append(requests.lot(dense, [requests.ask(dense, inputs)], [at]))
            expected[at] = requests.expected(dense, inputs)
        same(requests.answers(requests.run(dense, lots))[A], expected)
    with dense.staging() as staging:
        assert isinstance(staging, DeviceStaging), "it was given up"


@pytest.mark.parametrize("rows", [1, 3, ROWS_MAX])
def test_what_callers_read_is_copied_to_where_they_read_it(workshop: Workshop, requests: Requests, rows: int) -> None:
    model = workshop.unary("Neg", T.FLOAT, ["N", WIDE], max_batch_size=ROWS_MAX)
    assert on_device(model, HostDevice()).stage()
    with closing(Arena(1 << 20, "test")) as arena:
        slots = Slots(arena)
        for start in 0, 1000:
            x = np.arange(start, start + rows * WIDE, dtype=np.float32).reshape(rows, WIDE)
            lot = requests.lot(model, [requests.ask(model, {"x": x}, ["y"])], [7])
            lot.reads = True
            executed = requests.run(model, [lot], lambda model, batch: execute(model, batch, slots))
            [group] = executed.publications[A].groups
            [place] = group.places
            assert bytes(arena.view(place, group.nbytes)) == (-x).tobytes()
            executed.publications[A].give_back()
    with model.staging() as staging:
        assert isinstance(staging, DeviceStaging), "it was given up"


def test_only_the_outputs_that_are_wanted_are_copied(workshop: Workshop) -> None:
    ports: Ports = {"y": (T.FLOAT, ["N", 4]), "z": (T.FLOAT, ["N", 2])}
    nodes = [node("Neg", ["x"], ["y"]), node("Slice", ["x", "from", "to", "axes"], ["z"])]
    places = {"from": np.array([0]), "to": np.array([2]), "axes": np.array([1])}
    model = workshop.make(nodes, {"x": (T.FLOAT, ["N", 4])}, ports, places, max_batch_size=2)
    assert on_device(model, HostDevice()).stage()
    memory = np.zeros(8, np.float32)
    with model.staging() as staging:
        assert staging is not None
        feeds = staging.inputs[2]
        feeds[0][...] = np.arange(8, dtype=np.float32).reshape(2, 4)
        staging.run_into(2, feeds, {1: (2, 2)}, memory.ctypes.data)
    assert memory.tolist() == [0, 1, 4, 5, 0, 0, 0, 0]


def test_a_model_that_runs_requests_alone_has_memory_for_one(workshop: Workshop, requests: Requests) -> None:
    model = workshop.unary("Neg", T.FLOAT, [3, 4])
    device = HostDevice()
    assert on_device(model, device).stage()
    x = np.ones((3, 4), np.float32)
    lots = [requests.lot(model, [requests.ask(model, {"x": x})], [1])]
    same(requests.answers(requests.run(model, lots))[A], {1: {"y": -x}})
    assert sum(map(len, device.taken.values())) == 2 * 256


def test_what_was_taken_is_given_back_with_the_model(workshop: Workshop) -> None:
    device = HostDevice()
    model = on_device(workshop.unary("Neg", T.FLOAT, ["N", 4], instances=3), device)
    assert model.stage()
    assert (len(device.taken), len(device.pinned)) == (6, 6)
    del model
    gc.collect()
    assert (device.taken, device.pinned) == ({}, {})


@pytest.mark.parametrize("pieces", range(4))
def test_without_room_batches_run_as_onnx_runtime_has_them(workshop: Workshop, requests: Requests, pieces: int) -> None:
    """Whichever piece of memory it is that cannot be had."""
    nbytes = 256 * 8  # of 8 rows of 256 bytes, and as much for what comes out
    device = HostDevice(room=nbytes * pieces)
    model = on_device(workshop.unary("Neg", T.FLOAT, ["N", 64], max_batch_size=8), device)
    assert not model.stage()
    assert (device.taken, device.pinned, device.room) == ({}, {}, nbytes * pieces)
    x = np.ones((2, 64), np.float32)
    same(
        requests.answers(requests.run(model, [requests.lot(model, [requests.ask(model, {"x": x})], [1])]))[A],
        {1: {"y": -x}},
    )


@pytest.mark.parametrize("dims", [["N", "M"], ["N", 0], []])
def test_rows_of_no_shape_of_their_own_are_not_staged(workshop: Workshop, dims: list[int | str]) -> None:
    device = HostDevice()
    assert not on_device(workshop.unary("Neg", T.FLOAT, dims), device).stage()
    assert (device.taken, device.pinned) == ({}, {})


def test_a_declaration_that_is_wrong_is_found_and_not_followed_again(workshop: Workshop, requests: Requests) -> None:
    """y is declared [N, 4] and comes as [N, 2]."""
    nodes = [node("Compress", ["x", "which"], ["y"], axis=1)]
    which = {"which": np.array([True, False, True, False])}
    ports: Ports = {"y": (T.FLOAT, ["N", 4])}
    model = on_device(workshop.make(nodes, {"x": (T.FLOAT, ["N", 4])}, ports, which), HostDevice())
    assert model.stage()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for number in 1, 2:
        lots = [requests.lot(model, [requests.ask(model, {"x": x})], [number])]
        same(requests.answers(requests.run(model, lots))[A], {number: {"y": x[:, ::2]}})
    with model.staging() as staging:
        assert staging is None
