"""Triton's shared memory extensions: that of the system (regions.py), off unless it is allowed, and that of CUDA, which
is not there, and of which only what a client says of all its regions is answered.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md has them.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any, Final

import orjson

from penstock.gateway.about import NUMBER, OBJECT, SHARED_MEMORY, STRING, About, a_list, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.aside import Aside
from penstock.gateway.connection import Exchange
from penstock.gateway.peers import Lease, find_peer
from penstock.gateway.regions import NOT_ALLOWED, Regions
from penstock.gateway.routes import Route, RouteError
from penstock.gateway.target import Handler, Target
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, PenstockError
from penstock.wire.tensors import Buffer

EXTENSION: Final = "system_shared_memory"
_LOOK_S: Final = 1.0  # between two looks whether clients of regions live
_LOOKING_MAX: Final = 2  # for processes at the other end of connections, at a time
_LOOKING_WAIT_S: Final = 5.0
_LATE: Final = "the process that registers shared memory could not be found within {}"
_SYSTEM: Final = "/v2/systemsharedmemory"
_CUDA: Final = "/v2/cudasharedmemory"
_REGION: Final = {"name": STRING, "key": STRING, "offset": NUMBER, "byte_size": NUMBER}
_STATUS: Final = About(
    "Regions of clients' shared memory",
    SHARED_MEMORY,
    json(a_list(an_object(_REGION, tuple(_REGION)))),
    errors=(400, 404),
)
_REGISTER: Final = About(
    "Name a region of shared memory, for requests to say where their tensors lie",
    SHARED_MEMORY,
    body=json(an_object({key: _REGION[key] for key in ("key", "offset", "byte_size")}, ("key", "byte_size"))),
    errors=(400, 503),
)
_UNREGISTER: Final = About("Forget one region, or all", SHARED_MEMORY, errors=(400, 503))
_CUDA_STATUS: Final = About(
    "Regions of CUDA's shared memory, of which there are none", SHARED_MEMORY, json(a_list(OBJECT)), errors=(404,)
)
_CUDA_REGISTER: Final = About(
    "Refused: CUDA's shared memory cannot be used", SHARED_MEMORY, body=json(OBJECT), errors=(400,)
)
_CUDA_UNREGISTER: Final = About("Forget one region of CUDA's shared memory, or all", SHARED_MEMORY)


class SharedMemory:
    """``routes``: for the application to answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, application: Application, regions: Regions) -> None:
        self._loop = loop
        self._application = application
        self._regions = regions
        self._looking = Aside(loop, _LOOKING_MAX, _LOOKING_WAIT_S, _LATE)
        self._timer: asyncio.TimerHandle | None = None
        self.routes: list[Route[Handler]] = [
            Route("GET", f"{_SYSTEM}/status", self._status, about=_STATUS),
            Route("GET", f"{_SYSTEM}/region/{{region}}/status", self._status, about=_STATUS),
            Route("POST", f"{_SYSTEM}/region/{{region}}/register", self._register, about=_REGISTER),
            Route("POST", f"{_SYSTEM}/region/{{region}}/unregister", self._unregister, about=_UNREGISTER),
            Route("POST", f"{_SYSTEM}/unregister", self._unregister, about=_UNREGISTER),
            Route("GET", f"{_CUDA}/status", self._cuda_status, about=_CUDA_STATUS),
            Route("GET", f"{_CUDA}/region/{{region}}/status", self._cuda_status, about=_CUDA_STATUS),
            Route("POST", f"{_CUDA}/region/{{region}}/register", self._cuda_register, about=_CUDA_REGISTER),
            Route("POST", f"{_CUDA}/region/{{region}}/unregister", self._done, about=_CUDA_UNREGISTER),
            Route("POST", f"{_CUDA}/unregister", self._done, about=_CUDA_UNREGISTER),
        ]

    def _status(self, exchange: Exchange, target: Target) -> None:
        self._application.answer_json(exchange, self._regions.status(target.region))

    def _register(self, exchange: Exchange, target: Target) -> None:
        if not self._regions.allowed:
            raise RouteError(403, NOT_ALLOWED)
        self._application.read_body(exchange, target, self._lease)

    def _lease(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        request = _read(body)
        ends = exchange.ends

        def found(done: asyncio.Future[Lease | None]) -> None:
            self._regions.register(target.region, request, done.result())
            self._watch()
            self._done(exchange, target)

        look = partial(self._application.later, exchange, found)
        exchange.gone = self._looking.run(lambda work: None if ends is None else find_peer(*ends), look).leave

    def _unregister(self, exchange: Exchange, target: Target) -> None:
        self._regions.unregister(target.region)
        self._done(exchange, target)

    def _watch(self) -> None:
        """While there are regions, see whether their clients live."""
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        with contextlib.suppress(PenstockError):  # another gateway changes them at this moment
            self._regions.sweep()
        if self._regions.any:
            self._watch()

    def _done(self, exchange: Exchange, target: Target) -> None:
        self._application.count(200)
        exchange.answer(200)

    def _cuda_status(self, exchange: Exchange, target: Target) -> None:
        if target.region:
            raise PenstockError(NOT_FOUND, f"Unable to find cuda shared memory region: '{target.region}'")
        self._application.answer_json(exchange, [])

    def _cuda_register(self, exchange: Exchange, target: Target) -> None:
        raise PenstockError(
            BAD_INPUT, "shared memory of CUDA cannot be used with this server; send tensors, or use that of the system"
        )


def _read(body: Buffer) -> dict[str, Any]:
    try:
        request: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise PenstockError(BAD_INPUT, f"the request is not JSON: {error}") from None
    if type(request) is not dict:
        raise PenstockError(BAD_INPUT, "the request is not a JSON object")
    return request
