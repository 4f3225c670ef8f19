"""Compute threads: each takes a batch, runs it without the GIL, and wakes the talking thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import Final

from penstock.wire.slots import Slots
from penstock.worker.batcher import Batch
from penstock.worker.execute import Executed, execute
from penstock.worker.model import Model

# A model whose batches take less than this runs on the talking thread: handing over and back costs about 60 us, and all
# that waits meanwhile is for the same device.
INLINE_MAX_S: Final = 100e-6
_SMOOTHING: Final = 1 / 16  # weight of one batch in a model's mean time


class Instances:
    """``count`` threads, or more. ``fileno``, an eventfd, is readable once ``take`` has something new."""

    def __init__(self, count: int, slots: Slots | None = None, graphs: bool = False) -> None:
        """``slots``: where large outputs go while there is room; ``graphs``: one more, for all models with CUDA
        graphs."""
        self.batches = 0  # that have run and been taken, ever
        self._slots = slots
        self._todo: SimpleQueue[tuple[Model, Batch] | None] = SimpleQueue()
        self._recorded: SimpleQueue[tuple[Model, Batch] | None] = SimpleQueue()
        self._ran: deque[Executed] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads: list[threading.Thread] = []
        self._count = 0
        self._graphs = False
        self.grow(count, graphs)

    def grow(self, count: int, graphs: bool = False) -> bool:
        """Have so many threads at least. Whether there are more for models without CUDA graphs."""
        grows = count > self._count
        for number in range(self._count, count):
            self._start(self._todo, f"instance-{number}")
        self._count = max(count, self._count)
        if graphs and not self._graphs:  # a CUDA graph is replayed by the thread that recorded it
            self._start(self._recorded, "graphs")
            self._graphs = True
        return grows

    def _start(self, todo: SimpleQueue[tuple[Model, Batch] | None], name: str) -> None:
        thread = threading.Thread(target=self._compute, args=(todo,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def fileno(self) -> int:
        return self._wake

    def share(self, slots: Slots) -> None:
        """Large outputs go there from now on."""
        self._slots = slots

    def run(self, model: Model, batch: Batch) -> Executed | None:
        """Have a batch run: on a thread, or here and now (then it is returned) when that costs less."""
        if model.gpu is not None or model.run_s > INLINE_MAX_S:  # whoever waits for a GPU takes little time itself
            (self._recorded if model.gpu is not None and model.config.cuda_graphs else self._todo).put((model, batch))
            return None
        executed = execute(model, batch, self._slots)
        self._measure(executed)
        return executed

    def take(self) -> list[Executed]:
        """The batches that have run since the last call."""
        taken = [self._ran.popleft() for _ in range(len(self._ran))]
        for executed in taken:
            self._measure(executed)
        return taken

    def stop(self) -> None:
        """Let the threads end. One that is inside a model is left behind; it is a daemon."""
        for _ in self._threads:
            self._todo.put(None)
        self._recorded.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._wake)

    def _compute(self, todo: SimpleQueue[tuple[Model, Batch] | None]) -> None:
        while (task := todo.get()) is not None:
            self._ran.append(execute(*task, self._slots))
            del task  # it would hold its callers' memory until the next one comes
            os.eventfd_write(self._wake, 1)

    def _measure(self, executed: Executed) -> None:
        """Keep the model's mean time. It is processor time: how long others kept this thread waiting is not the
        model's."""
        model = executed.model
        model.run_s += (executed.cpu_s - model.run_s) * _SMOOTHING
        self.batches += 1
