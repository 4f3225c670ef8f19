"""What a gateway tells at ``/events``, as it comes."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import urlsplit

import msgspec

from penstock.gateway.figures import View

_SILENCE_S: Final = 5.0  # a gateway says something each second
_LINE_MAX: Final = 16 << 20  # bytes


class ListenError(Exception):
    """The gateway cannot be heard (any more), in a sentence."""


class Listener:
    """One gateway, by the URL of its HTTP side. ``views`` may be called again after it has raised. ``close``, from any
    thread, ends what is under way and all that comes later."""

    def __init__(self, url: str, silence_s: float = _SILENCE_S) -> None:
        """Raises ListenError for what is no such URL."""
        parts = urlsplit(url)
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ListenError(f"{url!r} is not of the form http://HOST:PORT")
        self.url = url.rstrip("/")
        self._parts = parts
        self._silence_s = silence_s
        self._channel: socket.socket | None = None
        self._closed = False

    def views(self) -> Iterator[View]:
        """All that is told from now on. Raises ListenError when it ends."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=self._silence_s)
        try:
            connection.connect()
            self._channel = connection.sock  # which the connection forgets once there is an answer
            if self._closed:
                raise ListenError("nobody listens any more")
            connection.request("GET", self._parts.path.rstrip("/") + "/events")
            with connection.getresponse() as response:
                kind_told = response.headers.get_content_type()
                if response.status != 200 or kind_told != "text/event-stream":
                    raise ListenError(
                        f"{self.url} answers {response.status} {response.reason} and {kind_told}; "
                        "is it a Penstock gateway?"
                    )
                yield from parse(iter(lambda: response.readline(_LINE_MAX), b""))
            raise ListenError(f"{self.url} has ended its answer")
        except TimeoutError:
            raise ListenError(f"{self.url} has said nothing for {self._silence_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ListenError(f"{self.url} cannot be reached: {error}") from None
        finally:
            self._channel = None
            connection.close()

    def close(self) -> None:
        self._closed = True
        channel = self._channel
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)


def parse(lines: Iterable[bytes]) -> Iterator[View]:
    """Server-sent events, of which each is a view. Raises ListenError for one that is none."""
    data = b""
    for line in lines:
        if line.startswith(b"data:"):
            data += line[5:]
            if len(data) > _LINE_MAX:
                raise ListenError(f"the gateway tells more than {_LINE_MAX >> 20} MB at once")
        elif not line.rstrip(b"\r\n") and data:
            try:
                yield msgspec.json.decode(data, type=View)
            except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
                raise ListenError(f"the gateway tells what is not understood here: {error}") from None
            data = b""
