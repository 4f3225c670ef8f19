"""The model repository over HTTP: Triton's index, load and unload, and new versions of models as they are sent.

What loads a model is the server: a gateway passes the order on and waits for what comes of it, or its client does no
more. What is sent as a file is written on a thread, and only where the configuration says that it may be.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

from penstock.client.orders import ORDER_WAIT_S, Orders, late
from penstock.client.publish import MODEL_FILE, PublishError, check_model, check_version, publish
from penstock.gateway.about import BINARY, REPOSITORY, STRING, About, a_list, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.aside import Aside, Work
from penstock.gateway.connection import Exchange
from penstock.gateway.jsondata import loads
from penstock.gateway.routes import Route, RouteError
from penstock.gateway.target import Handler, Target
from penstock.wire.errors import BAD_INPUT, CANCELLED, UNAVAILABLE, PenstockError
from penstock.wire.messages import LOAD, UNLOAD
from penstock.wire.models import IDLE, READY, SERVED, ModelState, place
from penstock.wire.process import fields
from penstock.wire.tensors import Buffer

log = logging.getLogger("penstock.gateway")

EXTENSIONS: Final = ("model_repository", "model_repository(unload_dependents)")
_FILES_MAX: Final = 16  # versions in one load
_WRITING_MAX: Final = 2  # at a time: each is held in memory until it is written
_WRITE_WAIT_S: Final = 30.0  # for those before it
_CHUNK: Final = 1 << 20  # bytes, or characters, between two looks whether the client is still there
_NOT_WRITTEN: Final = "the model could not be written within {}"
_NOT_LOADED: Final = "it is not in memory, and loaded when it is asked for"

_Body: TypeAlias = "Callable[[Exchange, Target, Buffer], None]"
_Bytes: TypeAlias = "Callable[[Work], Iterator[Buffer]]"  # of a file, a part after another


_INDEX: Final = About(
    "The models and their states",
    REPOSITORY,
    json(a_list(an_object({"name": STRING, "version": STRING, "state": STRING}, ("name", "version", "state")))),
    json(an_object({"ready": {"type": "boolean"}})),
    optional=True,
    errors=(400,),
)
_LOAD: Final = About(
    "Load a model, with another configuration or new files",
    REPOSITORY,
    body=json(an_object({"parameters": an_object({"config": STRING})})),
    optional=True,
    errors=(400, 503),
)
_UNLOAD: Final = About(
    "Serve a model no more",
    REPOSITORY,
    body=json(an_object({"parameters": an_object({"unload_dependents": {"type": "boolean"}})})),
    optional=True,
    errors=(400, 503),
)
_PUSH: Final = About(
    "A new version of a model: the body is the ONNX file",
    REPOSITORY,
    json(an_object({"name": STRING, "version": STRING}, ("name", "version"))),
    {BINARY: {}},
    errors=(400, 503),
)


class Repository:
    """``routes``: for the application to answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, application: Application, orders: Orders) -> None:
        self._loop = loop
        self._application = application
        self._caller = application.caller
        self._orders = orders
        self._writing = Aside(loop, _WRITING_MAX, _WRITE_WAIT_S, _NOT_WRITTEN)
        model, versions = "/v2/repository/models/{model}", "/v2/repository/models/{model}/versions"
        self.routes: list[Route[Handler]] = [
            Route("POST", "/v2/repository/index", partial(self._read, self._index), about=_INDEX),
            Route("POST", "/v2/repository/{repository}/index", partial(self._read, self._index), about=_INDEX),
            Route("POST", model + "/load", partial(self._read, self._load), about=_LOAD),
            Route("POST", model + "/unload", partial(self._read, self._unload), about=_UNLOAD),
            Route("POST", versions, self._push, about=_PUSH),
            Route("PUT", versions + "/{version}", self._push, about=_PUSH),
        ]

    def _read(self, then: _Body, exchange: Exchange, target: Target) -> None:
        if target.encoding:
            self._application.expand(exchange, target, then)
        else:
            then(exchange, target, exchange.body)

    def _index(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        request = _object(body)
        only_ready = request.get("ready", False)
        if type(only_ready) is not bool:
            raise PenstockError(BAD_INPUT, "'ready' is true or false")
        states = [state for versions in (self._caller.models or {}).values() for state in versions.values()]
        self._application.answer_json(
            exchange, [_row(state) for state in sorted(states, key=place) if state.state in SERVED or not only_ready]
        )

    # --- orders ---

    def _load(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        config, files = _read_parameters(_object(body))
        if not files:
            self._order(exchange, LOAD, target.model, config)
            return
        self._write(exchange, target, files, lambda version: self._order(exchange, LOAD, target.model, config))

    def _unload(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        parameters = _parameters(_object(body))
        # Whatever it says: no model depends on another.
        if type(parameters.get("unload_dependents", False)) is not bool:
            raise PenstockError(BAD_INPUT, "parameter 'unload_dependents' is true or false")
        self._order(exchange, UNLOAD, target.model, "")

    def _order(self, exchange: Exchange, action: str, model: str, config: str) -> None:
        """Answer when the server has followed, and not for ever."""

        def done(error: PenstockError | None) -> None:
            timer.cancel()
            exchange.gone = None
            self._application.later(exchange, answer, error)

        def answer(error: PenstockError | None) -> None:
            if error is not None:
                raise error if error.retry_after_s else PenstockError(BAD_INPUT, error.message)  # as Triton does
            self._application.count(200)
            exchange.answer(200)

        def leave() -> None:
            timer.cancel()
            self._orders.forget(serial)

        def expire() -> None:
            self._orders.forget(serial)
            exchange.gone = None
            self._application.fail(exchange, late(action, model, ORDER_WAIT_S))

        serial = self._orders.send(action, model, config, done)
        log.info("model ordered", extra=fields(model=model, action=action))
        timer = self._loop.call_later(ORDER_WAIT_S, expire)
        exchange.gone = leave

    # --- new versions ---

    def _push(self, exchange: Exchange, target: Target) -> None:
        self._check_push(target)  # before its body is expanded
        self._read(self._publish, exchange, target)

    def _publish(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        if not len(body):
            raise PenstockError(BAD_INPUT, "the body is empty; it is to be an ONNX file, as it is")
        self._write(
            exchange,
            target,
            {target.version: partial(_parts, body)},
            lambda version: self._application.answer_json(exchange, {"name": target.model, "version": version}),
        )

    def _check_push(self, target: Target) -> None:
        """Raises RouteError or PenstockError where nothing may be published."""
        if not self._application.options.model_push:
            raise RouteError(
                403,
                "models are not published over HTTP here; set model_push = true in [gateway] of the server's "
                "configuration, or run 'penstock models push' on its host",
            )
        if not self._caller.identity.local:
            raise RouteError(
                403, "this gateway is not on the host of its broker, where the models lie; ask one that is"
            )
        if not self._caller.repository:
            raise PenstockError(UNAVAILABLE, "no worker has said where its models lie yet; try again shortly", 1.0)
        if problem := check_model(target.model) or (check_version(target.version) if target.version else ""):
            raise PenstockError(BAD_INPUT, problem)

    def _write(
        self,
        exchange: Exchange,
        target: Target,
        files: Mapping[str, _Bytes],
        then: Callable[[str], None],
    ) -> None:
        """Publish versions on a thread, and then do something with the number that the last was given."""
        self._check_push(target)
        repository = Path(self._caller.repository)

        def write(work: Work) -> list[str]:
            return [publish(repository, target.model, {MODEL_FILE: of(work)}, version) for version, of in files.items()]

        def finish(done: asyncio.Future[list[str]]) -> None:
            try:
                versions = done.result()
            except PublishError as error:
                raise PenstockError(BAD_INPUT, str(error)) from None
            log.info("model published", extra=fields(model=target.model, versions=", ".join(versions)))
            then(versions[-1])

        work = self._writing.run(write, partial(self._application.later, exchange, finish))
        exchange.gone = work.leave


def _parts(body: Buffer, work: Work) -> Iterator[Buffer]:
    """The bytes of a body while its client is there: then they may be another's at once."""
    view = memoryview(body)
    for at in range(0, len(view), _CHUNK):
        yield view[at : at + _CHUNK]
        _check_wanted(work)


def _decoded(text: str, name: str, work: Work) -> Iterator[Buffer]:
    """What is in base64."""
    for at in range(0, len(text), _CHUNK):
        try:
            yield base64.b64decode(text[at : at + _CHUNK], validate=True)
        except (binascii.Error, ValueError):
            raise PenstockError(BAD_INPUT, f"parameter '{name[:200]}' is not base64") from None
        _check_wanted(work)


def _check_wanted(work: Work) -> None:
    if not work.wanted:
        raise PenstockError(CANCELLED, "the client has left")


def _read_parameters(request: dict[str, Any]) -> tuple[str, dict[str, _Bytes]]:
    """The configuration of a load, "" for the model's own, and the files that come with it by their versions."""
    parameters = _parameters(request)
    config = ""
    files: dict[str, _Bytes] = {}
    for key, value in parameters.items():
        if type(value) is not str:
            raise PenstockError(BAD_INPUT, f"parameter '{key[:200]}' is a string")
        if key == "config":
            config = value
        elif key.startswith("file:"):
            version, slash, name = key.removeprefix("file:").partition("/")
            if not slash or name != MODEL_FILE or check_version(version):
                raise PenstockError(
                    BAD_INPUT,
                    f"parameter '{key[:200]}' does not name a file of the form file:VERSION/{MODEL_FILE}; models whose "
                    "data lie in files beside them take 'penstock models push'",
                )
            files[version] = partial(_decoded, value, key)
        else:
            raise PenstockError(
                BAD_INPUT, f"parameter '{key[:200]}' is unknown; known are config and file:VERSION/{MODEL_FILE}"
            )
    if len(files) > _FILES_MAX:
        raise PenstockError(BAD_INPUT, f"a load brings at most {_FILES_MAX} files, and this one has {len(files)}")
    if config and type(loads(config.encode("utf-8", "surrogatepass"))) is not dict:
        raise PenstockError(BAD_INPUT, "parameter 'config' is not a JSON object, as text")
    return config, files


def _object(body: Buffer) -> dict[str, Any]:
    """A JSON object, of which nothing has to be there."""
    value = loads(body) if len(body) else {}
    if type(value) is not dict:
        raise PenstockError(BAD_INPUT, "the request is not a JSON object")
    return value


def _parameters(request: dict[str, Any]) -> dict[str, Any]:
    value = request.get("parameters", {})
    if type(value) is not dict:
        raise PenstockError(BAD_INPUT, "'parameters' is not a JSON object")
    return value


def _row(state: ModelState) -> dict[str, str]:
    """As Triton tells of a version, which knows no models that are only loaded when they are asked for."""
    row = {"name": state.name, "version": state.version, "state": READY if state.state == IDLE else state.state}
    reason = state.reason or (_NOT_LOADED if state.state == IDLE else "")
    return row | {"reason": reason} if reason else row
