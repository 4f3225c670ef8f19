"""Which of many like events to log. Under overload a line for each would be a part of the overload. Pure."""

from __future__ import annotations

from typing import Final

_EVERY_S: Final = 1.0
_LINES_MAX: Final = 10  # of a kind, in that time
_KINDS_MAX: Final = 256


class Quiet:
    """Lets so many lines of each kind through in a second, and counts the others. Times are seconds of the caller's
    monotonic clock."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[float]] = {}  # until when these count, lines that were said, events that were not

    def note(self, kind: str, now: float, count: int = 1) -> int:
        """How many events to tell of now, those among them that were not told before: 0 for none."""
        noted = self._kinds.get(kind)
        if noted is None or now >= noted[0]:
            if len(self._kinds) >= _KINDS_MAX:
                self._kinds.clear()
            unsaid = int(noted[2]) if noted is not None else 0
            self._kinds[kind] = [now + _EVERY_S, 1, 0]
            return count + unsaid
        if noted[1] < _LINES_MAX:
            noted[1] += 1
            return count
        noted[2] += count
        return 0

    def unsaid(self, now: float) -> list[tuple[str, int]]:
        """Kinds whose time is over, and how many events of them were not told. They are forgotten."""
        over = [(kind, int(noted[2])) for kind, noted in self._kinds.items() if now >= noted[0]]
        for kind, _ in over:
            del self._kinds[kind]
        return [(kind, count) for kind, count in over if count]
