"""Compute threads: batches go in, results come out, nothing stays behind."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper

from penstock.wire.messages import Failure
from penstock.wire.tensors import Array
from penstock.worker.batcher import Batch
from penstock.worker.execute import Executed
from penstock.worker.instances import INLINE_MAX_S, Instances
from penstock.worker.model import Model

if TYPE_CHECKING:
    from tests.worker.conftest import Requests, Workshop

PATIENCE_S = 30.0


class Gate:
    """A session that runs when it is let: two of these at once are two threads inside a model at once."""

    def __init__(self, session: object, parties: int) -> None:
        self._session = session
        self._barrier = threading.Barrier(parties, timeout=PATIENCE_S)

    def run(self, names: Sequence[str], feed: dict[str, Array]) -> object:
        self._barrier.wait()
        return self._session.run(names, feed)  # type: ignore[attr-defined]


@pytest.fixture
def instances() -> Iterator[Instances]:
    started = Instances(2)
    yield started
    started.stop()


@pytest.fixture
def model(workshop: Workshop) -> Model:
    """Fresh, because its mean time changes."""
    return workshop.unary("Neg", TensorProto.FLOAT, ["N", 2], max_batch_size=8)


MakeBatch = Callable[[Model, int], Batch]


@pytest.fixture
def batch(requests: Requests) -> MakeBatch:
    """``batch(model, serial)``: of one request, whose id and numbers are the serial."""

    def make(model: Model, serial: int) -> Batch:
        asked = requests.ask(model, {"x": np.full((1, 2), serial, np.float32)})
        return Batch(serial, ("model", "1"), [requests.lot(model, [asked], [serial])], 1, "full")

    return make


def wait(instances: Instances, count: int) -> list[Executed]:
    """As many batches as are expected, taken when the descriptor says that there are some."""
    taken: list[Executed] = []
    poll = select.poll()
    poll.register(instances.fileno(), select.POLLIN)
    while len(taken) < count:
        assert poll.poll(PATIENCE_S * 1000), f"{len(taken)} of {count} batches came"
        os.eventfd_read(instances.fileno())
        taken += instances.take()
    return taken


def test_model_that_takes_its_time_runs_on_a_thread(
    instances: Instances, model: Model, batch: MakeBatch, requests: Requests
) -> None:
    model.run_s = 1.0
    assert instances.run(model, batch(model, 1)) is None
    [executed] = wait(instances, 1)
    assert executed.batch.serial == 1
    answer = requests.answers(executed)[b"caller a"][1]
    assert not isinstance(answer, Failure)
    assert answer["y"].tolist() == [[-1, -1]]
    assert instances.take() == []


def test_model_that_was_not_timed_runs_on_a_thread(instances: Instances, model: Model, batch: MakeBatch) -> None:
    assert model.run_s == float("inf")
    assert instances.run(model, batch(model, 1)) is None
    wait(instances, 1)


def test_cuda_graphs_mean_nothing_on_the_cpu(instances: Instances, batch: MakeBatch, workshop: Workshop) -> None:
    """There is no thread for them, so whoever waited for it would wait for ever."""
    model = workshop.unary("Neg", TensorProto.FLOAT, ["N", 2], cuda_graphs=True)
    assert instances.run(model, batch(model, 1)) is None
    [executed] = wait(instances, 1)
    assert executed.batch.serial == 1


def test_model_that_takes_less_than_handing_it_over_runs_at_once(
    instances: Instances, model: Model, batch: MakeBatch
) -> None:
    model.run_s = INLINE_MAX_S / 2
    executed = instances.run(model, batch(model, 1))
    assert executed is not None
    assert executed.batch.serial == 1
    assert instances.take() == []


def test_mean_time_of_a_model_follows_what_its_batches_take(
    instances: Instances, model: Model, batch: MakeBatch
) -> None:
    model.run_s = 1.0
    instances.run(model, batch(model, 1))
    [executed] = wait(instances, 1)
    assert model.run_s == pytest.approx(1.0 + (executed.cpu_s - 1.0) / 16)
    model.run_s = 0.0
    inline = instances.run(model, batch(model, 2))
    assert inline is not None
    assert model.run_s == pytest.approx(inline.cpu_s / 16)


def test_all_that_is_given_comes_back_once(instances: Instances, model: Model, batch: MakeBatch) -> None:
    model.run_s = 1e9
    for serial in range(200):
        assert instances.run(model, batch(model, serial)) is None
    assert sorted(executed.batch.serial for executed in wait(instances, 200)) == list(range(200))


def test_instances_run_at_the_same_time(instances: Instances, model: Model, batch: MakeBatch) -> None:
    """Neither batch would end if the other did not run too."""
    model._session = Gate(model._session, parties=2)
    for serial in 1, 2:
        instances.run(model, batch(model, serial))
    assert {executed.batch.serial for executed in wait(instances, 2)} == {1, 2}


def test_batch_that_fails_leaves_its_thread_alive(
    instances: Instances, workshop: Workshop, requests: Requests, model: Model, batch: MakeBatch
) -> None:
    table = helper.make_tensor("t", TensorProto.STRING, [1], np.array([b"\xff"], dtype=object))
    node = helper.make_node("Gather", ["t", "i"], ["y"])
    ports = {"i": (TensorProto.INT64, ["N"])}, {"y": (TensorProto.STRING, ["N"])}
    bad = workshop.load(workshop.build([node], *ports, {"t": table}))
    for number in 1, 2, 3:
        lot = requests.lot(bad, [requests.ask(bad, {"i": np.array([0])})], [number])
        instances.run(bad, Batch(number, ("model", "1"), [lot], 1, "full"))
    failed = wait(instances, 3)
    assert all(isinstance(requests.answers(each)[b"caller a"][each.batch.serial], Failure) for each in failed)
    instances.run(model, batch(model, 4))
    assert wait(instances, 1)[0].batch.serial == 4


def test_stop_leaves_no_thread_and_no_descriptor() -> None:
    before = set(threading.enumerate())
    instances = Instances(3)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {
        "instance-0",
        "instance-1",
        "instance-2",
    }
    descriptor = instances.fileno()
    instances.stop()
    assert set(threading.enumerate()) <= before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_stop_lets_what_was_given_run_first(model: Model, batch: MakeBatch) -> None:
    instances = Instances(1)
    for serial in range(5):
        instances.run(model, batch(model, serial))
    instances.stop()
    assert [executed.batch.serial for executed in instances.take()] == list(range(5))
