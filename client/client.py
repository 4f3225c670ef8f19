"""The synchronous client: one thread owns the sockets, everybody else gets futures."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final

import zmq

from penstock.client.arrays import Forms, decode_outcome
from penstock.client.events import Complete
from penstock.client.link import Link
from penstock.wire.arena import Arena, ArenaError
from penstock.wire.endpoints import default_runtime_dir, parse_broker
from penstock.wire.errors import (
    BAD_INPUT,
    CANCELLED,
    INTERNAL,
    OVERLOADED,
    TOO_LARGE,
    UNAVAILABLE,
    BadMessage,
    PenstockError,
)
from penstock.wire.messages import MAX_TIMEOUT_US, Form, Payload
from penstock.wire.models import ModelState
from penstock.wire.process import fields
from penstock.wire.slots import PLACED_MIN_BYTES, Slot, Slots
from penstock.wire.tensors import Array, Buffer

log = logging.getLogger("penstock.client")

_TIMEOUT_MAX_S: Final = MAX_TIMEOUT_US / 1_000_000
DEFAULT_ARENA_BYTES: Final = 64 << 20
ARENA_WAIT_MAX_S: Final = 10.0  # for room in it; a call's own time may be shorter
_LATE_S: Final = 5.0  # past a call's deadline, after which something is wrong with this process itself


@dataclass(frozen=True, slots=True)
class Timing:
    """What became of a request on its way; seconds, and rows of the batch that it ran in. ``reason``: why that batch
    was closed when it was."""

    queue_s: float
    compute_s: float
    batch_rows: int
    reason: str


class Result(Mapping[str, Array]):
    """A model's outputs by name: writable arrays that belong to the receiver, or with ``copy=False`` read-only ones
    that may lie in the worker's memory. As a context it lets go of its outputs at the end; what lies there is the
    worker's again when no array over it is left, or the client has been closed."""

    def __init__(self, model: str, version: str, outputs: dict[str, Array], timing: Timing) -> None:
        self.model = model
        self.version = version
        self.timing = timing
        self._outputs = outputs

    def __enter__(self) -> Result:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outputs = {}

    def __getitem__(self, name: str) -> Array:
        try:
            return self._outputs[name]
        except KeyError:
            raise KeyError(f"model '{self.model}' has no output '{name}'; it has {list(self._outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self._outputs.items())
        return f"<Result of {self.model} version {self.version}: {shapes}>"


class _Call(Future[Result]):
    """A future that is also the end of its request."""

    def __init__(self, client: Client, payload: bytes | Slot, copy: bool) -> None:
        super().__init__()
        self.number: int | None = None  # set by the client's thread
        self._client = client
        self._copy = copy
        self._slot = payload if isinstance(payload, Slot) else None

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._client._enqueue(self._client._cancel, self)
        return cancelled

    def release(self) -> None:
        """Its inputs are not needed any more."""
        if self._slot is not None:
            self._slot.give_back()

    def complete(self, answer: Complete) -> None:
        self.release()
        client = self._client
        let_go = partial(client._enqueue, client._let_go, answer.held) if answer.held else None
        if not self.set_running_or_notify_cancel():
            if let_go is not None:
                let_go()
            return
        try:
            outcome, outputs = decode_outcome(answer.body, answer.payload, self._copy, let_go)
        except (BadMessage, PenstockError) as error:
            self.set_exception(PenstockError(INTERNAL, f"a worker's answer cannot be read: {error}"))
            return
        batch = answer.batch
        timing = Timing(answer.queue_us * 1e-6, batch.compute_us * 1e-6, batch.rows, batch.reason)
        self.set_result(Result(outcome.model, outcome.version, outputs, timing))

    def fail(self, error: PenstockError) -> None:
        self.release()
        if self.set_running_or_notify_cancel():
            self.set_exception(error)


class Client:
    """A connection to a Penstock server. Safe to share between threads; not across a fork.

    ``address``: the server's runtime directory (default: where ``penstock up`` puts it), ``ipc://`` and that
    directory, or ``tcp://HOST:PORT``. ``timeout``: seconds for each call that does not say otherwise. Connecting is
    part of the first call. ``arena_bytes``: shared memory for large inputs on the way to workers on this host, which is
    allocated then; with 0 they are sent. Raises PenstockError for an address that cannot be one.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        timeout: float = 30.0,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
    ) -> None:
        self._timeout_s = _check_timeout(timeout)
        self._arena_bytes = arena_bytes
        try:
            self._address = parse_broker(address if address is not None else default_runtime_dir())
        except ValueError as error:
            raise PenstockError(BAD_INPUT, str(error)) from None
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a callback of a call that ends may close the client
        self._thread: threading.Thread | None = None
        self._closed = False
        self._forms = Forms()
        self._todo: deque[tuple[Any, tuple[Any, ...]]] = deque()  # for the thread: a method and its arguments
        self._wake = -1
        self._awake = False  # the thread will look at _todo before it sleeps
        self._link: Link | None = None
        self._known = threading.Event()  # what the server serves is known

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        copy: bool = True,
    ) -> Result:
        """Run a model and wait for its outputs.

        ``inputs``: arrays by name; for a batchable model the first dimension counts rows. Lists become arrays of the
        type that the model expects; strings are BYTES. ``outputs``: names, none for all. ``timeout``: seconds.
        ``copy=False``: large outputs are not copied out of the worker's memory; use the result as a context, so that
        the worker gets its memory back soon. Raises PenstockError; its ``retryable`` says whether the same call may
        succeed later.
        """
        limit_s = self._timeout_s if timeout is None else timeout
        call = self.submit(model, inputs, version=version, outputs=outputs, timeout=limit_s, copy=copy)
        try:
            return call.result(limit_s + _LATE_S)
        except TimeoutError:
            raise PenstockError(
                INTERNAL, f"the client's own thread did not end the call within {limit_s:g} s"
            ) from None

    def submit(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        copy: bool = True,
    ) -> Future[Result]:
        """As ``infer``, without waiting for the result: its future ends with it, or with a PenstockError. Cancelling
        the future takes the request out of the queue.

        The inputs are copied: they may be changed once this returns. Blocks only until the server has been reached the
        first time, and while the inputs that are under way leave no room in shared memory for more, first come, first
        served; never in a callback of a future. Raises PenstockError when the request does not fit the model, no server
        is reached in time, or there is no room: OVERLOADED at the end of the timeout or after 10 seconds, TOO_LARGE
        when there never will be.
        """
        start = time.monotonic()
        limit_s = _check_timeout(self._timeout_s if timeout is None else timeout)
        link = self._reach(limit_s)
        form, parts = self._forms.build(link.caller.find(model, version), inputs, outputs)
        payload = self._gather(link, parts, form.nbytes, start + limit_s)
        call = _Call(self, payload, copy)
        self._enqueue(self._submit, call, form, payload, limit_s - (time.monotonic() - start))
        thread = self._thread
        if self._closed and thread is not None and thread is not threading.current_thread():
            thread.join()  # closed meanwhile: the thread may have looked for the last time
            self._end_call(call)
        return call

    def models(self, *, timeout: float | None = None) -> list[ModelState]:
        """What the server serves, and how each model fares. Raises PenstockError when no server is reached in time."""
        link = self._reach(_check_timeout(self._timeout_s if timeout is None else timeout))
        return [state for versions in (link.caller.models or {}).values() for state in versions.values()]

    def close(self) -> None:
        """End what is under way with an error, and the connection. Does nothing the second time."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._enqueue(None)
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- on the caller's thread ---

    def _reach(self, limit_s: float) -> Link:
        """The link, once the server has said what it serves. Raises PenstockError."""
        if self._pid != os.getpid():
            raise PenstockError(
                BAD_INPUT, "this Client was made before a fork and cannot be used after it; make one in each process"
            )
        if self._link is None:
            self._start()
        assert self._link is not None
        if not self._known.wait(limit_s):
            raise PenstockError(
                UNAVAILABLE,
                f"no Penstock broker answered at {self._address} within {limit_s:g} s; "
                "is 'penstock up' running there, and as the same user?",
            )
        if self._closed:
            raise PenstockError(CANCELLED, "this Client is closed")
        return self._link

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise PenstockError(CANCELLED, "this Client is closed")
            if self._link is not None:
                return
            self._context: zmq.Context[Any] = zmq.Context()
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            # Not closed by close(): another thread may be about to write, and the number might be another file's by
            # then.
            weakref.finalize(self, os.close, self._wake)
            arena = self._make_arena()
            self._link = Link(self._context, self._address, "", lambda metrics: None, arena)
            self._thread = threading.Thread(target=self._serve, args=(self._link,), name="penstock-client", daemon=True)
            self._thread.start()

    def _make_arena(self) -> Arena | None:
        if not self._arena_bytes or self._address.runtime is None:
            return None
        try:
            return Arena(self._arena_bytes, "penstock-client")
        except ArenaError as error:
            log.warning("no shared memory; inputs are sent", extra=fields(reason=str(error)))
            return None

    def _gather(self, link: Link, parts: Sequence[Buffer], nbytes: int, deadline: float) -> bytes | Slot:
        """A copy of a payload, which lies in shared memory when it is large. Raises PenstockError when there is no
        room."""
        slots = link.slots() if nbytes >= PLACED_MIN_BYTES else None
        if slots is None:
            return b"".join(parts)
        slot = slots.take(nbytes)
        if slot is None:
            slot = self._wait_for_room(slots, nbytes, deadline)
        at = 0
        for part in parts:
            slot.view[at : at + len(part)] = part
            at += len(part)
        return slot

    def _wait_for_room(self, slots: Slots, nbytes: int, deadline: float) -> Slot:
        size = slots.arena.size
        if nbytes > size:
            raise PenstockError(
                TOO_LARGE,
                f"the inputs take {nbytes} bytes, and this client's shared memory has {size}; send fewer rows at a "
                "time, or give it more with Client(arena_bytes=...)",
            )
        # The client's own thread, on which callbacks of futures run, is the one that gives slots back.
        waits = threading.current_thread() is not self._thread
        limit_s = max(0.0, min(deadline - time.monotonic(), ARENA_WAIT_MAX_S)) if waits else 0.0
        slot = _take_within(slots, nbytes, limit_s)
        if slot is None and self._closed:
            raise PenstockError(CANCELLED, "this Client is closed")
        if slot is None:
            when = f"did not come free within {limit_s:.3g} s" if waits else "are not free, and a callback cannot wait"
            raise PenstockError(
                OVERLOADED,
                f"{nbytes} bytes of this client's {size} bytes of shared memory {when}; have less under way, or give "
                "it more with Client(arena_bytes=...)",
                1.0,
            )
        return slot

    def _enqueue(self, method: Any, *arguments: Any) -> None:
        """Have the thread call ``method``; None has it end."""
        self._todo.append((method, arguments))
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._wake, 1)

    # --- on the client's thread ---

    def _serve(self, link: Link) -> None:
        poll = select.poll()
        for readable in (self._wake, *link.filenos()):
            poll.register(readable, select.POLLIN)
        control: int | None = None
        try:
            while self._work(link):
                if link.pump():
                    continue
                if link.caller.models is not None:
                    self._known.set()
                if link.control_fileno != control:
                    if control is not None:
                        poll.unregister(control)
                    control = link.control_fileno
                    if control is not None:
                        poll.register(control, select.POLLIN)
                for readable, _ in poll.poll(max(0.0, link.due() - time.monotonic()) * 1000):
                    if readable == self._wake:
                        os.eventfd_read(self._wake)
                    elif readable == control:
                        link.read_control()
                    else:
                        link.readable(readable)
        finally:
            self._end(link)

    def _work(self, link: Link) -> bool:
        """Do what other threads have asked for. False: end."""
        self._awake = False  # before looking, so that what is added afterwards wakes again
        todo = self._todo
        while todo:
            method, arguments = todo.popleft()
            if method is None:
                return False
            method(link, *arguments)
        return True

    def _submit(self, link: Link, call: _Call, form: Form, payload: Payload, limit_s: float) -> None:
        try:
            call.number = link.caller.submit(form, payload, limit_s, call, time.monotonic())
        except PenstockError as error:
            call.fail(error)

    def _cancel(self, link: Link, call: _Call) -> None:
        if call.number is not None:
            link.caller.cancel(call.number)
        call.release()

    def _let_go(self, link: Link, held: int) -> None:
        link.caller.release(held, time.monotonic())

    def _end(self, link: Link) -> None:
        with self._lock:
            self._closed = True
        for each in list(link.caller.calls.values()):
            assert isinstance(each.sink, _Call)
            self._end_call(each.sink)
        while self._todo:
            method, arguments = self._todo.popleft()
            if method == self._submit:
                self._end_call(arguments[0])
        link.close()
        self._context.term()
        self._known.set()

    def _end_call(self, call: _Call) -> None:
        with self._lock:
            if not call.done():
                call.fail(PenstockError(CANCELLED, "the client was closed"))


def _take_within(slots: Slots, nbytes: int, limit_s: float) -> Slot | None:
    """As ``Slots.take``, but the calling thread waits for room if need be."""
    woken = threading.Event()
    wait = slots.wait(nbytes, 0, woken.set)
    try:
        woken.wait(limit_s)
    except BaseException:  # such as KeyboardInterrupt
        slot = slots.end(wait)
        if slot is not None:
            slot.give_back()
        raise
    return slots.end(wait)


def _check_timeout(timeout: float) -> float:
    """Seconds that a call may take. Raises PenstockError for what is none."""
    if not 0 < timeout <= _TIMEOUT_MAX_S:
        raise PenstockError(
            BAD_INPUT, f"a timeout is more than 0 and at most {_TIMEOUT_MAX_S:.0f} seconds, not {timeout!r}"
        )
    return timeout
