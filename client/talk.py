"""One link that many threads share: who waits for what comes, and who sends.

Leader and followers: a thread that waits for its request and finds nobody reading waits for what comes, for all, and
ends what has ended; the others send for themselves and are woken when theirs has. A leader whose request has ended
hands on to whoever has waited longest. So a lone request is sent, waited for and received by the thread that wants it.

The keeper is a thread of the client's own that does all the rest: it beats, connects again, sends what has been
enqueued (one message for all that has come up), leads while only futures wait or nobody has asked for a while, and ends
futures, so that their callbacks run on its thread, outside the lock.

The link and its core belong to whoever has ``_lock``; a leader waits without it. What has been read twice, because two
have waited at a change of leaders, is found empty by the second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from penstock.client.events import Complete
from penstock.client.link import EVENTS_MAX, Link
from penstock.client.short import Plan
from penstock.wire.errors import CANCELLED, INTERNAL, LOST, OVERLOADED, PenstockError
from penstock.wire.messages import Form, Payload
from penstock.wire.slots import Slot

log = logging.getLogger("penstock.client")

_STANDBY_S: Final = 0.1  # between two looks of a keeper that others lead; and how long nobody has asked before it leads
_GRACE_S: Final = 0.3  # past a request's time, when its leader looks itself after what is due, and then every
_TICK_S: Final = 0.1
END_S: Final = 5.0  # for the keeper to end everything: it waits for nobody, but for a name server that does not answer
_LATE_S: Final = 5.0  # past a request's time, after which something is wrong with this process itself

Task = tuple[Callable[..., None] | None, tuple[Any, ...]]


class Future(Protocol):
    """A request whose end nobody waits for here. Both are called by the keeper, outside the lock."""

    number: int | None

    def end(self, answer: Complete | None, error: PenstockError | None, /) -> None: ...


class _Waiter:
    """A thread that waits for its request. Its methods are called with the lock."""

    __slots__ = ("answer", "done", "error", "talk", "until", "wake")

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.done = False
        self.until: float  # when it is given up, once its time is over
        self.wake: threading.Lock | None = None  # released when a follower has something to do

    def complete(self, answer: Complete, /) -> None:
        self.answer: Complete | None = answer
        self.done = True
        if self.wake is not None:
            self.rouse()

    def fail(self, error: PenstockError, /) -> None:
        self.answer = None
        self.error = error
        self.done = True
        if self.wake is not None:
            self.rouse()

    def rouse(self) -> None:
        """A follower leads from now on, or has ended."""
        wake, self.wake = self.wake, None
        self.talk._followers.pop(self, None)
        if wake is not None:
            wake.release()


class _Sink:
    """The end of a future's request, on its way to the keeper."""

    __slots__ = ("done", "future", "talk")

    def __init__(self, talk: Talk, future: Future) -> None:
        self.done = False
        self.talk = talk
        self.future = future

    def complete(self, answer: Complete, /) -> None:
        self._end(answer, None)

    def fail(self, error: PenstockError, /) -> None:
        self._end(None, error)

    def _end(self, answer: Complete | None, error: PenstockError | None) -> None:
        self.done = True
        self.talk._under_way.discard(self)
        self.talk._ended.append((self.future, answer, error))


class Talk:
    """``start`` and ``close`` begin and end it. ``known`` is set once the server has said what it serves, and when it
    never will; ``ready`` says that it can be asked.

    ``connect`` makes a link. It is called again when a thread was interrupted (Ctrl-C) inside the core, whose state
    nobody can rely on then: what was under way ends with ``lost``.
    """

    def __init__(self, connect: Callable[[], Link]) -> None:
        """Raises EndpointError."""
        self._connect = connect
        self.link = connect()
        self.known = threading.Event()  # what the server serves is known; or nothing will ever be
        self.ready = False
        # Of a kind that its owner can take again, so that a signal handler or a finalizer that asks this very client is
        # told an error (``_inside`` is set then) instead of waiting for itself for ever.
        self._lock = threading.RLock()
        self._leader: _Waiter | None = None  # None: the keeper, if it likes
        self._followers: dict[_Waiter, None] = {}  # the longest waiting first
        self._under_way: set[_Sink] = set()  # of futures
        self._ended: deque[tuple[Future, Complete | None, PenstockError | None]] = deque()
        self._asked = 0  # by waiters, ever
        # For the keeper: requests, bounded by ``submit``, and at most a cancel and a release of each.
        self._todo: deque[Task] = deque()
        self._awake = False  # the keeper will look at _todo before it sleeps
        self._inside = False  # the core is at work. Found so by who has the lock: a thread was interrupted there
        self._stopped = False  # nothing can be asked: it is being closed or made anew
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # the keeper's
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # the leader's
        # Not closed by close(): another thread may be about to write, and the number might be another file's by then.
        weakref.finalize(self, os.close, self._wake)
        weakref.finalize(self, os.close, self._nudge)
        self.link.watch(self._nudge, self._nudged)
        self.thread = threading.Thread(target=self._keep, name="penstock-client", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End everything with an error. Waits for it, unless the keeper itself calls this."""
        if self.thread.is_alive():
            self.enqueue(None)
            if self.thread is not threading.current_thread():
                self.thread.join(END_S)

    # --- on any thread ---

    def ask(self, link: Link, form: Form, payload: Payload, limit_s: float, plan: Plan | None = None) -> Complete:
        """Send a request that was made for this link, by its plan if it has one, and wait for its end. Raises
        PenstockError."""
        waiter, lock = _Waiter(self), self._lock
        try:
            with lock:
                if self._inside or self._stopped or link is not self.link:
                    raise self._why_not()
                self._inside = True
                packed = None
                if plan is not None and not link.broker.out_bytes:
                    packed = link.short.submit(  # type: ignore[union-attr]
                        plan, payload, limit_s, waiter, time.monotonic()
                    )
                if packed is None:
                    self._begin(link, form, payload, limit_s, waiter)
                elif not link.broker.send_small(packed):
                    link.broke()
                self._asked += 1
                if self._leader is None:
                    self._leader = waiter
                elif not waiter.done:
                    waiter.wake = threading.Lock()
                    waiter.wake.acquire()
                    self._followers[waiter] = None
                    self._leave()
                self._inside = False
            if self._leader is not waiter:
                self._follow(waiter, limit_s)
            poll, left_s = link.poll, limit_s + _GRACE_S
            while not waiter.done or self._leader is waiter:
                events = poll(0.0 if waiter.done else left_s, EVENTS_MAX)
                with lock:
                    if self._inside:
                        raise self._why_not()
                    self._inside = True
                    if link.take(events) or not events:
                        link.tick()
                    if waiter.done and self._leader is waiter:
                        if self._followers or self._stopped or link.caller.calls:
                            self._hand_on()
                        else:
                            self._leader = None
                    if self._ended:
                        self._rouse_keeper()
                    self._inside = False
                if not events and not waiter.done:
                    left_s = self._late(waiter, left_s, limit_s)
        except BaseException:
            self._abandon(waiter)
            raise
        answer, waiter.answer = waiter.answer, None  # which knows its sink: garbage that only a collection would find
        if answer is None:
            try:
                raise waiter.error
            finally:
                del waiter  # the error's traceback knows this frame
        return answer

    def _begin(self, link: Link, form: Form, payload: Payload, limit_s: float, waiter: _Waiter) -> None:
        """The general way."""
        try:
            link.caller.submit(form, payload, limit_s, waiter, time.monotonic())
        except PenstockError:
            self._inside = False
            raise
        link.flush()

    def _follow(self, waiter: _Waiter, limit_s: float) -> None:
        """Wait until the request has ended, or this thread is to lead."""
        wake = waiter.wake
        if wake is not None:  # else it has happened already
            wake.acquire(True, limit_s + _LATE_S)
        if not waiter.done and self._leader is not waiter:
            raise PenstockError(INTERNAL, f"nobody has ended the call within {limit_s + _LATE_S:g} s")

    def _late(self, waiter: _Waiter, left_s: float, limit_s: float) -> float:
        """Nothing has come for ``left_s``, nor has the core ended the request. How long to wait on."""
        if left_s <= _TICK_S and time.monotonic() > waiter.until:
            raise PenstockError(INTERNAL, f"nobody has ended the call within {limit_s + _LATE_S:g} s")
        if left_s > _TICK_S:
            waiter.until = time.monotonic() + _LATE_S
        return _TICK_S

    def _hand_on(self) -> None:
        """The leader leaves: to whoever has waited longest, or to the keeper."""
        for follower in self._followers:
            self._leader = follower
            follower.rouse()
            return
        self._leader = None
        if self.link.caller.calls or self._stopped:
            self._rouse_keeper()

    def _leave(self) -> None:
        """Who is not the leader has done something: it may have ended the leader's request, or futures'."""
        leader = self._leader
        if leader is not None and leader.done:
            os.eventfd_write(self._nudge, 1)
        if self._ended:
            self._rouse_keeper()

    def _abandon(self, waiter: _Waiter) -> None:
        """Its thread does not wait any more, for whatever reason."""
        with self._lock:
            if self._inside:
                self._spoil()
            self._followers.pop(waiter, None)
            if not self._stopped:
                for number in [call.id for call in self.link.caller.calls.values() if call.sink is waiter]:
                    self.link.caller.cancel(number)
            if self._leader is waiter:
                self._hand_on()
            self._rouse_keeper()  # which tells the broker

    def _spoil(self) -> None:
        """A thread was interrupted inside the core: all that it held is lost. The keeper begins anew."""
        self._inside, self._stopped = False, True
        self.ready = False
        self.known.clear()
        self._end_all(self._why_not())
        self._rouse_keeper()

    def _why_not(self) -> PenstockError:
        if self._closing:
            return PenstockError(CANCELLED, "the client was closed")
        return PenstockError(LOST, "the client was interrupted while it held the request; send it again", 0.0)

    def _end_all(self, error: PenstockError) -> None:
        sinks: list[_Waiter | _Sink] = [*self._followers, *self._under_way]
        if self._leader is not None:
            sinks.append(self._leader)
        for sink in sinks:
            if not sink.done:
                sink.fail(error)
        self._leave()

    def submit(self, link: Link, future: Future, form: Form, payload: Payload, limit_s: float) -> None:
        """Have the keeper send a request that was made for this link; its future ends. Raises PenstockError when too
        many wait for the keeper already, as they do while a callback keeps it."""
        if len(self._todo) >= link.caller.identity.calls_max:
            sentence = f"{len(self._todo)} requests wait to be sent; does a callback of a future not return?"
            raise PenstockError(OVERLOADED, sentence, 1.0)
        self.enqueue(self._submit, link, future, form, payload, limit_s)

    def cancel(self, future: Future) -> None:
        """Nobody wants the result any more."""
        self.enqueue(self._cancel, future)

    def release(self, link: Link, held: int) -> None:
        """A result that came over this link is not read any more, see ``Caller.release``. The broker hears of it within
        some milliseconds."""
        self.enqueue(self._release, link, held)

    def let_go(self, link: Link, held: int) -> None:
        """As ``release``, without waking the keeper for it: the broker hears of it with the next request, or when the
        keeper looks next."""
        with self._lock:
            if self._inside:
                self.release(link, held)
            else:
                self._release(link, held)

    def enqueue(self, method: Callable[..., None] | None, *arguments: Any) -> None:
        """Have the keeper call ``method`` with the lock; None has it end. Takes no lock itself, so that it may be
        called wherever a garbage collection may be."""
        self._todo.append((method, arguments))
        self._rouse_keeper()

    def _rouse_keeper(self) -> None:
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._wake, 1)

    def _nudged(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._nudge)

    # --- on the keeper's thread ---

    def _keep(self) -> None:
        try:
            while self._keep_link(self.link):
                self._renew()
        finally:
            self._end()

    def _keep_link(self, link: Link) -> bool:
        """Until the client is closed; True when the link is to be made anew."""
        standby, leading = select.poll(), select.poll()
        standby.register(self._wake, select.POLLIN)
        leading.register(self._wake, select.POLLIN)
        leading.register(link.fileno(), select.POLLIN)
        lead, asked, wait_s = True, self._asked, 0.0
        while True:
            for fileno, _ in (leading if lead else standby).poll(wait_s * 1000):
                if fileno == self._wake:
                    os.eventfd_read(self._wake)
            with self._lock:
                if self._inside:
                    self._spoil()
                try:
                    self._inside = True
                    self._work()
                    lead = (
                        not self._stopped and self._leader is None and (bool(link.caller.calls) or asked == self._asked)
                    )
                    wait_s = _STANDBY_S
                    if not self._stopped:
                        if lead:
                            link.pump()
                        else:
                            link.tick()
                        if not self.ready and link.caller.models is not None:
                            self.ready = True
                            self.known.set()
                        due_s = max(0.0, link.due() - time.monotonic())
                        wait_s = due_s if lead else min(due_s, _STANDBY_S)
                    asked = self._asked
                    self._leave()
                    self._inside = False
                except Exception:
                    log.exception("a defect of the client")
                    self._spoil()
                over = self._stopped and self._leader is None
            self._finish()
            if over:
                break
        return not self._closing

    def _work(self) -> None:
        """Do what other threads have asked for."""
        self._awake = False  # before looking, so that what is added afterwards wakes again
        todo = self._todo
        while todo:
            method, arguments = todo.popleft()
            if method is None:
                self._close()
            else:
                method(*arguments)

    def _close(self) -> None:
        self._closing = self._stopped = True
        self.ready = False
        self._end_all(self._why_not())

    def _submit(self, link: Link, future: Future, form: Form, payload: Payload, limit_s: float) -> None:
        sink = _Sink(self, future)
        if self._stopped or link is not self.link:
            sink.fail(self._why_not())
            return
        self._under_way.add(sink)
        try:
            future.number = link.caller.submit(form, payload, limit_s, sink, time.monotonic())
        except PenstockError as error:
            sink.fail(error)

    def _cancel(self, future: Future) -> None:
        if future.number is not None:
            call = self.link.caller.calls.get(future.number)
            if call is not None:
                self._under_way.discard(call.sink)
                self.link.caller.cancel(future.number)
        future.end(None, None)

    def _release(self, link: Link, held: int) -> None:
        if link is self.link and not self._stopped:
            link.caller.release(held, time.monotonic())

    def _finish(self) -> None:
        """End futures; what they call back may ask this client again, or close it."""
        ended = self._ended
        while ended:
            future, answer, error = ended.popleft()
            future.end(answer, error)

    def _renew(self) -> None:
        with self._lock:
            self.link.close()
            self.link = self._connect()
            self.link.watch(self._nudge, self._nudged)
            self._stopped = False

    def _end(self) -> None:
        with self._lock:
            self._close()
            while self._todo:
                method, arguments = self._todo.popleft()
                if method == self._submit:
                    method(*arguments)
            self.link.close()
        del self._connect  # it knows who has this; with it the descriptors would stay until a collection of garbage
        self.known.set()
        self._finish()


def give_back(payload: Payload) -> None:
    """A request's inputs are not needed any more."""
    if isinstance(payload, Slot):
        payload.give_back()
