"""Which handler answers which path: a table of patterns, in which a segment in braces is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import unquote_to_bytes

H = TypeVar("H")


class RouteError(Exception):
    """No route. ``allow``: the methods that the path has, when it has any."""

    def __init__(self, status: int, sentence: str, allow: tuple[str, ...] = ()) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.allow = allow


@dataclass(frozen=True, slots=True)
class Route(Generic[H]):
    method: str
    pattern: str
    handler: H

    def match(self, segments: Sequence[str]) -> dict[str, str] | None:
        """The arguments in a path, or None when it is another."""
        wanted = self.pattern.strip("/").split("/")
        if len(wanted) != len(segments):
            return None
        arguments: dict[str, str] = {}
        for want, got in zip(wanted, segments, strict=True):
            if want.startswith("{"):
                arguments[want.strip("{}")] = got
            elif want != got:
                return None
        return arguments


class Routes(Generic[H]):
    """Finds the handler for a request; who asks remembers the answer."""

    def __init__(self, routes: Sequence[Route[H]]) -> None:
        self._routes = routes

    def find(self, method: bytes, url: bytes) -> tuple[H, dict[str, str]]:
        """The handler and the arguments in the path. Raises RouteError."""
        segments = _segments(url)
        allow: list[str] = []
        for route in self._routes:
            arguments = route.match(segments)
            if arguments is not None:
                if route.method.encode() == method:
                    return route.handler, arguments
                allow.append(route.method)
        if allow:
            raise RouteError(405, "Method Not Allowed", tuple(sorted(set(allow))))
        raise RouteError(404, "Not Found")


def _segments(url: bytes) -> list[str]:
    """The decoded segments of a URL's path. Raises RouteError for what is not UTF-8."""
    path = url.partition(b"?")[0].partition(b"#")[0]
    if path.startswith((b"http://", b"https://")):  # as a proxy is asked (RFC 9112, 3.2.2)
        path = path.split(b"/", 3)[3] if path.count(b"/") >= 3 else b""
    try:
        return [unquote_to_bytes(segment).decode() for segment in path.strip(b"/").split(b"/")]
    except UnicodeDecodeError:
        raise RouteError(400, "the path is not UTF-8 once its percent signs are decoded") from None
