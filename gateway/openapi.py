"""What this server answers, as an OpenAPI 3.1 document and as a page: ``/openapi.json`` and ``/docs``.

The document is made from the table of routes, each of which says what it is (``about.py``), and from the models that
are served: a route for any model, and beside it one for each version with what that takes and gives; the version that
is current is there without its number. It is made when it is asked for, and again when the models have changed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import orjson

from penstock.gateway.about import (
    BINARY,
    JOB,
    JSON,
    OBJECT,
    SERVER,
    STRING,
    TAGS,
    About,
    Content,
    Schema,
    an_object,
    json,
)
from penstock.gateway.application import Application
from penstock.gateway.aside import Aside, Work
from penstock.gateway.connection import Exchange
from penstock.gateway.page import load_page
from penstock.gateway.routes import Route
from penstock.gateway.target import Handler, Target
from penstock.wire.models import SERVED, ModelSpec, ModelState

VERSIONS_MAX: Final = 100  # of models that have paths of their own; some 50 ms of a thread, and 500 KB
_LATER: Final = "Not yet: a job."
_MAKE_WAIT_S: Final = 10.0  # for those before
_NOT_MADE: Final = "the document could not be made within {}"
_SENTENCE: Final[Schema] = {"type": "string", "description": "what is wrong, and the way out"}
_ERRORS: Final = {
    400: "The request is wrong; the error names the field, what was expected and what came.",
    404: "There is no such thing.",
    410: "There was one, and it has been forgotten.",
    413: "It is larger than a limit allows.",
    500: "The model failed on this input, or the server did.",
    501: "This is not done here.",
    503: "Not now; Retry-After says when to ask again.",
    504: "The time of the request was up.",
}
_TERMS: Final[dict[str, tuple[Schema, str]]] = {
    "Penstock-Timeout": ({"type": "string", "pattern": r"^[1-9][0-9]{0,3}$"}, "seconds that it may take"),
    "Penstock-Priority": ({"type": "integer", "minimum": 1, "maximum": 5}, "1 is the most urgent"),
    "Penstock-Tenant": ({"type": "string", "pattern": "^[a-z0-9]{1,64}$"}, "for whom it is"),
    "Penstock-Explain": ({"enum": ["0", "1"]}, "1: the answer says where its time went"),
    "Prefer": ({"enum": ["respond-async"]}, "respond-async: the answer is a job, where such are kept"),
    "X-Request-Id": ({"type": "string", "pattern": "^[A-Za-z0-9]{1,128}$"}, "comes back with the answer"),
}
_LENGTH: Final = "Inference-Header-Content-Length"
_LENGTH_TEXT: Final = "bytes of JSON, where binary tensors lie behind it"
_HEADERS: Final[dict[str, tuple[Schema, str]]] = _TERMS | {_LENGTH: ({"type": "integer", "minimum": 0}, _LENGTH_TEXT)}
_REFERENCES: Final = {name: {"$ref": f"#/components/parameters/{name}"} for name in _HEADERS}


_COMPONENTS: Final = {
    "responses": {
        str(status): {"description": text, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for status, text in (_ERRORS | {"default": "Anything else that cannot be answered."}).items()
    },
    "parameters": {
        name: {"name": name, "in": "header", "schema": schema, "description": text}
        for name, (schema, text) in _HEADERS.items()
    },
}


def document(
    routes: Sequence[Route[Any]], states: Sequence[ModelState], version: str, current: Mapping[str, str]
) -> dict[str, Any]:
    """``states``: of the models' versions, ``current``: of each model the version that is asked for by its name
    alone."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Schema] = {"Error": an_object({"error": _SENTENCE}, ("error",))}
    served = sorted(
        (state.spec for state in states if state.spec is not None and state.state in SERVED),
        key=lambda spec: (spec.name, spec.version),
    )
    examples = {"model": served[0].name, "version": served[0].version} if served else {}
    for route in routes:
        if route.about is not None:
            operation = _operation(route, route.about, examples=examples)
            paths.setdefault(route.pattern, {})[route.method.lower()] = operation
    for number, spec in enumerate(served[:VERSIONS_MAX]):
        made: dict[object, tuple[Content, Content]] = {}  # of this version, in each protocol
        for route in routes:
            arguments = _arguments(route)
            if route.about is None or route.about.of_model is None or "/labels/" in route.pattern:
                continue
            if ("version" in arguments) == (current.get(spec.name) == spec.version):
                continue
            if route.about.of_model not in made:
                made[route.about.of_model] = _refer(schemas, f"{number}.{len(made)}", route.about.of_model(spec))
            pattern, operation = _of_model(route, route.about, spec, *made[route.about.of_model])
            paths.setdefault(pattern, {})[route.method.lower()] = operation
    about = "Errors are JSON objects with one sentence. Names in paths are percent-encoded."
    if len(served) > VERSIONS_MAX:
        about += f" Of {len(served)} versions of models the first {VERSIONS_MAX} have paths of their own."
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version, "description": about},
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in TAGS],
        "paths": paths,
        "components": {"schemas": schemas, **_COMPONENTS},
    }


def _arguments(route: Route[Any]) -> list[str]:
    return re.findall(r"\{(\w+)\}", route.pattern)


def _refer(schemas: dict[str, Schema], name: str, contents: tuple[Content, Content]) -> tuple[Content, Content]:
    """The contents with references to what is put among the schemas, since several paths have them."""
    found: list[Content] = []
    for which, content in zip(("request", "answer"), contents, strict=True):
        own = dict(content)
        if JSON in own:
            schemas[f"{name}.{which}"] = own[JSON]
            own[JSON] = {"$ref": f"#/components/schemas/{name}.{which}"}
        found.append(own)
    return found[0], found[1]


def _of_model(
    route: Route[Any], about: About, spec: ModelSpec, body: Content, answer: Content
) -> tuple[str, dict[str, Any]]:
    """The path of a route for a version of a model, and what it is."""
    arguments, pattern = _arguments(route), route.pattern
    for name, value in (("model", spec.name), ("version", spec.version)):
        pattern = pattern.replace(f"{{{name}}}", quote(value, safe=""))
    which = f"{spec.name} {spec.version}" if "version" in arguments else spec.name
    operation = _operation(route, about, body, answer)
    return pattern, operation | {
        "operationId": f"{route.method.lower()} {pattern}",
        "summary": f"{about.summary}: {which}",
        "x-model": spec.name,
    }


def _operation(
    route: Route[Any],
    about: About,
    body: Content | None = None,
    answer: Content | None = None,
    examples: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``body``, ``answer``: for one model, whose path has no arguments. ``examples``: of these."""
    parameters: list[dict[str, Any]] = []
    if answer is None:
        parameters = [_path_parameter(name, (examples or {}).get(name, "")) for name in _arguments(route)]
        body, answer = about.body, about.answer
    if about.inference:
        parameters += [_REFERENCES[name] for name in _TERMS]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in about.query.items()]
    if body and BINARY in body and JSON in about.answer:
        parameters.append(_REFERENCES[_LENGTH])
    later = json(JOB) if about.inference else about.later
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()} {route.pattern}",
        "summary": about.summary,
        "tags": [about.tag],
        "responses": {
            "200": {"description": "Done."} | ({"content": _content(answer)} if answer else {}),
            **({"202": {"description": _LATER, "content": _content(later)}} if later else {}),
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in (*about.errors, "default")},
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": not about.optional, "content": _content(body)}
    return operation


def _content(content: Content) -> dict[str, Any]:
    return {kind: {"schema": schema} for kind, schema in content.items()}


def _path_parameter(name: str, example: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema} | ({"example": example} if example else {})


class OpenApi:
    """``routes``: for the application to answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, application: Application) -> None:
        self._application = application
        self._caller = application.caller
        self._page = load_page("docs.html")
        self._making = Aside(loop, 1, _MAKE_WAIT_S, _NOT_MADE)  # others run meanwhile, as with any Python on a thread
        self._made = -1, b""  # how often the models had changed by then, and the document
        itself, page = About("This document", SERVER, json(OBJECT)), {"text/html": STRING}
        self.routes: list[Route[Handler]] = [
            Route("GET", "/openapi.json", self._document, about=itself),
            Route("GET", "/docs", self._docs, about=About("It as a page, which sends requests", SERVER, page)),
        ]

    def _document(self, exchange: Exchange, target: Target) -> None:
        if self._made[0] == self._caller.told:
            self._answer(exchange, self._made[1])
            return
        told = self._caller.told
        states = [state for versions in (self._caller.models or {}).values() for state in versions.values()]
        routes, current = self._application.table, self._current({each.name for each in states})

        def make(work: Work) -> bytes:
            if self._made[0] != told:  # else whoever was before in the line has made it
                self._made = told, orjson.dumps(document(routes, states, self._application.version, current))
            return self._made[1]

        def made(done: asyncio.Future[bytes]) -> None:
            self._answer(exchange, done.result())

        exchange.gone = self._making.run(make, partial(self._application.later, exchange, made)).leave

    def _answer(self, exchange: Exchange, text: bytes) -> None:
        self._application.count(200)
        exchange.answer(200, text, extra=b"Cache-Control: no-cache\r\n")

    def _current(self, names: Iterable[str]) -> dict[str, str]:
        states = {name: self._caller.state(name) for name in names}
        return {name: state.version for name, state in states.items() if state is not None}

    def _docs(self, exchange: Exchange, target: Target) -> None:
        self._application.count(200)
        exchange.answer(200, self._page.body, b"text/html; charset=utf-8", self._page.headers)
