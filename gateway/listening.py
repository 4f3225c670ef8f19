"""The socket that a gateway listens on; the launcher makes it for all of its gateways."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from penstock.wire.endpoints import EndpointError, parse_host_port

_SYSTEMD_FD: Final = 3  # the first that systemd passes, see sd_listen_fds(3)
_HEARD_S: Final = 0.2


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


def reachable_url(listener: socket.socket) -> str:
    """As processes of this host reach it: a socket that listens everywhere has no address that they could ask."""
    url = url_of(listener)
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


class Sign:
    """The file that says where this host's HTTP is. All gateways of a server write the same there. The last that has
    written takes it away with it, unless somebody else is there still: another gateway, or a launcher, which starts the
    next.
    """

    def __init__(self, path: Path, url: str) -> None:
        self._path = path
        self._url = url
        self._inode = 0

    def put_up(self) -> None:
        """Whole, or not at all. Raises OSError."""
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            new.write_text(self._url + "\n")
            self._inode = new.stat().st_ino
            new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def look(self) -> None:
        """Put it up again if it has gone, with a gateway that listens elsewhere or by who tidies up; to be called again
        and again."""
        with contextlib.suppress(OSError):  # it is tried again at the next look
            if not self._path.exists():
                self.put_up()

    def take_down(self) -> None:
        """This process listens no more."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode and not _is_heard(self._url):
                self._path.unlink()


def _is_heard(url: str) -> bool:
    """Whether anybody listens there: on this host, so it is known at once, but where too many wait already."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=_HEARD_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True
