"""The synchronous client: what users call, around ``talk.py``, where it happens."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final

from penstock.client.arrays import Forms, decode_outcome, in_sequence
from penstock.client.caller import Caller
from penstock.client.events import Complete
from penstock.client.explain import explain
from penstock.client.jobhttp import where_from
from penstock.client.jobs import Job, Jobs, terms
from penstock.client.link import Link
from penstock.client.orders import ORDER_WAIT_S, Orders, late
from penstock.client.short import Plan, Short
from penstock.client.talk import END_S, Talk, give_back
from penstock.client.terms import check_sequence, check_sticky, check_terms, check_timeout
from penstock.wire.arena import Arena, ArenaError, ArenaSearch
from penstock.wire.endpoints import EndpointError, default_runtime_dir, parse_broker
from penstock.wire.errors import (
    BAD_INPUT,
    CANCELLED,
    INTERNAL,
    LOST,
    OVERLOADED,
    TOO_LARGE,
    UNAVAILABLE,
    BadMessage,
    PenstockError,
)
from penstock.wire.messages import LOAD, UNLOAD, Payload
from penstock.wire.models import ModelState, Route
from penstock.wire.process import fields
from penstock.wire.slots import PLACED_MIN_BYTES, Slot, Slots
from penstock.wire.tensors import Array, Buffer

log = logging.getLogger("penstock.client")

_LEAST_S: Final = 1e-6
DEFAULT_ARENA_BYTES: Final = 64 << 20
_ARENA_NAME: Final = "penstock-client"
ARENA_WAIT_MAX_S: Final = 10.0  # for room in it; a call's own time may be shorter


@dataclass(frozen=True, slots=True)
class Timing:
    """What became of a request on its way, in seconds, and the batch that it ran in.

    ``queue_s``: from its acceptance by the broker until its batch began: ``held_s`` at the broker, then ``waited_s`` on
    the worker. ``compute_s``: of the batch, ``model_s`` of that in the model itself. ``batch``: its number on that
    worker. ``reason``: why it was closed when it was. ``worker``: its name.
    """

    queue_s: float
    compute_s: float
    batch_rows: int
    reason: str
    held_s: float
    waited_s: float
    model_s: float
    worker: str
    batch: int


class Result(Mapping[str, Array]):
    """A model's outputs by name: writable arrays that belong to the receiver, or with ``copy=False`` read-only ones
    that may lie in the worker's memory. As a context it lets go of its outputs at the end; what lies there is the
    worker's again when no array over it is left, or the client has been closed."""

    def __init__(self, model: str, version: str, outputs: dict[str, Array], answer: Complete, worker: str) -> None:
        """``worker``: the name of the one that answered."""
        self.model = model
        self.version = version
        self._outputs = outputs
        # Not the answer itself, which knows who waited for it and where it lay.
        self._times = answer.queue_us, answer.held_us
        self._batch = answer.batch
        self._worker = worker

    @property
    def timing(self) -> Timing:
        (queue_us, held_us), batch = self._times, self._batch
        return Timing(
            queue_us * 1e-6,
            batch.compute_us * 1e-6,
            batch.rows,
            batch.reason,
            held_us * 1e-6,
            max(0, queue_us - held_us) * 1e-6,
            batch.model_us * 1e-6,
            self._worker,
            batch.serial,
        )

    def explain(self) -> str:
        """Where the request waited and why, and in which batch on which worker it ran, in one line of words."""
        return explain(*self._times, self._batch, self._worker)

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

    def __init__(self, talk: Talk, link: Link, payload: Payload, copy: bool) -> None:
        super().__init__()
        self.number: int | None = None  # set by the keeper
        self._talk = talk
        self._link = link
        self._payload = payload
        self._copy = copy

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._talk.cancel(self)
        return cancelled

    def end(self, answer: Complete | None, error: PenstockError | None, /) -> None:
        """On the keeper's thread. With neither it has been cancelled, and only its inputs are given back."""
        give_back(self._payload)
        if answer is None and error is None:
            return
        if self.done() or not self.set_running_or_notify_cancel():
            if answer is not None and answer.held:
                self._talk.release(self._link, answer.held)
            return
        if answer is not None:
            try:
                let_go = partial(self._talk.release, self._link, answer.held) if answer.held else None
                self.set_result(_read(self._link, answer, self._copy, let_go))
            except PenstockError as unreadable:
                self.set_exception(unreadable)
        else:
            self.set_exception(error)


def _read(link: Link, answer: Complete, copy: bool, let_go: Callable[[], None] | None = None) -> Result:
    """``let_go``: called once nothing is read any more where the answer lies. Raises PenstockError."""
    try:
        outcome, outputs = decode_outcome(answer.body, answer.payload, copy, let_go)
    except (BadMessage, PenstockError) as error:
        raise PenstockError(INTERNAL, f"a worker's answer cannot be read: {error}") from None
    return Result(outcome.model, outcome.version, outputs, answer, link.caller.worker_name(answer.worker))


class Client:
    """A connection to a Penstock server. Safe to share between threads; not across a fork.

    ``address``: the server's runtime directory (default: where ``penstock up`` puts it), ``ipc://`` and that
    directory, or ``tcp://HOST:PORT``. ``timeout``, ``tenant``: for each call that does not say otherwise, see
    ``infer``. Connecting is part of the first call. ``arena_bytes``: shared memory for large inputs on the way to
    workers on this host, which is allocated then; with 0 they are sent. ``http``: where jobs are submitted, such as
    http://host:8000; needed only for a server that is not on this host. Raises PenstockError for an address that cannot
    be one.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        timeout: float = 30.0,
        tenant: str = "",
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        http: str = "",
    ) -> None:
        self._timeout_s = check_timeout(timeout)
        check_terms(0, tenant)
        self._tenant = tenant
        self._arena_bytes = arena_bytes
        try:
            self._address = parse_broker(address if address is not None else default_runtime_dir())
        except ValueError as error:
            raise PenstockError(BAD_INPUT, str(error)) from None
        self._jobs = Jobs(where_from(http, self._address.runtime), self._timeout_s)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._forms = Forms()
        self._ordered: set[Future[None]] = set()  # what orders under way are waited for by
        self._talk: Talk | None = None
        self._open: Talk | None = None  # the same while it can be asked without a further look
        _clients.add(self)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        priority: int = 0,
        tenant: str | None = None,
        sticky: str = "",
        sequence: str | int = "",
        sequence_start: bool = False,
        sequence_end: bool = False,
        copy: bool = True,
    ) -> Result:
        """Run a model and wait for its outputs.

        ``inputs``: arrays by name; for a batchable model the first dimension counts rows. Lists become arrays of the
        type that the model expects; strings are BYTES. ``outputs``: names, none for all. ``timeout``: seconds.
        ``priority``: from 1, the most urgent, to 5; 0 for the usual one, which is 3. ``tenant``: for whom it is, among
        whom the server shares its time; at most 64 printable ASCII characters. ``sticky``: where a model's traffic is
        split among versions, requests of the same text, such as a user's id, go to the same one. ``sequence``: what it
        is a part of; all of a sequence runs on one worker, one request after another, from that with
        ``sequence_start`` to that with ``sequence_end``. ``copy=False``: large
        outputs are not copied out of the worker's memory; use the result as a context, so that the worker gets its
        memory back soon.
        Raises PenstockError; its ``retryable`` says whether the same call may succeed later.
        """
        limit_s = self._timeout_s if timeout is None else check_timeout(timeout)
        if tenant is None:
            tenant = self._tenant
        check_terms(priority, tenant)
        if sticky:
            check_sticky(sticky)
        talk = self._open
        if talk is None or not talk.ready:
            start = time.monotonic()
            talk = self._reach(limit_s)
            limit_s = max(limit_s - (time.monotonic() - start), _LEAST_S)
        link = talk.link
        assert link.short is not None
        if link.caller.splits:
            version = link.caller.pick(model, version, sticky)
        prepared = None
        if not sequence:
            prepared = link.short.prepare(model, version, inputs, outputs, link.slots(), priority, tenant)
        plan: Plan | None = None
        payload: Payload
        if prepared is not None:
            plan, payload = prepared
            form = plan.form
        else:
            start = time.monotonic()
            form, parts = self._forms.build(link.caller.find(model, version), inputs, outputs, priority, tenant)
            if sequence:
                form = in_sequence(form, *check_sequence(sequence, sequence_start, sequence_end))
            payload = self._gather(talk, link, parts, form.nbytes, start + limit_s)
            limit_s = max(limit_s - (time.monotonic() - start), _LEAST_S)
        try:
            answer = talk.ask(link, form, payload, limit_s, plan)
        finally:
            if type(payload) is Slot:
                payload.give_back()
        if not answer.held:
            return _read(link, answer, copy)
        if not copy:
            return _read(link, answer, False, partial(talk.release, link, answer.held))
        try:
            return _read(link, answer, True)
        finally:
            talk.let_go(link, answer.held)

    def submit(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        priority: int = 0,
        tenant: str | None = None,
        sticky: str = "",
        sequence: str | int = "",
        sequence_start: bool = False,
        sequence_end: bool = False,
        copy: bool = True,
    ) -> Future[Result]:
        """As ``infer``, without waiting for the result: its future ends with it, or with a PenstockError. Cancelling
        the future takes the request out of the queue.

        The inputs are copied: they may be changed once this returns. Blocks only until the server has been reached the
        first time, and while the inputs that are under way leave no room in shared memory for more, first come, first
        served; never in a callback of a future. Raises PenstockError when the request does not fit the model, no server
        is reached in time, or there is no room: OVERLOADED at the end of the timeout or after 10 seconds, TOO_LARGE
        when there never will be; and OVERLOADED at once while as many as may be under way wait to be sent.
        """
        start = time.monotonic()
        limit_s = check_timeout(self._timeout_s if timeout is None else timeout)
        if tenant is None:
            tenant = self._tenant
        check_terms(priority, tenant)
        if sticky:
            check_sticky(sticky)
        talk = self._reach(limit_s)
        link = talk.link
        form, parts = self._forms.build(link.caller.find(model, version, sticky), inputs, outputs, priority, tenant)
        if sequence:
            form = in_sequence(form, *check_sequence(sequence, sequence_start, sequence_end))
        payload = self._gather(talk, link, parts, form.nbytes, start + limit_s)
        call = _Call(talk, link, payload, copy)
        try:
            talk.submit(link, call, form, payload, limit_s - (time.monotonic() - start))
        except PenstockError:
            give_back(payload)
            raise
        if self._closed and talk.thread is not threading.current_thread():
            talk.thread.join(END_S)  # closed meanwhile: the thread may have looked for the last time
            call.end(None, PenstockError(CANCELLED, "the client was closed"))
        return call

    def submit_job(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        time_limit: float | None = None,
        priority: int = 0,
        tenant: str | None = None,
        sticky: str = "",
        callback_url: str = "",
    ) -> Job:
        """Have the server keep a request, run it when it can, and keep the result for some time: both outlive this
        client, and a restart of the server. Returns once the request is on disk.

        Arguments as for ``infer``, but that ``time_limit`` is what running it may take, in seconds. ``callback_url``:
        where the server is to send the result by POST, see ``verify_callback``. Raises PenstockError when the request
        does not fit the model, the store of jobs is full (OVERLOADED) or no gateway is reached; of one that was reached
        and did not answer, the request may have been taken in.
        """
        headers = terms(priority, self._tenant if tenant is None else tenant, sticky, time_limit)
        return self._checked_jobs().submit(model, inputs, version, outputs, headers, callback_url)

    def job(self, id: str) -> Job:
        """The job of this id, which another client may have submitted. Whether there is one is seen when it is
        asked."""
        return Job(self._checked_jobs(), id)

    def _checked_jobs(self) -> Jobs:
        if self._pid != os.getpid():
            raise _made_before_fork()
        return self._jobs

    def models(self, *, timeout: float | None = None) -> list[ModelState]:
        """What the server serves, and how each model fares. Raises PenstockError when no server is reached in time."""
        talk = self._reach(check_timeout(self._timeout_s if timeout is None else timeout))
        return [state for versions in (talk.link.caller.models or {}).values() for state in versions.values()]

    def routes(self, *, timeout: float | None = None) -> list[Route]:
        """Of each model, the version that is served where none is named, its labels and its traffic. Raises
        PenstockError when no server is reached in time."""
        return list(self._known(timeout).routes.values())

    def repository(self, *, timeout: float | None = None) -> str:
        """Where the models lie on the server's host; "" where no worker has said. Raises PenstockError as above."""
        return self._known(timeout).repository

    def _known(self, timeout: float | None) -> Caller:
        return self._reach(check_timeout(self._timeout_s if timeout is None else timeout)).link.caller

    def load_model(self, name: str, config: str = "", *, timeout: float = ORDER_WAIT_S) -> None:
        """Have the server load a model, where orders say what it serves; where its repository does, have it look at
        that again now. Returns once all workers have, and raises PenstockError when they could not, or are not done
        within ``timeout`` seconds; then they go on. ``config``: in place of the model's own configuration, as JSON."""
        self._order(LOAD, name, config, check_timeout(timeout))

    def unload_model(self, name: str, *, timeout: float = ORDER_WAIT_S) -> None:
        """Have the server serve a model no more, where orders say what it serves. What is under way ends. Returns and
        raises as ``load_model``."""
        self._order(UNLOAD, name, "", check_timeout(timeout))

    def _order(self, action: str, name: str, config: str, limit_s: float) -> None:
        start = time.monotonic()
        talk = self._reach(min(limit_s, self._timeout_s))
        if threading.current_thread() is talk.thread:
            raise PenstockError(BAD_INPUT, f"a callback of a future cannot wait for the {action} of a model")
        done: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise PenstockError(CANCELLED, "this Client is closed")
            self._ordered.add(done)
        talk.enqueue(self._send_order, action, name, config, done)
        try:
            done.result(max(0.0, limit_s - (time.monotonic() - start)))
        except TimeoutError:
            raise late(action, name, limit_s) from None
        finally:
            self._ordered.discard(done)

    def _send_order(self, action: str, name: str, config: str, done: Future[None]) -> None:
        """On the keeper's thread, with the lock."""
        try:
            self._orders.send(action, name, config, partial(_end_order, done))
        except PenstockError as error:
            _end_order(done, error)

    def close(self) -> None:
        """End what is under way with an error, and the connection. Does nothing the second time."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed, self._open = True, None
            talk = self._talk
        self._jobs.close()
        if talk is not None:
            talk.close()
        self._end_orders(PenstockError(CANCELLED, "the client was closed"))

    def _end_orders(self, error: PenstockError) -> None:
        for done in list(self._ordered):
            _end_order(done, error)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reach(self, limit_s: float) -> Talk:
        """The link and its threads, once the server has said what it serves. Raises PenstockError."""
        if self._pid != os.getpid():
            raise _made_before_fork()
        talk = self._talk or self._start()
        if not talk.known.is_set() and not talk.known.wait(limit_s):
            raise PenstockError(
                UNAVAILABLE,
                f"no Penstock broker answered at {self._address} within {limit_s:g} s; "
                "is 'penstock up' running there, and as the same user?",
            )
        with self._lock:
            if self._closed:
                raise PenstockError(CANCELLED, "this Client is closed")
            self._open = talk
        return talk

    def _start(self) -> Talk:
        with self._lock:
            if self._closed:
                raise PenstockError(CANCELLED, "this Client is closed")
            if self._talk is None:
                try:
                    talk = Talk(self._connect)
                except EndpointError as error:
                    raise PenstockError(BAD_INPUT, str(error)) from None
                talk.start()
                self._talk = talk
            return self._talk

    def _connect(self) -> Link:
        arena, local = self._make_arena(), self._address.runtime is not None
        search = ArenaSearch(self._arena_bytes, _ARENA_NAME, local and arena is None)
        link = Link(self._address, "", lambda metrics: None, arena, search)
        link.short = Short(link.caller, self._forms)
        self._orders = Orders(link)
        self._end_orders(
            PenstockError(LOST, "the client was interrupted; the states of the models tell what came of it")
        )
        return link

    def _make_arena(self) -> Arena | None:
        if not self._arena_bytes or self._address.runtime is None:
            return None
        try:
            return Arena(self._arena_bytes, _ARENA_NAME)
        except ArenaError as error:
            log.warning("no shared memory; inputs are sent", extra=fields(reason=str(error)))
            return None

    def _gather(self, talk: Talk, link: Link, parts: Sequence[Buffer], nbytes: int, deadline: float) -> bytes | Slot:
        """A copy of a payload, which lies in shared memory when it is large. Raises PenstockError when there is no
        room."""
        slots = link.slots() if nbytes >= PLACED_MIN_BYTES else None
        if slots is None:
            return b"".join(parts)
        slot = slots.take(nbytes)
        if slot is None:
            slot = self._wait_for_room(talk, slots, nbytes, deadline)
        at = 0
        for part in parts:
            slot.view[at : at + len(part)] = part
            at += len(part)
        return slot

    def _wait_for_room(self, talk: Talk, slots: Slots, nbytes: int, deadline: float) -> Slot:
        size = slots.arena.size
        if nbytes > size:
            raise PenstockError(
                TOO_LARGE,
                f"the inputs take {nbytes} bytes, and this client's shared memory has {size}; send fewer rows at a "
                "time, or give it more with Client(arena_bytes=...)",
            )
        # The keeper, on which callbacks of futures run, is the one that gives their slots back.
        waits = threading.current_thread() is not talk.thread
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


def _made_before_fork() -> PenstockError:
    return PenstockError(
        BAD_INPUT, "this Client was made before a fork and cannot be used after it; make one in each process"
    )


def _end_order(done: Future[None], error: PenstockError | None) -> None:
    """The first that comes counts."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


_clients: Final[weakref.WeakSet[Client]] = weakref.WeakSet()


def _forked() -> None:
    """In a child of a fork no client can be used; to ask for the process's id each time would be a system call."""
    for client in _clients:
        client._open = None


os.register_at_fork(after_in_child=_forked)


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
