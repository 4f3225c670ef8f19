"""Whom a callback may be sent to: public addresses, and those that the configuration allows.

A callback's URL comes from a client, and the runner that sends it may stand where the client does not: what it could
ask there is refused. A name is looked up by who sends, who checks all its addresses and connects to one of these.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

URL_CHARACTERS_MAX: Final = 2048
_PORTS: Final = {"http": 80, "https": 443}
_PRINTABLE: Final = re.compile(r"[!-\[\]-~]+")  # ASCII, no blank, no backslash
_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Networks = tuple[Network, ...]

# Of what Python calls global, these are not: protocol assignments, and the relays of 6to4, which are gone.
_NOT_PUBLIC_4: Final = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4")))
_LOOPBACK: Final = ipaddress.IPv4Address("127.0.0.1")
_PUBLIC_6: Final = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
# IPv6 addresses that mean one of IPv4, and at which bit from the right that one begins.
_EMBEDDED: Final = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)


class CallbackRefused(ValueError):
    """A URL that will not be called; the message is a sentence for who gave it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL says, checked. ``host`` is a name or an address, without brackets; ``path`` has the query."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """As it stands in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.secure else "http"] else f"{host}:{self.port}"


def read_networks(texts: Iterable[str]) -> Networks:
    """``[jobs] callback_allow``. Raises ValueError, a sentence."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ValueError(
                f'[jobs] callback_allow has "{text}", which is no network such as "10.0.0.0/8": {error}'
            ) from None
    return tuple(found)


def read_target(url: str, allowed: Networks) -> Target:
    """Raises CallbackRefused, also for a host that is an address and may not be called."""
    if len(url) > URL_CHARACTERS_MAX:
        raise CallbackRefused(f"callback_url has {len(url)} characters, and may have {URL_CHARACTERS_MAX}")
    if not _PRINTABLE.fullmatch(url):
        raise CallbackRefused("callback_url has characters that have to be percent-encoded (a host: in punycode)")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise CallbackRefused(f"callback_url is no URL: {error}") from None
    if parts.scheme not in _PORTS:
        raise CallbackRefused("callback_url begins neither with http:// nor with https://")
    if "@" in parts.netloc:
        raise CallbackRefused("callback_url has a user or a password, which would be kept and shown; leave them out")
    literal = _literal(host, "[" in parts.netloc)
    if literal is None and not _NAME.fullmatch(host):
        raise CallbackRefused("callback_url has no host that can be looked up")
    if port == 0:
        raise CallbackRefused("callback_url has port 0")
    meant = _LOOPBACK if f".{host.removesuffix('.')}".endswith(".localhost") else literal  # RFC 6761
    if meant is not None and not may_be_called(meant, allowed):
        raise CallbackRefused(_not_public(str(meant)))
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(secure, str(literal or host), port or _PORTS[parts.scheme], path)


def check_addresses(host: str, addresses: Iterable[str], allowed: Networks) -> None:
    """Of a name that has been looked up: one that may not be called is enough. Raises CallbackRefused."""
    for address in addresses:
        if not may_be_called(ipaddress.ip_address(address), allowed):
            raise CallbackRefused(_not_public(address, host))


def may_be_called(address: Address, allowed: Networks) -> bool:
    meant = _meant(address)
    if any(each in network for network in allowed for each in (address, meant) if each.version == network.version):
        return True
    if isinstance(meant, ipaddress.IPv4Address):
        return meant.is_global and not any(meant in network for network in _NOT_PUBLIC_4)
    public = meant in _PUBLIC_6 and not any(meant in network for network in _NOT_PUBLIC_6)
    return public and meant.scope_id is None


def _meant(address: Address) -> Address:
    """The IPv4 address that an IPv6 address leads to, where it does."""
    if isinstance(address, ipaddress.IPv6Address):
        for network, bit in _EMBEDDED:
            if address in network:
                return ipaddress.IPv4Address(int(address) >> bit & 0xFFFFFFFF)
    return address


def _literal(host: str, bracketed: bool) -> Address | None:
    """Also in the notations that only resolvers know, such as 0x7f.1."""
    try:
        if bracketed:
            return ipaddress.IPv6Address(host)
        return ipaddress.IPv4Address(socket.inet_aton(host.removesuffix(".")))
    except ValueError:
        raise CallbackRefused("callback_url has something in brackets that is no address") from None
    except OSError:
        return None


def _not_public(address: str, host: str = "") -> str:
    of = f"{host} has the address" if host else "callback_url names"
    return (
        f"{of} {address}, which is not public; the server's configuration may allow its network ([jobs] callback_allow)"
    )
