"""Which handler answers which path: a table of patterns, in which a segment that begins with a word in braces is an
argument, up to what comes behind them (``{model}:predict``). The first pattern that a path has is its own, and no later
one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import unquote_to_bytes

from penstock.gateway.about import About

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
    """``any_case``: all of the pattern but its arguments in capitals or not. ``about``: what it is, for its readers."""

    method: str
    pattern: str
    handler: H
    any_case: bool = False
    about: About | None = None

    def match(self, segments: Sequence[str]) -> dict[str, str] | None:
        """The arguments in a path, or None when it is another."""
        wanted = self.pattern.strip("/").split("/")
        if len(wanted) != len(segments):
            return None
        arguments: dict[str, str] = {}
        for want, got in zip(wanted, segments, strict=True):
            name, end = "", want
            if want.startswith("{"):
                name, _, end = want[1:].partition("}")
            cut = len(got) - len(end) if name else 0
            tail = got[cut:] if cut >= 0 else ""
            if end != (tail.lower() if self.any_case else tail):
                return None
            if name:
                arguments[name] = got[:cut]
        return arguments


class Routes(Generic[H]):
    """Finds the handler for a request; who asks remembers the answer."""

    def __init__(self, routes: Sequence[Route[H]]) -> None:
        self._routes: list[Route[H]] = []
        self.add(routes)

    def add(self, routes: Sequence[Route[H]]) -> None:
        """What a path says itself goes before arguments: /v2/models/stats is no model's."""
        self._routes = sorted([*self._routes, *routes], key=lambda route: route.pattern.count("{"))

    @property
    def table(self) -> tuple[Route[H], ...]:
        """All of them."""
        return tuple(self._routes)

    def find(self, method: bytes, url: bytes) -> tuple[H, dict[str, str]]:
        """The handler and the arguments in the path: for HEAD those of GET. Raises RouteError."""
        wanted = "GET" if method == b"HEAD" else method.decode("latin-1")
        segments = _segments(url)
        found = self._of(segments)
        for route, arguments in found:
            if route.method == wanted:
                return route.handler, arguments
        raise RouteError(405, "Method Not Allowed", _all({route.method for route, _ in found}))

    def allowed(self, url: bytes) -> tuple[str, ...]:
        """The methods that a path has. Raises RouteError where there is no such path."""
        return _all({route.method for route, _ in self._of(_segments(url))})

    def _of(self, segments: Sequence[str]) -> list[tuple[Route[H], dict[str, str]]]:
        """The routes of a path, with its arguments: of the pattern that it matches first."""
        own = ""
        found = []
        for route in self._routes:
            arguments = route.match(segments) if own in ("", route.pattern) else None
            if arguments is not None:
                own = route.pattern
                found.append((route, arguments))
        return found

    def methods(self) -> tuple[str, ...]:
        """Those that any path has."""
        return _all({route.method for route in self._routes})


def _all(methods: set[str]) -> tuple[str, ...]:
    """With those that come by themselves. Raises RouteError where there are none."""
    if not methods:
        raise RouteError(404, "Not Found")
    return tuple(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def _segments(url: bytes) -> list[str]:
    """The decoded segments of a URL's path. Raises RouteError for what is not UTF-8."""
    path = url.partition(b"?")[0].partition(b"#")[0]
    if path.startswith((b"http://", b"https://")):  # as a proxy is asked (RFC 9112, 3.2.2)
        path = path.split(b"/", 3)[3] if path.count(b"/") >= 3 else b""
    try:
        return [unquote_to_bytes(segment).decode() for segment in path.strip(b"/").split(b"/")]
    except UnicodeDecodeError:
        raise RouteError(400, "the path is not UTF-8 once its percent signs are decoded") from None
