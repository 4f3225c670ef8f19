"""Belonging to a broker: when a peer says hello, when it beats, and when it takes the broker for gone. Pure."""

from __future__ import annotations

from typing import Final

BEAT_S: Final = 1.0  # how often a peer says that it lives, if it is awake
QUIET_BEAT_S: Final = 2.0  # how often it wakes for that alone: an idle server should sleep
SILENCE_MAX_S: Final = 5.0  # after which a broker is taken for gone
HELLO_AGAIN_S: Final = 0.1  # between two hellos that nobody has answered; doubled up to
HELLO_AGAIN_MAX_S: Final = 1.0  # they may all be under way, to a host that is cut off
# On one host a control connection says when there is a broker to greet. Without one for so long, a peer that may not
# connect there (another user's) says hello all the same.
_PATIENCE_S: Final = 1.0


class Membership:
    """One peer's standing with the broker. Times are seconds of the caller's monotonic clock.

    ``epoch``: the life of the broker that has welcomed this peer; 0 while none has. ``local``: there is a control
    connection to wait for.
    """

    def __init__(self, local: bool) -> None:
        self.epoch = 0
        self._patience_s = _PATIENCE_S if local else 0.0
        self._hello_at: float | None = None  # None: the patience begins when next asked
        self._again_s = HELLO_AGAIN_S
        self._beat_at = 0.0  # a beat is due if this peer is awake
        self._wake_at = 0.0  # it wakes for the beat alone
        self._heard = 0.0

    @property
    def joined(self) -> bool:
        return self.epoch != 0

    def welcomed(self, epoch: int, now: float) -> None:
        self.epoch = epoch
        self._heard = now
        self._beat_at = self._wake_at = now

    def heard(self, now: float) -> None:
        self._heard = now

    def found(self) -> None:
        """There is a broker to say hello to, if none has welcomed this peer yet."""
        if not self.joined:
            self._hello_at = 0.0
            self._again_s = HELLO_AGAIN_S

    def lost(self) -> None:
        """The broker has gone."""
        self.epoch = 0
        self._hello_at = None
        self._again_s = HELLO_AGAIN_S

    def unknown(self) -> None:
        """The broker does not know this peer (any more): say hello at once. One that is under way already will do."""
        if self.joined:
            self.epoch = 0
            self._hello_at = 0.0
            self._again_s = HELLO_AGAIN_S

    def say(self, now: float) -> str:
        """What is due: "hello", "beat", "lost" (the broker has been silent too long) or ""."""
        if not self.joined:
            if self._hello_at is None:
                self._hello_at = now + self._patience_s
            if now < self._hello_at:
                return ""
            self._hello_at = now + self._again_s
            self._again_s = min(2 * self._again_s, HELLO_AGAIN_MAX_S)
            return "hello"
        if now - self._heard > SILENCE_MAX_S:
            self.lost()
            return "lost"
        if now < self._beat_at:
            return ""
        self._beat_at = now + BEAT_S
        self._wake_at = now + QUIET_BEAT_S
        return "beat"

    def due(self) -> float:
        """When ``say`` should be asked next."""
        return self._wake_at if self.joined else self._hello_at or 0.0
