"""Which bytes of an arena are taken: slots within a range, by offset and size alone.

A two-level segregated fit (M. Masmano, I. Ripoll, A. Crespo, J. Real: "TLSF: a new dynamic memory allocator for
real-time systems", ECRTS 2004). Free runs stand in lists by the class of their size: powers of two, each divided into
``2**_SPLIT_BITS`` equal parts. A bitmap says which classes have runs; both levels stand in one int, since a Python int
is as long as need be. No list is ever searched, so what a call costs does not depend on how many slots there are.

What holds, and tests/wire/test_allocator.py checks:

- A slot begins at a multiple of 64 bytes and wastes less than 64.
- Free runs that touch are one run, always.
- ``take(nbytes)`` succeeds exactly when ``nbytes`` is at most ``largest``, and ``largest`` is more than the longest
  free run divided by 1 + 1/32; the whole of it when no other run is of its class, as when nothing is taken. In other
  words: it succeeds if there is a free run of ``nbytes``, rounded up to a multiple of 64 and then to where a class
  begins (by less than 1/32).
"""

from __future__ import annotations

from typing import Final

ALIGN_BYTES: Final = 64  # a cache line, and what vector instructions and ONNX Runtime like tensors aligned to
_ALIGN_BITS: Final = 6
_SPLIT_BITS: Final = 5  # 32 classes for each power of two; with 16, take and give cost 5 % less at best


class Allocator:
    """Hands out slots of a range of ``size`` bytes, a positive multiple of 64. Knows numbers only, no memory.

    Its runs are known by their ends and are cut at their beginnings, so that a run which is cut, or to which a slot
    is given back in front, remains where it is in the lists unless its class changes. To take a slot and give it back
    costs 0.7 to 1.3 microseconds (Python 3.11), with one slot taken as with 10,000.
    """

    __slots__ = ("_classes", "_ends", "_filled", "_places", "_runs", "_slots", "_used", "size")

    def __init__(self, size: int) -> None:
        if type(size) is not int or size < ALIGN_BYTES or size % ALIGN_BYTES:
            raise ValueError(f"an allocator's size is a positive multiple of {ALIGN_BYTES} bytes, not {size!r}")
        self.size: Final = size
        self._used = 0
        self._slots: dict[int, int] = {}  # slots, offset to size
        self._runs: dict[int, int] = {}  # free runs, end to size
        self._ends: dict[int, int] = {}  # free runs, start to end
        self._places: dict[int, int] = {}  # free runs, end to the place in the list of its class
        self._classes: list[list[int]] = [[] for _ in range(_class_of(size) + 1)]  # free runs' ends
        self._filled = 0  # bit n: class n has runs
        self._ends[0] = size
        self._runs[size] = size
        self._enter(size, _class_of(size))

    @property
    def used(self) -> int:
        """Bytes in slots, each rounded up to a multiple of 64."""
        return self._used

    @property
    def free(self) -> int:
        """Bytes in no slot."""
        return self.size - self._used

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._slots)

    @property
    def largest(self) -> int:
        """The most bytes that ``take`` grants now; it grants all that is less, too. 0 when nothing is free."""
        if not self._filled:
            return 0
        return self._runs[self._classes[self._filled.bit_length() - 1][-1]]

    def take(self, nbytes: int) -> int | None:
        """The offset of a new slot of at least ``nbytes`` (1 or more), a multiple of 64; None when there is no room."""
        if type(nbytes) is not int or nbytes < 1:
            raise ValueError(f"a slot has 1 byte or more, not {nbytes!r}")
        need = nbytes + (ALIGN_BYTES - 1) & -ALIGN_BYTES
        if need > self.size:
            return None
        shift = need.bit_length() - (_SPLIT_BITS + 1)  # as in _class_of; a call would cost a tenth of all
        if shift < _ALIGN_BITS:
            shift = _ALIGN_BITS
        at = (shift - _ALIGN_BITS << _SPLIT_BITS) + (need >> shift)
        runs = self._runs
        # The last run of its own class may be large enough: so a slot as large as one that was given back finds it.
        # Every run of a higher class is large enough.
        among = self._classes[at]
        if not among or runs[among[-1]] < need:
            above = self._filled >> at + 1
            if not above:
                return None
            at += (above & -above).bit_length()
            among = self._classes[at]
        end = among[-1]
        left = runs[end] - need
        offset = end - need - left
        del self._ends[offset]
        if left:
            self._ends[end - left] = end
            runs[end] = left
            shift = left.bit_length() - (_SPLIT_BITS + 1)
            if shift < _ALIGN_BITS:
                shift = _ALIGN_BITS
            class_left = (shift - _ALIGN_BITS << _SPLIT_BITS) + (left >> shift)
            if class_left != at:
                among.pop()
                if not among:
                    self._filled ^= 1 << at
                self._enter(end, class_left)
        else:
            del runs[end], self._places[end]
            among.pop()
            if not among:
                self._filled ^= 1 << at
        self._slots[offset] = need
        self._used += need
        return offset

    def give(self, offset: int) -> None:
        """Free the slot that begins there. Raises ValueError when none does."""
        size = self._slots.pop(offset, 0)
        if not size:
            raise ValueError(f"no slot begins at offset {offset!r}: it was given back before, or never taken")
        self._used -= size
        runs, ends = self._runs, self._ends
        end = offset + size
        before = runs.pop(offset, 0)
        if before:
            self._leave(offset, _class_of(before))
            del self._places[offset]
            offset -= before
            size += before
        beyond = ends.pop(end, 0)
        if beyond:
            after = runs[beyond]
            size += after
            now, then = _class_of(size), _class_of(after)
            if now != then:
                self._leave(beyond, then)
                self._enter(beyond, now)
            end = beyond
        else:
            self._enter(end, _class_of(size))
        runs[end] = size
        ends[offset] = end

    def _enter(self, end: int, at: int) -> None:
        """Put a run, last, into the list of a class."""
        among = self._classes[at]
        if not among:
            self._filled |= 1 << at
        self._places[end] = len(among)
        among.append(end)

    def _leave(self, end: int, at: int) -> None:
        """Take a run out of the list of its class; the last one takes its place. Its old place stays noted."""
        among = self._classes[at]
        last = among.pop()
        if last != end:
            place = self._places[end]
            among[place] = last
            self._places[last] = place
        elif not among:
            self._filled ^= 1 << at

    def validate(self) -> None:
        """Derive every index anew and compare; for tests. AssertionError says what is wrong."""
        pieces = [(offset, size, "slot") for offset, size in self._slots.items()]
        pieces += [(end - size, size, "free run") for end, size in self._runs.items()]
        pieces.sort()
        reached, before = 0, ""
        for offset, size, kind in pieces:
            assert offset == reached, f"a {kind} begins at {offset}, and what is before it ends at {reached}"
            assert size > 0, f"the {kind} at {offset} has {size} bytes"
            assert size % ALIGN_BYTES == 0, f"the {kind} at {offset} has {size} bytes, no multiple of {ALIGN_BYTES}"
            assert kind == "slot" or before != kind, f"two free runs touch at {offset}"
            reached, before = offset + size, kind
        assert reached == self.size, f"slots and free runs end at {reached} of {self.size}"
        used = sum(self._slots.values())
        assert self._used == used, f"{self._used} bytes are said to be used, and {used} are"
        ends = {end - size: end for end, size in self._runs.items()}
        assert self._ends == ends, f"ends by start are {self._ends}, and should be {ends}"
        classes: dict[int, set[int]] = {}
        for end, size in self._runs.items():
            classes.setdefault(_class_of(size), set()).add(end)
        listed = {at: set(among) for at, among in enumerate(self._classes) if among}
        assert listed == classes, f"runs by class are {listed}, and should be {classes}"
        places = {end: place for among in self._classes for place, end in enumerate(among)}
        assert sum(map(len, self._classes)) == len(places), f"a run is listed twice: {self._classes}"
        assert self._places == places, f"places are {self._places}, and should be {places}"
        filled = sum(1 << at for at in classes)
        assert self._filled == filled, f"the bitmap is {self._filled:b}, and should be {filled:b}"


def _class_of(size: int) -> int:
    """The class of a run. Up to 64 * 64 bytes each multiple of 64 has its own; then 32 share each power of two."""
    shift = size.bit_length() - (_SPLIT_BITS + 1)
    if shift < _ALIGN_BITS:
        shift = _ALIGN_BITS
    return (shift - _ALIGN_BITS << _SPLIT_BITS) + (size >> shift)
