"""What callers are told and do not read: how much of it is kept, and until when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator


class Backlog:
    """Messages for peers whose queue in ZeroMQ is full, which counts messages and not their bytes: in order, and of at
    most so many bytes for each. It is empty but for peers that are stopped, or flood."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._left: dict[bytes, int] = {}  # bytes that may still be added
        self._waiting: dict[bytes, deque[bytes]] = {}

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._waiting

    def __len__(self) -> int:
        """Peers that something waits for."""
        return len(self._waiting)

    def add(self, peer: bytes, packed: bytes) -> bool:
        """Keep a message for later. False when that is too much: then all that waits for the peer is dropped."""
        left = self._left[peer] = self._left.get(peer, self._bytes_max) - len(packed)
        if left < 0:
            self.drop(peer)
            return False
        self._waiting.setdefault(peer, deque()).append(packed)
        return True

    def drop(self, peer: bytes) -> None:
        self._left.pop(peer, None)
        self._waiting.pop(peer, None)

    def keep(self, peers: Container[bytes]) -> None:
        """Drop what waits for any others."""
        for peer in [peer for peer in self._waiting if peer not in peers]:
            self.drop(peer)

    def send(self, send: Callable[[bytes, bytes], str]) -> Iterator[bytes]:
        """Try again, see ``Socket.send``. Yields the peers that are not there any more; what waited for them is
        dropped."""
        for peer, waiting in list(self._waiting.items()):
            outcome = "sent"
            while waiting and (outcome := send(peer, waiting[0])) == "sent":
                self._left[peer] += len(waiting.popleft())
            if not waiting or outcome == "gone":
                self.drop(peer)
            if outcome == "gone":
                yield peer
