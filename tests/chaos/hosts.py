"""Hosts made of network namespaces, joined by a cable that can be cut, and tunnels over it (``ssh -L``, in little)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Final

CONNECT_S: Final = 1.0  # over a cable that is cut nobody is reached: whoever asks is told so then
_LIBC: Final = ctypes.CDLL(None, use_errno=True)  # setns(2), which Python has since 3.12
_CLONE_NEWNET: Final = 0x40000000


class NotAllowed(Exception):
    """There can be no such hosts here; the message says why."""


def ip(*arguments: str) -> None:
    """Raises NotAllowed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise NotAllowed(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    def __init__(self, name: str, address: str) -> None:
        """Of a namespace that is there."""
        self.name = name
        self.address = address
        self._own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._there = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets, threads and processes that this thread makes meanwhile are there for good."""
        _enter(self._there)
        try:
            yield
        finally:
            _enter(self._own)

    def listen(self, address: str, port: int) -> socket.socket:
        with self.inside():
            return socket.create_server((address, port))

    def close(self) -> None:
        os.close(self._own)
        os.close(self._there)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise NotAllowed(f"setns: {os.strerror(ctypes.get_errno())}")


def _retry_often(host: Host) -> None:
    """Linux asks ever less often whether a cable is there again: after six seconds in vain, in another six. Where it
    can be told otherwise (6.15), the tests are faster."""
    with host.inside(), contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv4/tcp_rto_max_ms").write_text("1000")


class Hosts:
    """Two of them at a switch, for the time of a ``with``. Nobody else sees their ports and addresses. Entering raises
    NotAllowed."""

    def __enter__(self) -> Hosts:
        run = f"penstock-{os.getpid()}-{secrets.token_hex(3)}"
        self._switch = f"{run}-switch"
        with contextlib.ExitStack() as stack:
            _add(self._switch, stack)
            ip("-n", self._switch, "link", "add", "name", "switch", "type", "bridge")
            ip("-n", self._switch, "link", "set", "dev", "switch", "up")
            self.a, self.b = [
                self._plug_in(f"{run}-{port}", port, address, stack)
                for port, address in (("a", "192.0.2.1"), ("b", "192.0.2.2"))
            ]
            self._stack = stack.pop_all()
        return self

    def _plug_in(self, name: str, port: str, address: str, stack: contextlib.ExitStack) -> Host:
        _add(name, stack)
        host = Host(name, address)
        stack.callback(host.close)
        _retry_often(host)
        # Both ends are made where they stay: so no name of them can meet one that the machine has.
        ip("-n", self._switch, "link", "add", "name", port, "type", "veth", "peer", "name", "cable", "netns", name)
        ip("-n", self._switch, "link", "set", "dev", port, "master", "switch", "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        for link in ("lo", "cable"):
            ip("-n", name, "link", "set", "dev", link, "up")
        return host

    def __exit__(self, *error: object) -> None:
        self._stack.close()  # the links go with them

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told: host B's own link stays up."""
        ip("-n", self._switch, "link", "set", "dev", "b", "nomaster")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", "dev", "b", "master", "switch")


def _add(name: str, stack: contextlib.ExitStack) -> None:
    ip("netns", "add", name)
    stack.callback(ip, "netns", "del", name)


class Tunnels:
    """Forward ports of one host's loopback to the same ports of the other's, for the time of a ``with``.

    ``patience_ms``: how long the other end may say nothing before a connection is given up, each end by itself, as ssh
    does with ServerAliveInterval; 0: as long as the kernel likes, for minutes, so that what was sent before a cut, and
    while it lasted, arrives after it.
    """

    def __init__(self, patience_ms: int) -> None:
        self._patience_ms = patience_ms
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunnels")
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Tunnels:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def forward(self, here: Host, there: Host, port: int) -> None:
        """Who connects to the port here is connected to it there."""
        near, far = here.listen("127.0.0.1", port), there.listen(there.address, port)
        for listener, host, address in ((near, here, there.address), (far, there, "127.0.0.1")):
            listener.setblocking(False)
            self._loop.call_soon_threadsafe(self._begin, self._serve(listener, host, (address, port)))

    # --- on the thread ---

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, listener: socket.socket, host: Host, to: tuple[str, int]) -> None:
        with listener:
            while True:
                came, _ = await self._loop.sock_accept(listener)
                self._begin(self._join(came, host, to))

    async def _join(self, came: socket.socket, host: Host, to: tuple[str, int]) -> None:
        with host.inside():
            made = socket.socket()
        with came, made, contextlib.suppress(OSError, TimeoutError):
            for each in (came, made):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._patience_ms:
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._patience_ms)
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            async with asyncio.timeout(CONNECT_S):
                await self._loop.sock_connect(made, to)
            # Whoever closes one closes both; what is left in either direction then is for nobody.
            there, back = (asyncio.ensure_future(self._pump(*each)) for each in ((came, made), (made, came)))
            try:
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        while data := await self._loop.sock_recv(source, 1 << 16):
            await self._loop.sock_sendall(target, data)
