"""A server that speaks the v2 protocol over HTTP, as far as one has to ask it before it is loaded: nothing here is of
Penstock alone."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from penstock.load.inputs import read_metadata, write_body, write_request
from penstock.load.job import TEXT_MAX, HttpTarget
from penstock.wire.models import TensorSpec
from penstock.wire.tensors import Array

_BINARY = "binary_tensor_data"  # among the extensions that a server names


class ServerError(Exception):
    """A server that cannot be asked, or does not do what it is asked for; the message is a sentence."""


class Place(NamedTuple):
    """Where a server is. ``shown``: host and port as in a URL; ``base``: the path before /v2."""

    host: str
    port: int
    shown: str
    base: str


def parse_url(url: str) -> Place:
    """Raises ValueError with a sentence."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http":
        raise ValueError(f"{url!r} is no http:// URL; over {parts.scheme}:// no load can be made")
    if not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
    return Place(parts.hostname, parts.port or 80, parts.netloc, quote(parts.path.rstrip("/"), safe="/%"))


class HttpServer:
    """``url``: http://HOST:PORT, and a path where /v2 is below one. ``timeout_s``: for each answer. Raises ValueError
    for what is no URL."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.place = parse_url(url)
        self.url = f"http://{self.place.shown}{self.place.base}"
        self._timeout_s = timeout_s
        self.address = ""  # numbers, of the one that has answered

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body. Raises ServerError when there is no answer."""
        connection = http.client.HTTPConnection(self.place.host, self.place.port, timeout=self._timeout_s)
        with closing(connection):
            try:
                connection.connect()
                self.address = connection.sock.getpeername()[0]
                connection.request(method, self.place.base + path, body, dict(headers or {}))
                answer = connection.getresponse()
                return answer.status, answer.read()
            except TimeoutError:
                raise ServerError(f"no answer from {self.url} within {self._timeout_s:g} s") from None
            except OSError as error:
                raise ServerError(f"no server answers at {self.url}: {error.strerror or error}") from None
            except http.client.HTTPException as error:
                raise ServerError(f"what answers at {self.url} speaks no HTTP: {error!r}") from None

    def speaks_binary(self) -> bool:
        """Whether tensors can be sent as they lie in memory. Raises ServerError."""
        status, body = self.ask("GET", "/v2")
        try:
            extensions = json.loads(body)["extensions"] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            extensions = []
        return isinstance(extensions, list) and _BINARY in extensions

    def inputs_of(self, model: str, version: str) -> list[TensorSpec]:
        """Raises ServerError, and InputsError for what cannot be understood."""
        status, body = self.ask("GET", _path(model, version))
        if status != 200:
            raise ServerError(f"{self.url} answers {status} when asked for model '{model}': {say(body)}")
        try:
            metadata = json.loads(body)
        except ValueError:
            metadata = None
        return read_metadata(model, metadata)

    def prepare(
        self,
        model: str,
        version: str,
        inputs: Mapping[str, Array],
        specs: list[TensorSpec],
        binary: bool,
        timeout_us: int = 0,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> HttpTarget:
        """A request that has been tried once. ``timeout_us``: see write_body. ``more``: headers. Raises ServerError
        when the server refuses it, and InputsError."""
        body, json_bytes = write_body(inputs, specs, binary, timeout_us)
        path = _path(model, version) + "/infer"
        headers = {"Content-Type": "application/octet-stream" if json_bytes else "application/json", **more}
        if json_bytes:
            headers["Inference-Header-Content-Length"] = str(json_bytes)
        status, answer = self.ask("POST", path, body, headers)
        if not 200 <= status < 300:
            raise ServerError(f"the server answers {status} to the request: {say(answer)}")
        request = write_request(self.place.shown, self.place.base + path, body, json_bytes, more)
        return HttpTarget(self.address, self.place.port, request)


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def say(body: bytes) -> str:
    """What is wrong, as v2 servers say it, or however else this one does."""
    text = body.decode("utf-8", "replace").strip()
    try:
        said: Any = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        said = text
    return str(said)[:TEXT_MAX] or "nothing more"
