"""The socket that a gateway listens on; the launcher makes it for all of its gateways."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

from penstock.wire.endpoints import EndpointError, parse_host_port

_SYSTEMD_FD: Final = 3  # the first that systemd passes, see sd_listen_fds(3)


def listen(http: str) -> socket.socket:
    """A bound socket, which listens once it is told to; or one that was inherited. Raises EndpointError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0":
        return _inherited(str(_SYSTEMD_FD))
    if http.startswith("fd://"):
        return _inherited(http.removeprefix("fd://"))
    host, port = parse_host_port(http)
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise EndpointError(
                f"cannot listen on {http}: {error.strerror}; choose another with --http HOST:PORT"
            ) from None
        undo.pop_all()
    return listener


def _inherited(number: str) -> socket.socket:
    try:
        return socket.socket(fileno=int(number))
    except (OSError, ValueError) as error:
        raise EndpointError(f"the inherited descriptor {number!r} is no socket: {error}") from None


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
