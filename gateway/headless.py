"""A request without a connection: one that was stored, and whose answer is stored, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from penstock.gateway.connection import Exchange, Http, Stream
from penstock.gateway.reader import Budget, Head
from penstock.gateway.waits import BoundedWait
from penstock.wire.errors import UNSUPPORTED, PenstockError
from penstock.wire.slots import Slot, Slots
from penstock.wire.tensors import Buffer

_HEAD_END: Final = b"\r\n\r\n"


class Answer(NamedTuple):
    """A whole response. ``headers``: by lower-case name."""

    status: int
    headers: Mapping[str, bytes]
    body: bytes


def read_answer(status: int, response: bytes, tail: Buffer) -> Answer:
    """What ``Exchange.send`` was given."""
    at = response.index(_HEAD_END)
    headers = {}
    for line in response[:at].split(b"\r\n")[1:]:
        name, _, value = line.partition(b": ")
        headers[name.decode("latin-1").lower()] = value
    return Answer(status, headers, b"".join((memoryview(response)[at + len(_HEAD_END) :], tail)))


class NoLine:
    """In place of a connection: its memory and its waits are those of all requests of this process."""

    def __init__(self, http: Http) -> None:
        self._http = http

    @property
    def budget(self) -> Budget:
        return self._http.budget

    @property
    def ends(self) -> None:
        return None

    def slots(self) -> Slots | None:
        return self._http.slots()

    def wait(self, nbytes: int, lead: int, then: Callable[[Slot], None], late: Callable[[str], None]) -> BoundedWait:
        http, slots = self._http, self._http.slots()
        assert slots is not None, "there is nothing to wait for"
        return BoundedWait(http.loop, slots, nbytes, lead, http.options.arena_wait_s, then, late)

    def begin(self, exchange: Exchange, content_type: bytes, extra: bytes) -> Stream:
        raise PenstockError(UNSUPPORTED, "an answer that goes on cannot be stored")

    def answered(self) -> None:
        raise AssertionError("the exchange takes its answer itself")


class Headless(Exchange):
    """A stored request and its one answer: ``done`` is called with it, unless it was left before."""

    __slots__ = ("_budget", "_done")

    def __init__(
        self,
        http: Http,
        method: bytes,
        url: bytes,
        headers: Mapping[str, bytes],
        body: bytes,
        done: Callable[[Answer], None],
    ) -> None:
        head = Head(method, url, dict(headers), len(body), True, False)
        super().__init__(head, body, 0)
        self._connection = NoLine(http)
        self._budget = http.budget
        self._done = done

    def send(self, status: int, response: bytes, tail: Buffer = b"", sent: Callable[[], None] | None = None) -> None:
        left = self.abandoned
        if not left:
            self.status = status
            answer = read_answer(status, response, tail)
            self._end()
        if sent is not None:
            sent()
        if not left:
            self._done(answer)

    def leave(self) -> None:
        """Nobody wants the answer any more. Does nothing once there is one."""
        gone = self.gone
        if not self.abandoned:
            self._end()
            if gone is not None:
                gone()

    def _end(self) -> None:
        self._budget.release(self)
        self._connection = self.gone = None
