"""A peer that floods the broker as fast as it can and reads nothing: ``python -m tests.system.flooder WHAT RUNTIME``, a
process of its own, so that it takes no time from the clients beside it. It ends with its standard input.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import msgpack
import numpy as np
import zmq

from penstock.client.arrays import make_form
from penstock.wire.codec import pack, unpack
from penstock.wire.messages import TO_CALLER, Ask, CallerHello, Models, Requests, Submit, Welcome, Workers
from penstock.wire.models import Layout, ModelSpec, Tensor

_TIMEOUT_US = 60_000_000
_ID = b"\x01" + os.getpid().to_bytes(7, "big")
_AT_ONCE = {"submits": 16, "surplus": 4096}  # requests of a message
_LOOK = 64  # messages between two looks at standard input


def submits(spec: ModelSpec, epoch: int, count: int) -> Iterator[bytes]:
    row = np.ones((1, 4), np.float32)
    layout = Layout((Tensor("x", "FP32", (1, 4), 0, row.nbytes),), ())
    form = make_form(spec, layout, row.nbytes)
    timeouts, blob, first = (_TIMEOUT_US,) * count, row.tobytes() * count, 1
    while True:
        ids = tuple(range(first, first + count))
        yield pack(Submit(epoch, [Requests(form, ids, timeouts)], blob=blob))
        first += count


def garbage() -> Iterator[bytes]:
    return cycle([msgpack.packb([1, 2, 1, [], [], [], b""]), os.urandom(10_000), b"\x91" * 100_000])


def main() -> None:
    what, runtime = sys.argv[1], Path(sys.argv[2])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    broker, results = context.socket(zmq.DEALER), context.socket(zmq.SUB)
    for each in (broker, results):
        each.set(zmq.LINGER, 0)
    broker.set(zmq.IDENTITY, _ID)
    broker.set(zmq.SNDHWM, 1000)
    broker.connect(f"ipc://{runtime / 'callers.sock'}")
    broker.send(pack(CallerHello(0, "flooder", os.getpid(), True)))
    epoch, spec, paths = 0, None, list[str]()
    while not (epoch and spec and paths):
        message = unpack(broker.recv(), [], TO_CALLER)
        if isinstance(message, Welcome):
            epoch = message.epoch
        elif isinstance(message, Models):
            spec = next((model.spec for model in message.models if model.name == "dense"), None)
        elif isinstance(message, Workers):
            paths = [worker.endpoint for worker in message.workers]
    for path in paths:
        results.connect(path)
    results.subscribe(_ID)
    broker.set(zmq.RCVHWM, 1)
    said: Iterator[bytes]
    if what == "garbage":
        said = garbage()
    elif what == "asks":
        said = (pack(Ask(epoch, serial)) for serial in range(1 << 40))
    else:
        said = submits(spec, epoch, _AT_ONCE[what])
    sent = 0
    print("begun", flush=True)
    while sent % _LOOK or not select.select([sys.stdin], [], [], 0)[0]:
        if broker.poll(100, zmq.POLLOUT):
            broker.send(next(said), zmq.NOBLOCK)
            sent += 1
        elif select.select([sys.stdin], [], [], 0)[0]:
            break
    print(sent, flush=True)
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
