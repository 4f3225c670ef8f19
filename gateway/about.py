"""What a route is, as plain data, for those who read it: ``openapi.py`` makes a document of it.

Schemas are those of JSON Schema 2020-12, which OpenAPI 3.1 takes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from penstock.wire.models import ModelSpec

Schema: TypeAlias = Mapping[str, Any]
Content: TypeAlias = Mapping[str, Schema]  # by media type

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"

# Tags, in the order in which they are shown.
SERVER: Final = "Server"
MODELS: Final = "Models"
INFERENCE: Final = "Inference"
PLAIN: Final = "Plain JSON"
TENSORFLOW: Final = "TensorFlow Serving"
REPOSITORY: Final = "Repository"
SHARED_MEMORY: Final = "Shared memory"
JOBS: Final = "Jobs"
TAGS: Final = (SERVER, MODELS, INFERENCE, PLAIN, TENSORFLOW, JOBS, REPOSITORY, SHARED_MEMORY)

INFERENCE_ERRORS: Final = (400, 404, 413, 500, 501, 503, 504)


@dataclass(frozen=True, slots=True)
class About:
    """``answer``: what 200 holds, nothing where it is empty. ``body``: what a request may hold; None: nothing.
    ``optional``: it may be left out. ``errors``: the statuses that are worth naming; any other may come too.
    ``query``: what may stand in the URL's query. ``later``: what 202 holds, where that may come.
    ``inference``: it takes the headers of inference requests, and ``of_model`` says what a request and an answer hold
    for one version of a model."""

    summary: str
    tag: str
    answer: Content = field(default_factory=dict)
    body: Content | None = None
    optional: bool = False
    errors: tuple[int, ...] = ()
    inference: bool = False
    of_model: Callable[[ModelSpec], tuple[Content, Content]] | None = None
    query: Mapping[str, Schema] = field(default_factory=dict)
    later: Content = field(default_factory=dict)


def an_object(properties: Mapping[str, Schema], required: Sequence[str] = (), **more: Any) -> Schema:
    """An object with these among its properties."""
    return {"type": "object", "properties": dict(properties), "required": list(required), **more}


def a_list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


STRING: Final[Schema] = {"type": "string"}
NUMBER: Final[Schema] = {"type": "integer", "minimum": 0}
ANYTHING: Final[Schema] = {}
OBJECT: Final[Schema] = {"type": "object"}
STRINGS: Final = a_list(STRING)
TENSOR: Final = an_object(
    {"name": STRING, "datatype": STRING, "shape": a_list({"type": "integer", "minimum": -1})},
    ("name", "datatype", "shape"),
)


JOB: Final = an_object({"id": STRING, "status": STRING}, ("id", "status"))


def json(schema: Schema) -> Content:
    return {JSON: schema}
