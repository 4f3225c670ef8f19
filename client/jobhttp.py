"""HTTP as the client library needs it for jobs: some connections that are kept, each used by one thread at a time."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from penstock.wire.endpoints import RuntimeDir
from penstock.wire.errors import (
    BAD_INPUT,
    CANCELLED,
    DEADLINE,
    INTERNAL,
    NOT_FOUND,
    OVERLOADED,
    TOO_LARGE,
    UNAVAILABLE,
    UNSUPPORTED,
    PenstockError,
)

if TYPE_CHECKING:
    from http.client import HTTPConnection

_IDLE_MAX: Final = 8  # connections that are kept
_IDLE_S: Final = 30.0  # for so long: a gateway closes them after keep_alive_s
_URL_MAX_BYTES: Final = 4096  # of the file that says where HTTP is
_CODES: Final = {
    400: BAD_INPUT,
    404: NOT_FOUND,
    405: UNSUPPORTED,
    410: NOT_FOUND,
    413: TOO_LARGE,
    499: CANCELLED,
    501: UNSUPPORTED,
    503: OVERLOADED,
    504: DEADLINE,
}


class Response(NamedTuple):
    """``headers``: by lower-case name."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Raises PenstockError for what is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise PenstockError(INTERNAL, f"the server's answer ({self.status}) is no JSON") from None

    def error(self, otherwise: str = INTERNAL) -> PenstockError:
        """What it says, where it is an error. ``otherwise``: the code where the status has none."""
        try:
            said = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            said = f"the server answered with status {self.status}"
        after = self.headers.get("retry-after", "")
        retry_after_s = float(after) if after.isdecimal() else 0.0
        return PenstockError(_CODES.get(self.status, otherwise), str(said), retry_after_s)


class Unreached(PenstockError):
    """Nobody answered; what was asked may have been heard all the same, unless ``unheard``."""

    def __init__(self, sentence: str, unheard: bool = False) -> None:
        super().__init__(UNAVAILABLE, sentence, 1.0)
        self.unheard = unheard


def where_from(http_url: str, runtime: RuntimeDir | None) -> Callable[[], str]:
    """What tells where HTTP is: the URL that was given, or what a gateway on this host has written down. Raises
    PenstockError for what is no URL."""
    if http_url:
        _split(http_url)
        return lambda: http_url
    return lambda: _written(runtime)


def _written(runtime: RuntimeDir | None) -> str:
    if runtime is None:
        raise PenstockError(
            BAD_INPUT, 'jobs are asked for over HTTP: say where it is, such as Client(http="http://host:8000")'
        )
    try:
        with open(runtime.http) as file:
            return file.read(_URL_MAX_BYTES).strip()
    except OSError as error:
        raise Unreached(
            f"no gateway listens at {runtime.path} ({error.strerror}); is 'penstock up' running there? Else say where "
            'HTTP is, such as Client(http="http://host:8000")',
            unheard=True,
        ) from None


class _Place(NamedTuple):
    encrypted: bool
    host: str
    port: int
    path: str  # before that of a request


def _split(url: str) -> _Place:
    """Raises PenstockError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PenstockError(BAD_INPUT, f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PenstockError(BAD_INPUT, f"{url!r} is not of the form http://HOST:PORT")
    encrypted = parts.scheme == "https"
    return _Place(encrypted, parts.hostname, port or (443 if encrypted else 80), parts.path.rstrip("/"))


class _Kept(NamedTuple):
    connection: HTTPConnection
    place: _Place
    since: float


class Channel:
    """Asks a gateway. Safe to share between threads."""

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._idle: list[_Kept] = []
        self._closed = False

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        limit_s: float,
        started: Callable[[HTTPConnection], None] = lambda connection: None,
    ) -> Response:
        """``limit_s``: for each part of it to come. ``started``: is given the connection that is used, so that another
        thread may break it, or raises OSError not to ask. Raises PenstockError; Unreached when nobody answers."""
        place = _split(self._where())
        kept = self._take(place)
        # A gateway may close a connection that is idle just as it is used again. What changes nothing is asked again.
        again = kept is not None and method != "POST"
        connection = self._connection(place, limit_s) if kept is None else kept
        try:
            return self._ask(connection, place, method, path, body, headers, limit_s, started)
        except Unreached:
            if not again:
                raise
        return self._ask(self._connection(place, limit_s), place, method, path, body, headers, limit_s, started)

    def _ask(
        self,
        connection: HTTPConnection,
        place: _Place,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        limit_s: float,
        started: Callable[[HTTPConnection], None],
    ) -> Response:
        from http.client import HTTPException

        unheard = connection.sock is None
        try:
            connection.timeout = limit_s if limit_s < math.inf else None
            if connection.sock is None:
                connection.connect()
            else:
                connection.sock.settimeout(connection.timeout)
            unheard = False
            started(connection)
            connection.request(method, place.path + path, body, dict(headers or {}))
            answer = connection.getresponse()
            found = Response(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        except (OSError, HTTPException) as error:
            connection.close()
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            url = f"{place.host}:{place.port}"
            raise Unreached(f"HTTP at {url} did not answer ({said}); is the server there?", unheard) from None
        except BaseException:  # such as KeyboardInterrupt: nobody knows what comes next on it
            connection.close()
            raise
        if answer.will_close:
            connection.close()
        else:
            self._keep(_Kept(connection, place, time.monotonic()))
        return found

    def _connection(self, place: _Place, limit_s: float) -> HTTPConnection:
        from http.client import HTTPConnection, HTTPSConnection  # which takes 30 ms, and most clients have no jobs

        kind = HTTPSConnection if place.encrypted else HTTPConnection
        return kind(place.host, place.port, timeout=limit_s)

    def _take(self, place: _Place) -> HTTPConnection | None:
        now, old = time.monotonic(), []
        found = None
        with self._lock:
            if self._closed:
                raise PenstockError(CANCELLED, "this Client is closed")
            while self._idle and found is None:
                kept = self._idle.pop()
                if kept.place == place and now - kept.since < _IDLE_S:
                    found = kept.connection
                else:
                    old.append(kept)
        for kept in old:
            kept.connection.close()
        return found

    def _keep(self, kept: _Kept) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_MAX:
                self._idle.append(kept)
                return
        kept.connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for kept in idle:
            kept.connection.close()
