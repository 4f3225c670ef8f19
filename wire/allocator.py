"""Which bytes of an arena are taken: slots within a range, by offset and size alone.

A two-level segregated fit (M. Masmano, I. Ripoll, A. Crespo, J. Real: "TLSF: a new dynamic memory allocator for
real-time systems", ECRTS 2004). Free runs stand in lists by the class of their size: powers of two, each divided into
``2**_SPLIT_BITS`` equal parts. A bitmap says which classes have runs; both levels stand in one int, since a Python int
is as long as need be. No list is ever searched, so what a call costs does not depend on how many slots there are.

A small slot that is given back is kept as it is at first, for the next of its size: most requests to a model are
equally long, and to join and cut runs costs five times as much (deferred coalescing: P. Wilson, M. Johnstone,
M. Neely, D. Boles: "Dynamic storage allocation: a survey and critical review", IWMM 1995). What is kept joins the free
runs before anything is refused, when it has become much, and before a larger slot is cut: that one is not to divide
what the next of its size needs.

What holds, and tests/wire/test_allocator.py checks:

- A slot begins at a multiple of 64 bytes and wastes less than 64.
- Free runs that touch are one run, but for what is kept.
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
_KEPT_BYTES_MAX: Final = 1 << 14  # of one slot; to copy more takes longer than to join and cut
_KEPT_MAX: Final = 64  # slots of one size
_KEPT_SIZES_MAX: Final = 16  # to join all that is kept is a pause of a millisecond then


class Allocator:
    """Hands out slots of a range of ``size`` bytes, a positive multiple of 64. Knows numbers only, no memory.

    Its runs are known by their ends and are cut at their beginnings, so that a run which is cut, or to which a slot
    is given back in front, remains where it is in the lists unless its class changes.
    """

    __slots__ = ("_classes", "_ends", "_filled", "_kept", "_places", "_runs", "_slots", "size")

    def __init__(self, size: int) -> None:
        if type(size) is not int or size < ALIGN_BYTES or size % ALIGN_BYTES:
            raise ValueError(f"an allocator's size is a positive multiple of {ALIGN_BYTES} bytes, not {size!r}")
        self.size: Final = size
        self._slots: dict[int, int] = {}  # slots, offset to size
        self._kept: dict[int, list[int]] = {}  # slots that were given back, size to offsets
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
        return sum(self._slots.values())

    @property
    def free(self) -> int:
        """Bytes in no slot."""
        return self.size - self.used

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._slots)

    @property
    def largest(self) -> int:
        """The most bytes that ``take`` grants now; it grants all that is less, too. 0 when nothing is free."""
        self._join()
        if not self._filled:
            return 0
        return self._runs[self._classes[self._filled.bit_length() - 1][-1]]

    def take(self, nbytes: int) -> int | None:
        """The offset of a new slot of at least ``nbytes`` (1 or more), a multiple of 64; None when there is no room."""
        if type(nbytes) is not int or nbytes < 1:
            raise ValueError(f"a slot has 1 byte or more, not {nbytes!r}")
        need = nbytes + (ALIGN_BYTES - 1) & -ALIGN_BYTES
        kept = self._kept.get(need)
        if kept:
            offset = kept.pop()
        else:
            if need > _KEPT_BYTES_MAX and self._kept:
                self._join()
            found = self._cut(need)
            if found is None and self._kept:
                self._join()
                found = self._cut(need)
            if found is None:
                return None
            offset = found
        self._slots[offset] = need
        return offset

    def give(self, offset: int) -> None:
        """Free the slot that begins there. Raises ValueError when none does."""
        size = self._slots.pop(offset, 0)
        if not size:
            raise ValueError(f"no slot begins at offset {offset!r}: it was given back before, or never taken")
        if size > _KEPT_BYTES_MAX:
            self._free(offset, size)
            return
        kept = self._kept.get(size)
        if kept is None:
            if len(self._kept) == _KEPT_SIZES_MAX:
                self._join()
            self._kept[size] = [offset]
        elif len(kept) < _KEPT_MAX:
            kept.append(offset)
        else:
            self._free(offset, size)

    def _cut(self, need: int) -> int | None:
        """Take so much, a multiple of 64, from a free run. Its offset; None when none is long enough."""
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
        return offset

    def _join(self) -> None:
        """Keep nothing."""
        for size, offsets in self._kept.items():
            for offset in offsets:
                self._free(offset, size)
        self._kept.clear()

    def _free(self, offset: int, size: int) -> None:
        """Make a free run of this, and of those that it touches."""
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
        sizes, most = len(self._kept), max(map(len, self._kept.values()), default=0)
        assert sizes <= _KEPT_SIZES_MAX, f"slots of {sizes} sizes are kept, and {_KEPT_SIZES_MAX} should be at most"
        assert most <= _KEPT_MAX, f"{most} slots of one size are kept, and {_KEPT_MAX} should be at most"
        longest = max(self._kept, default=0)
        assert longest <= _KEPT_BYTES_MAX, f"a slot of {longest} bytes is kept, and {_KEPT_BYTES_MAX} is the most"
        pieces = [(offset, size, "slot") for offset, size in self._slots.items()]
        pieces += [(end - size, size, "free run") for end, size in self._runs.items()]
        pieces += [(offset, size, "kept slot") for size, offsets in self._kept.items() for offset in offsets]
        pieces.sort()
        reached, before = 0, ""
        for offset, size, kind in pieces:
            assert offset == reached, f"a {kind} begins at {offset}, and what is before it ends at {reached}"
            assert size > 0, f"the {kind} at {offset} has {size} bytes"
            assert size % ALIGN_BYTES == 0, f"the {kind} at {offset} has {size} bytes, no multiple of {ALIGN_BYTES}"
            assert kind != "free run" or before != kind, f"two free runs touch at {offset}"
            reached, before = offset + size, kind
        assert reached == self.size, f"slots and free runs end at {reached} of {self.size}"
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
