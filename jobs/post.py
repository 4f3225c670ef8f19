"""One HTTP POST to a stranger: to an address that has been checked, within a time, without believing what comes back.

Not http.client: its limits are for each read, so that who sends a byte a second holds it for ever. Proxies of the
environment are not asked, since it would be theirs to look the name up.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from penstock.jobs.address import Networks, Target, check_addresses

ADDRESSES_MAX: Final = 4  # of a name, that are tried
_READ_BYTES: Final = 16 * 1024
_WRITE_BYTES: Final = 256 * 1024
_DRAIN_S: Final = 0.5  # for what is left of an answer, so that its sender is not cut off
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: |\r|\n)")

LookUp = Callable[[str, int], Sequence[str]]


class PostFailed(Exception):
    """A sentence that says why. Nothing of the answer but its status is in it: who reads it might not be allowed to ask
    there."""


def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, in the system's order. The system's resolver has its own limits of time."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [*dict.fromkeys(str(address[0]) for _, _, _, _, address in found)]


def post(
    target: Target,
    headers: Mapping[str, str],
    body: bytes,
    *,
    allowed: Networks,
    timeout_s: float,
    answer_bytes_max: int,
    tls: ssl.SSLContext | None,
    look: LookUp = look_up,
) -> int:
    """The status of the answer. Raises PostFailed, and CallbackRefused where the host may not be called."""
    until = time.monotonic() + timeout_s

    def left() -> float:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise PostFailed(f"there was no answer within {timeout_s:g} s (callback_timeout_s)")
        return seconds

    try:
        addresses = look(target.host, target.port)
    except (OSError, UnicodeError) as error:
        raise PostFailed(f"{target.host} cannot be looked up: {_reason(error)}") from None
    check_addresses(target.host, addresses, allowed)
    try:
        with contextlib.closing(_connect(target, addresses[:ADDRESSES_MAX], left)) as plain:
            plain.settimeout(left())
            talking = plain if tls is None else tls.wrap_socket(plain, server_hostname=target.host)
            with contextlib.closing(talking):
                _send(talking, _head(target, headers, len(body)) + body, left)
                return _status(talking, answer_bytes_max, left)
    except TimeoutError:
        raise PostFailed(f"there was no answer within {timeout_s:g} s (callback_timeout_s)") from None
    except (OSError, ValueError) as error:
        raise PostFailed(f"{target.authority} cannot be asked: {_reason(error)}") from None


def _connect(target: Target, addresses: Sequence[str], left: Callable[[], float]) -> socket.socket:
    """To the first that accepts. None has more than its share of the time."""
    failed: OSError = ConnectionError("it has no address")
    for number, address in enumerate(addresses):
        try:
            return socket.create_connection((address, target.port), timeout=left() / (len(addresses) - number))
        except OSError as error:
            failed = error
    raise failed


def _head(target: Target, headers: Mapping[str, str], length: int) -> bytes:
    lines = [f"POST {target.path} HTTP/1.1", f"Host: {target.authority}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {length}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("ascii")


def _send(talking: socket.socket, data: bytes, left: Callable[[], float]) -> None:
    """In pieces: ``sendall`` over TLS begins its time again with each."""
    rest = memoryview(data)
    while rest:
        talking.settimeout(left())
        rest = rest[talking.send(rest[:_WRITE_BYTES]) :]


def _status(talking: socket.socket, bytes_max: int, left: Callable[[], float]) -> int:
    """Of the answer, after those that only say that there will be one."""
    got = b""
    taken = 0
    while True:
        end = got.find(b"\r\n\r\n")
        if end >= 0 or len(got) >= 16:
            match = _STATUS.match(got)
            if match is None:
                raise PostFailed("what answers does not speak HTTP/1.1")
            status = int(match[1])
            if status >= 200:
                _drain(talking, bytes_max - taken)
                return status
        if end >= 0:
            got = got[end + 4 :]
            continue
        if taken >= bytes_max:
            raise PostFailed(f"there was no status in {bytes_max} bytes of answer (callback_answer_bytes_max)")
        talking.settimeout(left())
        some = talking.recv(min(_READ_BYTES, bytes_max - taken))
        if not some:
            raise PostFailed("the connection ended without an answer")
        taken += len(some)
        got += some


def _drain(talking: socket.socket, bytes_max: int) -> None:
    """Its bytes are of no interest, but closing before they have come may break what the other side still does."""
    until = time.monotonic() + _DRAIN_S
    with contextlib.suppress(OSError):
        while bytes_max > 0 and (seconds := until - time.monotonic()) > 0:
            talking.settimeout(seconds)
            some = talking.recv(min(_READ_BYTES, bytes_max))
            if not some:
                return
            bytes_max -= len(some)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not to be trusted: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error)
