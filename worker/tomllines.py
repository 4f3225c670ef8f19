"""Where keys stand in a TOML text: tomllib tells that of what it cannot read, and not of what it has read.

Only for text that tomllib has accepted: what it makes of any other has no meaning.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from typing import Final, NamedTuple, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]  # ("workers", 1, "speed")

_BLANK: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'", re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}\n#]*")


class Statement(NamedTuple):
    """A key with its value, or a table's head, which has none, from ``begin`` to ``end``. ``value``: where that begins;
    -1: a head."""

    path: KeyPath
    begin: int
    value: int
    end: int


def statements_of(text: str) -> list[Statement]:
    """In their order; what is within the values is no statement. Raises ValueError for what this cannot read."""
    reader = _Reader(text)
    try:
        reader.read()
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError("it is not written in the way that it can be found in") from error
    return reader.statements


def lines_of(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of each key, each table's head and each element of an array, by its path."""
    reader = _Reader(text.replace("\r\n", "\n"))
    reader.read()
    return reader.lines


def find_line(text: str, path: KeyPath) -> int | None:
    """The line of a key, or where it is not there, of the table that it is missing in. None: of the whole file, or this
    cannot tell: no line is better than a wrong one."""
    try:
        lines = lines_of(text)
    except (ValueError, IndexError, RecursionError):  # what a newer TOML may have, and arrays as deep as the stack
        return None
    return line_of(lines, path) if path[:1] in lines else None


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """Of a key, or where it is not there, of the table that it is missing in. 1: of the whole file."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return 1


class _Reader:
    """Goes through a text once, from ``_at`` on."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.statements: list[Statement] = []
        self._text = text
        self._at = 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._tables: dict[KeyPath, int] = {}  # how many of each array of tables there have been

    def read(self) -> None:
        table: KeyPath = ()
        while self._skip(_BLANK) < len(self._text):
            begin = self._at
            if self._text[begin] == "[":
                table = self._head()
                self.statements.append(Statement(table, begin, -1, self._at))
            else:
                path, value = self._pair(table)
                end = value + len(self._text[value : self._at].rstrip())
                self.statements.append(Statement(path, begin, value, end))

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not understood at {self._at}")
        self._at = match.end()
        return self._at

    def _note(self, path: KeyPath, at: int) -> None:
        self.lines.setdefault(path, bisect_right(self._ends, at - 1) + 1)

    def _head(self) -> KeyPath:
        """[table] or [[table]]."""
        begin = self._at
        many = self._text.startswith("[[", begin)
        self._at += 2 if many else 1
        keys = self._keys()
        self._at += 2 if many else 1
        path: KeyPath = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            last = number == len(keys) - 1
            self._note(path, begin)
            if many and last:
                self._tables[path] = self._tables.get(path, 0) + 1
            if path in self._tables:
                path = (*path, self._tables[path] - 1)
        self._note(path, begin)
        return path

    def _pair(self, table: KeyPath) -> tuple[KeyPath, int]:
        """Its path, and where its value begins."""
        begin = self._at
        path = (*table, *self._keys())
        self._at += 1  # the equals sign
        for length in range(len(table) + 1, len(path) + 1):
            self._note(path[:length], begin)
        value = self._skip(_SPACE)
        self._value(path)
        return path, value

    def _keys(self) -> list[str]:
        """A key, with dots or without, up to what comes after it."""
        keys = []
        while True:
            self._skip(_SPACE)
            match = _STRING.match(self._text, self._at) or _BARE.match(self._text, self._at)
            if match is None:
                raise ValueError(f"no key at {self._at}")
            quoted = match[0][0] in "\"'"
            keys.append(tomllib.loads(f"key = {match[0]}")["key"] if quoted else match[0])
            self._at = match.end()
            if self._text[self._skip(_SPACE)] != ".":
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip(_SPACE)
        first = self._text[self._at]
        if first == "[":
            self._members(path, "]")
        elif first == "{":
            self._members(path, "}")
        elif first in "\"'":
            self._skip(_STRING)
        else:
            begin = self._at
            if self._skip(_SCALAR) == begin:  # or an array of such would never end
                raise ValueError(f"no value at {begin}")

    def _members(self, path: KeyPath, end: str) -> None:
        """Of an array, or of a table in one line."""
        self._at += 1
        number = 0
        while self._text[self._skip(_BLANK)] != end:
            if end == "}":
                self._pair(path)
            else:
                self._note((*path, number), self._at)
                self._value((*path, number))
                number += 1
            if self._text[self._skip(_BLANK)] == ",":
                self._at += 1
        self._at += 1
