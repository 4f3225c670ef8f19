"""Whose turn it is among those who wait for one model: priorities, tenants within them, callers within these.

Within a priority tenants share by compute time, in proportion to their weights: start-time fair queueing (Goyal, Vin
and Cheng, 1996), with a tenant's virtual time in microseconds of compute over its weight. What is charged when requests
are given out is what they are expected to take; what they took is corrected when they are done.

What was given to a worker and has not begun can be overtaken: by a tenant that is behind what has been given, and by
what is more urgent.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

from penstock.wire.fifo import Fifo

if TYPE_CHECKING:
    from penstock.broker.lots import Lot

ShareKey: TypeAlias = str | bytes  # a tenant, or the caller that names none

# A priority that waits gets this part of the rows that more urgent ones are given: it is late, and never starved.
LEAST_SHARE: Final = 1 / 16
_OWED_MAX_ROWS: Final = 4096.0
_IDLE_SHARES_MAX: Final = (
    1024  # tenants that wait for nothing and are remembered, because they are ahead of their share
)


class Taking:
    """What is taken from a queue for one worker, and what limits it.

    ``room``: rows; ``hears``: callers that the worker may be given, but for those in ``full``; ``horizon``: what is due
    before cannot be done in time by this worker, nor by another one if it is ``hopeless``. ``lots``: what was taken, of
    ``rows`` and an expected ``us`` of compute; ``late``: what is hopeless, which has left its line and is still
    counted. ``stuck``: the request whose turn it is does not fit, and nobody may overtake it. ``overtakes``: only what
    may go before what has been given is taken.
    """

    __slots__ = ("full", "hears", "hopeless", "horizon", "late", "lots", "overtakes", "room", "rows", "stuck", "us")

    def __init__(
        self, room: int, hears: Container[bytes], full: Container[bytes], horizon: float = 0.0, hopeless: bool = True
    ) -> None:
        self.room = room
        self.hears = hears
        self.full = full
        self.horizon = horizon
        self.hopeless = hopeless
        self.lots: list[Lot] = []
        self.late: list[Lot] = []
        self.rows = 0
        self.us = 0
        self.stuck = False
        self.overtakes = False


class Share:
    """What waits for one tenant in one priority: a line for each of its callers, served in turn.

    ``served``: its virtual time. ``number``: of its entry in its level's heap, 0 while nothing waits.
    """

    __slots__ = ("lines", "number", "requests", "served", "turns", "us", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.served = 0.0
        self.number = 0
        self.requests = 0
        self.us = 0  # what waits is expected to take
        self.lines: dict[bytes, Fifo[Lot]] = {}
        self.turns: deque[bytes] = deque()

    def line(self, caller: bytes) -> Fifo[Lot]:
        line = self.lines.get(caller)
        if line is None:
            line = self.lines[caller] = Fifo()
            self.turns.append(caller)
        return line

    def drop_line(self, caller: bytes) -> None:
        del self.lines[caller]
        self.turns.remove(caller)

    def take(self, taking: Taking, enough: int) -> None:
        """Requests of no more rows than make ``enough`` beside what was taken before, a part from each line in turn."""
        turns, passed, room = self.turns, 0, taking.room
        part = enough - taking.rows if len(turns) <= 1 else max(1, (enough - taking.rows) // len(turns))
        while passed < len(turns) and taking.rows < enough:
            caller = turns[0]
            if caller not in taking.hears or caller in taking.full:
                turns.rotate(-1)
                passed += 1
                continue
            line = self.lines[caller]
            lot = line.first()
            late = lot.due < taking.horizon
            if late and not taking.hopeless:
                turns.rotate(-1)
                passed += 1
                continue
            passed = 0
            if late:
                self._take_late(lot, line, taking)
            else:
                size, count = lot.form.rows, len(lot.ids)
                wanted = min(-(-min(part, enough - taking.rows) // size), (room - taking.rows) // size)
                if not wanted:
                    taking.stuck = True
                    return
                if wanted < count:
                    count = wanted
                    lot = lot.split(lot.ids[:count])
                else:
                    line.pop()
                    lot.in_line = False
                us = count * lot.cost_us
                taking.lots.append(lot)
                taking.rows += count * size
                taking.us += us
                self.requests -= count
                self.us -= us
            if line:
                turns.rotate(-1)
            else:
                turns.popleft()
                del self.lines[caller]

    @staticmethod
    def _take_late(lot: Lot, line: Fifo[Lot], taking: Taking) -> None:
        ids = lot.late(taking.horizon)
        if len(ids) < len(lot.ids):
            lot = lot.split(ids)
        else:
            line.pop()
            lot.in_line = False
        taking.late.append(lot)


class Level:
    """What waits for one model at one priority.

    ``now``: the virtual time of what was given out last, ``done``: of what has been done, at which a tenant begins that
    has asked for nothing. ``given``: rows that have been given out and are not done. ``owed``: rows that more urgent
    levels owe it.
    """

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.requests = 0
        self.us = 0
        self.weight = 0.0  # of the shares in which something waits
        self.owed = 0.0
        self.now = 0.0
        self.done = 0.0
        self.given = 0
        self.shares: dict[ShareKey, Share] = {}
        self._turns: list[tuple[float, int, Share]] = []  # a heap; entries whose number is not their share's are void
        self._entered = 0
        self._idle = 0

    def push(self, lot: Lot, weight: float, front: bool) -> None:
        key = lot.share_key
        share = self.shares.get(key)
        if share is None:
            share = self.shares[key] = Share(weight)
            self._idle += 1
        line, count = share.line(lot.caller.id), len(lot.ids)
        if front:
            line.push_front(lot)
        else:
            line.push(lot)
        lot.in_line = True
        us = count * lot.cost_us
        share.requests += count
        share.us += us
        self.requests += count
        self.us += us
        if not share.number:
            self._wake(share)

    def remove(self, lot: Lot) -> None:
        """Take out requests: a lot that waits in its line, or what has left its line and is counted still."""
        share, count = self.shares[lot.share_key], len(lot.ids)
        if lot.in_line:
            lot.in_line = False
            line = share.lines[lot.caller.id]
            line.remove(lot)
            if not line:
                share.drop_line(lot.caller.id)
        us = count * lot.cost_us
        share.requests -= count
        share.us -= us
        self.requests -= count
        self.us -= us
        if not share.requests:
            self._rest(share)

    def take(self, taking: Taking, enough: int) -> None:
        """Requests of no more rows than make ``enough`` beside what was taken before: from each tenant its part, those
        first that are behind."""
        turns, passed = self._turns, []
        before = taking.rows
        left = enough - taking.rows
        while turns and taking.rows < enough and not taking.stuck:
            turn, number, share = turns[0]
            if number != share.number:
                heapq.heappop(turns)
                continue
            if turn < share.served:  # it took more than was expected, or was served while nobody else waited
                heapq.heapreplace(turns, (share.served, number, share))
                continue
            if taking.overtakes and share.served >= self.now:
                break
            us, requests, until = taking.us, share.requests, enough
            count = len(taking.lots)
            if share.weight < self.weight:
                until = min(enough, taking.rows + max(1, int(left * share.weight / self.weight)))
            share.take(taking, until)
            us = taking.us - us
            self.us -= us
            self.requests -= requests - share.requests
            if not us and share.requests == requests:
                passed.append(heapq.heappop(turns))  # nobody of it hears this worker, or all of it is late, or stuck
                continue
            turn = share.served
            for lot in taking.lots[count:]:
                lot.turn = turn
                self.now = max(self.now, turn)
                turn += len(lot.ids) * lot.cost_us / share.weight
            share.served += us / share.weight
            if not share.requests:
                self._rest(share)
            elif share.weight < self.weight:
                share.number = self._entered = self._entered + 1
                heapq.heapreplace(turns, (share.served, share.number, share))
        for entry in passed:
            heapq.heappush(turns, entry)
        self.given += taking.rows - before

    def owe(self, rows: float) -> None:
        if self.requests:
            self.owed = min(_OWED_MAX_ROWS, self.owed + rows)

    def charge(self, key: ShareKey, us: float) -> None:
        """Correct what a tenant has been charged."""
        share = self.shares.get(key)
        if share is not None:
            share.served += us / share.weight

    def is_behind(self, key: ShareKey) -> bool:
        """Whether what a tenant asks for now may overtake others that have been given out."""
        share = self.shares.get(key)
        return (self.done if share is None else max(self.done, share.served)) < self.now

    def first_is_behind(self) -> bool:
        """Whether any that waits may be behind what has been given out. No is certain; of yes ``take`` decides, since a
        turn that nobody has looked at may be old."""
        while self._turns and self._turns[0][1] != self._turns[0][2].number:
            heapq.heappop(self._turns)
        return bool(self._turns) and self._turns[0][0] < self.now

    def in_turn(self) -> Iterator[Share]:
        """Those in which something waits, whose turn it is first."""
        return (share for _, number, share in sorted(self._turns, key=_turn) if number == share.number)

    def lots(self) -> Iterator[Lot]:
        for share in self.shares.values():
            for line in share.lines.values():
                yield from line

    def _wake(self, share: Share) -> None:
        self._idle -= 1
        self.weight += share.weight
        share.served = max(share.served, self.done)  # who asks for nothing gathers no credit
        share.number = self._entered = self._entered + 1
        turns = self._turns
        if len(turns) > 64 + 2 * (len(self.shares) - self._idle):
            turns[:] = [entry for entry in turns if entry[1] == entry[2].number]
            heapq.heapify(turns)
        heapq.heappush(turns, (share.served, share.number, share))

    def _rest(self, share: Share) -> None:
        """Nothing of it waits. It stays known for a while: who comes again and again is not to begin anew each time."""
        share.number = 0
        self._idle += 1
        self.weight -= share.weight
        if self._idle == len(self.shares):
            self.weight = 0.0  # what rounding has left
            self.owed = 0.0
        if self._idle > _IDLE_SHARES_MAX:
            idle = [(key, each) for key, each in self.shares.items() if not each.number]
            behind = [key for key, each in idle if each.served <= self.done] or [key for key, _ in idle]
            for key in behind:
                del self.shares[key]
            self._idle -= len(behind)

    def validate(self, name: str) -> None:
        """Derive again what is counted, for tests. Raises AssertionError."""
        active = [share for share in self.shares.values() if share.requests]
        assert {id(share) for share in active} == {id(share) for share in self.in_turn()}, f"{name}: turns are wrong"
        assert len(list(self.in_turn())) == len(active), f"{name}: a tenant has two turns"
        assert self._idle == len(self.shares) - len(active), f"{name}: {self._idle} tenants wait for nothing"
        assert abs(self.weight - sum(share.weight for share in active)) < 1e-6, f"{name}: the weight is {self.weight}"
        assert self.requests == sum(share.requests for share in active), f"{name}: {self.requests} requests"
        assert self.us == sum(share.us for share in active), f"{name}: {self.us} us"
        assert active or not self.owed, f"{name}: owed {self.owed} rows, and nothing waits"
        for key, share in self.shares.items():
            assert list(share.lines.keys() & set(share.turns)) or not share.lines, f"{name}: a line has no turn"
            assert len(share.turns) == len(share.lines), f"{name}: a line has no turn, or two"
            lots = [lot for line in share.lines.values() for lot in line]
            assert share.requests == sum(len(lot.ids) for lot in lots), f"{name}: {share.requests} requests in {lots}"
            assert share.us == sum(len(lot.ids) * lot.cost_us for lot in lots), f"{name}: {share.us} us in {lots}"
            for caller, line in share.lines.items():
                assert line, f"{name}: an empty line"
                assert len(line) == len(list(line)), f"{name}: a line does not know its length"
                for lot in line:
                    assert lot.share_key == key, f"{lot} waits in another's share"
                    assert lot.caller.id == caller, f"{lot} waits in another's line"
                    assert lot.in_line, f"{lot} is not marked as waiting in a line"


def _turn(entry: tuple[float, int, Share]) -> tuple[float, int]:
    turn, number, share = entry
    return max(turn, share.served), number
