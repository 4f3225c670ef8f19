"""Shared memory of clients: files in /dev/shm that they have named, for inputs and outputs of their requests.

A client's file may change at any moment, and be cut short: so nothing is ever mapped here, which could end this process
with a SIGBUS. Bytes are read and written through a descriptor, and how large the file is is asked at each use.

A region is leased to the process that registered it, where that can be found (peers.py), and ends with it; in any case
it ends when its file is unlinked. A request that has begun with a region holds its descriptor, and ends as it began,
whatever becomes of the region meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.gateway.common import Common, Section
from penstock.gateway.peers import Lease, is_alive
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, OVERLOADED, TOO_LARGE, PenstockError
from penstock.wire.tensors import Buffer

DIRECTORY: Final = Path("/dev/shm")
REGIONS_MAX: Final = 4096
READ_MAX_BYTES: Final = 128 * 1024  # of an input, at once; more is read by a thread
_SECTION: Final = "system_shared_memory"
_NAME_MAX: Final = 256  # characters
_KEY_MAX: Final = 255  # characters; that it may have fewer bytes the system says
_BYTES_MAX: Final = (1 << 63) - 1
_RESERVED: Final = ("triton_python_backend_shm_region_", "penstock")


class Place(NamedTuple):
    """Where an output goes: ``nbytes`` from ``at`` in a file that is open. ``parameters``: what a response says of it,
    but its size."""

    region: Region
    at: int
    nbytes: int
    parameters: dict[str, Any]


class Region:
    """A file that is open, for as long as anybody holds this. ``offset``: where in it the region begins."""

    def __init__(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Raises PenstockError."""
        self.name = name
        self.offset = offset
        self.nbytes = nbytes
        self.fd = _open(key)

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            os.close(self.fd)

    @property
    def file(self) -> tuple[int, int]:
        about = os.fstat(self.fd)
        return about.st_dev, about.st_ino

    @property
    def is_there(self) -> bool:
        """Whether its file has a name yet, by which others may find it."""
        return os.fstat(self.fd).st_nlink > 0

    def check(self, offset: int, nbytes: int) -> int:
        """Where a part of it begins in the file. Raises PenstockError for one that is not inside, now."""
        if offset > self.nbytes:
            raise PenstockError(BAD_INPUT, f"Invalid offset for shared memory region: '{self.name}'")
        end = self.offset + offset + nbytes
        if offset + nbytes > self.nbytes or end > os.fstat(self.fd).st_size:
            raise PenstockError(BAD_INPUT, f"Invalid offset + byte size for shared memory region: '{self.name}'")
        return self.offset + offset

    def read_into(self, at: int, view: memoryview) -> None:
        """Fill ``view``. Raises PenstockError where it has been cut short meanwhile."""
        while view:
            count = os.preadv(self.fd, [view], at)
            if not count:
                raise PenstockError(BAD_INPUT, f"Invalid offset + byte size for shared memory region: '{self.name}'")
            at, view = at + count, view[count:]

    def write(self, at: int, data: memoryview) -> None:
        """Raises PenstockError."""
        try:
            self.check(at - self.offset, len(data))
            while data:
                written = os.pwrite(self.fd, data, at)
                at, data = at + written, data[written:]
        except OSError as error:
            why = "it may only be read" if error.errno == errno.EBADF else error.strerror
            raise PenstockError(BAD_INPUT, f"shared memory region '{self.name}' cannot be written: {why}") from None


class Unread:
    """A payload of ``nbytes`` of which parts lie in regions yet: to be read by a thread, since it is large. Others are
    copied, whatever becomes of the request's body. It is used as a clerk's sheet is."""

    def __init__(self, parts: Sequence[Buffer | Place]) -> None:
        self._parts = [part if isinstance(part, Place) else bytes(part) for part in parts]
        self.nbytes = sum(_size(part) for part in self._parts)

    def __len__(self) -> int:
        return self.nbytes

    def read_into(self, view: memoryview) -> None:
        """Raises PenstockError."""
        at = 0
        for part in self._parts:
            end = at + _size(part)
            if isinstance(part, Place):
                part.region.read_into(part.at, view[at:end])
            else:
                view[at:end] = part
            at = end

    def view(self) -> memoryview:
        """All of it, read now. Raises PenstockError."""
        view = memoryview(bytearray(self.nbytes))
        self.read_into(view)
        return view

    def close(self) -> None:
        """Nobody reads it any more."""
        self._parts = []


def _size(part: Buffer | Place) -> int:
    return part.nbytes if isinstance(part, Place) else len(part)


class Regions:
    """Those of all gateways of the server. ``allowed``: clients may have any. ``bytes_max``: of all inputs of a request
    that lie there, as of its body."""

    def __init__(self, common: Common, allowed: bool, bytes_max: int = 64 << 20) -> None:
        self._common = common
        self.allowed = allowed
        self._bytes_max = bytes_max
        self._open: dict[str, tuple[Section, Region]] = {}

    def register(self, name: str, request: dict[str, Any], lease: Lease | None) -> None:
        """Raises PenstockError."""
        key, offset, nbytes = request.get("key"), request.get("offset", 0), request.get("byte_size")
        if not 0 < len(name) <= _NAME_MAX:
            raise PenstockError(BAD_INPUT, f"a region's name has from 1 to {_NAME_MAX} characters")
        if type(key) is not str:
            raise PenstockError(BAD_INPUT, "Shared memory register request has no 'key', a string")
        offset = _whole("offset", offset)
        if nbytes is None:
            raise PenstockError(BAD_INPUT, "Shared memory register request has no 'byte_size'")
        nbytes = _whole("byte_size", nbytes)
        region = Region(name, key, offset, nbytes)
        if not nbytes or offset + nbytes > os.fstat(region.fd).st_size:
            raise PenstockError(BAD_INPUT, f"Invalid offset + byte size for shared memory region: '{name}'")
        self.sweep()

        def add(section: Section) -> None:
            if name in section:
                raise PenstockError(BAD_INPUT, f"shared memory region '{name}' already in manager")
            if len(section) >= REGIONS_MAX:
                raise PenstockError(OVERLOADED, f"there are {REGIONS_MAX} shared memory regions; unregister some")
            about = {"key": key, "offset": offset, "byte_size": nbytes, "file": region.file}
            section[name] = about | {"lease": None if lease is None else list(lease)}

        section = self._common.change(_SECTION, add)
        self._open[name] = section[name], region

    def unregister(self, name: str = "") -> None:
        """One, if there is such, or all. What is under way with it ends as it began."""
        section = self._common.read(_SECTION)
        if name and name not in section:
            return
        gone = [name] if name else list(section)
        self._forget(gone)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """Raises PenstockError where there is no such region."""
        self.sweep()
        section = self._common.read(_SECTION)
        if name and name not in section:
            raise PenstockError(NOT_FOUND, f"Unable to find system shared memory region: '{name}'")
        return [
            {"name": each, "key": about["key"], "offset": about["offset"], "byte_size": about["byte_size"]}
            for each, about in sorted(section.items())
            if name in ("", each)
        ]

    def find(self, name: str) -> Region:
        """Raises PenstockError."""
        if not self.allowed:
            raise PenstockError(BAD_INPUT, NOT_ALLOWED)
        about = self._common.read(_SECTION).get(name)
        if about is None:
            self._open.pop(name, None)
            raise PenstockError(NOT_FOUND, f"Unable to find shared memory region: '{name}'")
        known, region = self._open.get(name, (None, None))
        if known is None or region is None or (known is not about and known != about):
            region = Region(name, about["key"], about["offset"], about["byte_size"])
        self._open[name] = about, region
        if self._is_over(about, region):
            self._forget([name])
            raise PenstockError(
                NOT_FOUND,
                f"Unable to find shared memory region: '{name}' (its file has been removed, or its client has ended)",
            )
        return region

    def read(self, tensor: str, parameters: dict[str, Any], before: int = 0) -> bytes | Place:
        """The data of an input that lies there, or where that is, if it is large. ``before``: bytes of inputs before
        it. Raises PenstockError."""
        place = self._part(f"input '{tensor}'", parameters)
        if before + place.nbytes > self._bytes_max:
            raise PenstockError(
                TOO_LARGE,
                f"input '{tensor}' and those before it take {before + place.nbytes} bytes, with what lies in shared "
                f"memory; the limit is {self._bytes_max} (body_bytes_max)",
            )
        if place.nbytes > READ_MAX_BYTES:
            return place
        data = bytearray(place.nbytes)
        place.region.read_into(place.at, memoryview(data))
        return bytes(data)

    def place(self, tensor: str, parameters: dict[str, Any]) -> Place:
        """Where an output is to go. Raises PenstockError."""
        return self._part(f"output '{tensor}'", parameters)

    def _part(self, what: str, parameters: dict[str, Any]) -> Place:
        name = parameters["shared_memory_region"]
        if type(name) is not str:
            raise PenstockError(BAD_INPUT, f"'shared_memory_region' of {what} is a string")
        if "shared_memory_byte_size" not in parameters:
            raise PenstockError(
                BAD_INPUT, f"'shared_memory_byte_size' must be specified along with 'shared_memory_region' of {what}"
            )
        nbytes = _whole("shared_memory_byte_size", parameters["shared_memory_byte_size"], f" of {what}")
        offset = _whole("shared_memory_offset", parameters.get("shared_memory_offset", 0), f" of {what}")
        region = self.find(name)
        told = {"shared_memory_region": name} | ({"shared_memory_offset": offset} if offset else {})
        return Place(region, region.check(offset, nbytes), nbytes, told)

    @property
    def any(self) -> bool:
        return bool(self._common.read(_SECTION))

    def sweep(self) -> None:
        """Forget regions whose client, or whose file, has gone."""
        over = []
        for name, about in self._common.read(_SECTION).items():
            known = self._open.get(name)
            if self._is_over(about, None if known is None or known[0] != about else known[1]):
                over.append(name)
        if over:
            self._forget(over)
        for name in self._open.keys() - self._common.read(_SECTION).keys():
            del self._open[name]

    @staticmethod
    def _is_over(about: Section, region: Region | None) -> bool:
        lease = about["lease"]
        if lease is not None and not is_alive(Lease(*lease)):
            return True
        if region is not None:
            return not region.is_there or list(region.file) != list(about["file"])
        try:
            there = os.stat(DIRECTORY / about["key"].removeprefix("/"), follow_symlinks=False)
        except OSError:
            return True
        return [there.st_dev, there.st_ino] != list(about["file"])

    def _forget(self, names: list[str]) -> None:
        def drop(section: Section) -> None:
            for name in names:
                section.pop(name, None)

        self._common.change(_SECTION, drop)
        for name in names:
            self._open.pop(name, None)


NOT_ALLOWED: Final = (
    "shared memory of clients is not used by this server; start it with --allow-client-shm, or set "
    "allow_client_shm = true in [gateway] of its configuration"
)


def _whole(name: str, value: Any, of: str = "") -> int:
    if type(value) is not int or value < 0:
        raise PenstockError(BAD_INPUT, f"'{name}'{of} is a whole number, 0 or more")
    if value > _BYTES_MAX:
        raise PenstockError(BAD_INPUT, f"Integer overflow detected: '{name}'{of}")
    return value


def _open(key: str) -> int:
    """A key as shm_open(3) has it. Raises PenstockError."""
    name = key.removeprefix("/")
    if not name or "/" in name or name in (".", "..") or "\0" in name or len(name) > _KEY_MAX:
        raise PenstockError(BAD_INPUT, f"'key' is a name of shared memory as shm_open has it, not {key[:80]!r}")
    if name.startswith(_RESERVED):
        raise PenstockError(BAD_INPUT, f"cannot register shared memory region '{key[:80]}': its name is reserved")
    for access in (os.O_RDWR, os.O_RDONLY):
        try:
            fd = os.open(DIRECTORY / name, access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno == errno.EACCES and access == os.O_RDWR:
                continue
            raise PenstockError(BAD_INPUT, f"Unable to open shared memory region: '{key[:80]}'") from None
        except UnicodeEncodeError:
            raise PenstockError(BAD_INPUT, f"Unable to open shared memory region: {key[:80]!r}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PenstockError(BAD_INPUT, f"Unable to open shared memory region: '{key[:80]}', which is no memory")
    return fd
