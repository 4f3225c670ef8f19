"""HTTP/1.1 answers, as far as one who measures has to read them: status, and where the body ends."""

from __future__ import annotations

from typing import Final, NamedTuple

_HEAD_MAX: Final = 64 << 10  # bytes
_KNOWN_MAX: Final = 256  # heads; most servers send the same ones again and again, for a second at least
_TEXT_MAX: Final = 4096  # bytes of a body that are kept, of one that says what is wrong
_TO_THE_END: Final = -1
_CHUNKED: Final = -2
_TIMING: Final = b"\r\nServer-Timing:"


class AnswerError(Exception):
    """What came is no HTTP answer; the message says why."""


class Head(NamedTuple):
    """What counts of an answer's head."""

    status: int
    length: int  # of the body in bytes, or one of the two above
    closes: bool  # whether the server closes the connection after it


class Answers:
    """The answers on one connection, one after another. What is known of heads can be shared between connections.

    ``feed`` takes what came and returns the status once the answer is complete; then ``closes`` says whether the
    connection is of no further use, and ``text`` holds the beginning of the body if the status is not 2xx.
    """

    __slots__ = ("_buffer", "_head", "_known", "_left", "closes", "text")

    def __init__(self, known: dict[bytes, Head]) -> None:
        self._known = known
        self._head: Head | None = None
        self._buffer = bytearray()  # of a head or of chunks, not yet understood
        self._left = 0  # bytes of the body, or of a chunk
        self.closes = False
        self.text = b""

    def feed(self, data: bytes) -> int | None:
        """Raises AnswerError."""
        if self._head is None:
            if self._buffer:
                self._buffer += data
                data = bytes(self._buffer)
                self._buffer.clear()
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                if len(data) > _HEAD_MAX:
                    raise AnswerError(f"an answer's head is longer than {_HEAD_MAX} bytes")
                self._buffer += data
                return None
            head = self._known.get(data[:end]) or self._learn(data[:end])
            if head.status < 200:  # informational: the answer comes after it
                return self.feed(data[end:]) if len(data) > end else None
            self.text = b""
            self._head = head
            self._left = head.length
            data = data[end:]
        head = self._head
        if head.status >= 300 and len(self.text) < _TEXT_MAX:
            self.text += data[: _TEXT_MAX - len(self.text)]
        if head.length >= 0:
            self._left -= len(data)
            if self._left > 0:
                return None
            return self._end(self._left)
        if head.length == _CHUNKED:
            self._buffer += data
            return self._end(0) if self._chunks() else None
        return None

    def eof(self) -> int | None:
        """The connection has ended. The status, if that was the end of an answer."""
        if self._head is not None and self._head.length == _TO_THE_END:
            return self._end(0)
        return None

    def _end(self, left: int) -> int:
        if left < 0:
            raise AnswerError(f"{-left} bytes came after the end of an answer")
        assert self._head is not None
        status, self.closes = self._head.status, self._head.closes
        self._head = None
        return status

    def _chunks(self) -> bool:
        """Steps over what is complete. Whether that was all of it. ``_left``: what is missing of a chunk and its end,
        0 or less where the line with a size comes next."""
        buffer, at = self._buffer, 0
        left = max(0, self._left)
        while True:
            if left:
                step = min(left, len(buffer) - at)
                at += step
                left -= step
                if left:
                    break
            line = buffer.find(b"\r\n", at)
            if line < 0:
                if len(buffer) - at > _HEAD_MAX:
                    raise AnswerError("the size of a chunk is no line")
                break
            try:
                size = int(buffer[at:line].partition(b";")[0], 16)
            except ValueError:
                raise AnswerError(f"{bytes(buffer[at:line])[:40]!r} is no size of a chunk") from None
            if size:
                at = line + 2
                left = size + 2
                continue
            # The last one; fields may follow, up to an empty line.
            if buffer.startswith(b"\r\n", line + 2):
                end = line + 4
            else:
                end = buffer.find(b"\r\n\r\n", line + 2) + 4
                if end == 3:
                    break
            if end != len(buffer):
                raise AnswerError(f"{len(buffer) - end} bytes came after the end of an answer")
            buffer.clear()
            return True
        del buffer[:at]
        self._left = left
        return False

    def _learn(self, data: bytes) -> Head:
        # A server that tells with each answer how long it took has no two heads that are the same otherwise.
        begin = data.find(_TIMING)
        if begin >= 0:
            data = data[:begin] + data[data.find(b"\r\n", begin + len(_TIMING)) :]
            if data in self._known:
                return self._known[data]
        lines = data[:-4].split(b"\r\n")
        version, _, rest = lines[0].partition(b" ")
        code = rest[:3]
        if not version.startswith(b"HTTP/1.") or not code.isdigit():
            raise AnswerError(f"{lines[0][:60]!r} is no status line of HTTP/1.1")
        fields = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip().lower()
        status = int(code)
        length = _length(status, fields)
        closes = b"close" in fields.get(b"connection", b"") or length == _TO_THE_END
        if version == b"HTTP/1.0" and b"keep-alive" not in fields.get(b"connection", b""):
            closes = True
        head = Head(status, length, closes)
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[data] = head
        return head


def _length(status: int, fields: dict[bytes, bytes]) -> int:
    if status < 200 or status in (204, 304):
        return 0
    if fields.get(b"transfer-encoding", b"").endswith(b"chunked"):
        return _CHUNKED
    if b"content-length" not in fields:
        return _TO_THE_END
    if not fields[b"content-length"].isdigit():
        raise AnswerError(f"{fields[b'content-length'][:40]!r} is no Content-Length")
    return int(fields[b"content-length"])
