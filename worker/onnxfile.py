"""What an .onnx file says of itself, read without its weights.

The file is protobuf (https://protobuf.dev/programming-guides/encoding, https://github.com/onnx/onnx, ``onnx.proto``):
nested messages, each field with its length before it, so that weights are stepped over. The onnx package parses all of
a file into memory, gigabytes of it, which a server that looks before it loads cannot afford; and ONNX Runtime tells
only of a model that it has loaded, and not all: a shape of ``[]`` may be a scalar's or one of unknown rank.

The bytes may be anybody's. Everything read from them is bounded: nesting, fields, text. They are read and not mapped:
a mapped file that somebody cuts off ends the process that looks at it (SIGBUS).
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

_WINDOW_BYTES: Final = 1 << 16  # read at once
_DEPTH_MAX: Final = 100  # messages within messages; protobuf's own limit
_FIELDS_MAX: Final = 20_000_000  # of a file, looked at; half a minute of it
_TEXT_MAX_BYTES: Final = 64 << 20  # of a file's names, together
_PARTS_MAX: Final = 1000  # that one message may come in; also of the dimensions of a tensor
_VARINT_MAX_BYTES: Final = 10
_HEAD_MAX_BYTES: Final = 2 * _VARINT_MAX_BYTES  # a field's number and its value or length
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; the others are groups, which ONNX has not
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}
_EXTERNAL: Final = 1  # TensorProto.DataLocation

# TensorProto.DataType: the name that ONNX Runtime has for it, and how many bits an element takes in memory.
_ELEMENTS: Final[dict[int, tuple[str, int]]] = {
    1: ("float", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("double", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
_STRING: Final = 8
_KINDS: Final = {1: "tensor", 4: "sequence", 5: "map", 7: "opaque", 8: "sparse", 9: "optional"}  # members of TypeProto
_PREFIXES: Final = {"sequence": "seq", "sparse": "sparse_tensor"}  # where ONNX Runtime has other words

Span: TypeAlias = tuple[int, int]  # of the file: where it begins, where it ends
Message: TypeAlias = tuple[Span, ...]  # a message may come in parts, which protobuf joins
Shape: TypeAlias = tuple[int | str | None, ...]


class OnnxFileError(Exception):
    """A file that is no ONNX model, or cannot be read; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output as the file declares it.

    ``kind``: tensor, sparse, sequence, map, optional, opaque, or "" where no type is given. ``element``: of a tensor
    its type, such as "float"; of what holds others what it holds, such as "tensor(float)" or "int64,tensor(float)".
    ``shape``: of a tensor, a size, a name or None for each dimension; None where not even the rank is known.
    """

    name: str
    kind: str
    element: str
    shape: Shape | None

    @property
    def type(self) -> str:
        """As ONNX Runtime writes it: "tensor(float)", "seq(map(int64,tensor(float)))"."""
        return f"{_PREFIXES.get(self.kind, self.kind)}({self.element})" if self.kind else ""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """``operators``: how many nodes there are of each (domain, type), in the graph, in those inside it and in
    functions; the domain of ONNX itself is "". ``initializers``: names of the graph's own; an input that is among them
    has a value already. ``weights``: tensors with values: initializers of all graphs and what constants hold, and their
    bytes as they are in memory, those that lie in the file and those that lie elsewhere. ``external_files``: where
    these lie, relative to the file, each once, in the order of their first mention."""

    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    operators: Mapping[tuple[str, str], int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    initializers: tuple[str, ...]
    weights: int
    inline_bytes: int
    external_bytes: int
    external_files: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return self.inline_bytes + self.external_bytes


def read_onnx(path: Path) -> OnnxFile:
    """Raises OnnxFileError."""
    try:
        # What is no file, such as a pipe, must not make us wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise OnnxFileError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OnnxFileError(f"{path} is no file")
        return _Model(_Reader(fd, about.st_size)).read()
    except OSError as error:
        raise OnnxFileError(f"cannot read {path}: {error.strerror}") from None
    except _Malformed as error:
        raise OnnxFileError(f"{path} is no ONNX model: {error}") from None
    finally:
        os.close(fd)


class _Malformed(Exception):
    """What is wrong with the bytes."""


class _Reader:
    """Fields of messages in a file of ``size`` bytes."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._window = b""
        self._window_at = 0
        self._fields_left = _FIELDS_MAX
        self._text_left = _TEXT_MAX_BYTES
        self.all: Message = ((0, size),)

    def fields(self, message: Message) -> Iterator[tuple[int, int, Any]]:
        """Number, wire type and value of each: a whole number, or the span of the bytes."""
        for at, end in message:
            while at < end:
                self._fields_left -= 1
                if self._fields_left < 0:
                    raise _Malformed(f"it has more than {_FIELDS_MAX} fields")
                head = self._peek(at, min(_HEAD_MAX_BYTES, end - at))
                tag, used = _varint(head, 0)
                number, wire = tag >> 3, tag & 7
                if not 0 < number < 1 << 29:
                    raise _Malformed(f"field number {number} at byte {at}")
                if wire == _VARINT:
                    value, used = _varint(head, used)
                    at += used
                    yield number, wire, value
                    continue
                if wire == _BYTES:
                    length, used = _varint(head, used)
                elif wire in _FIXED_BYTES:
                    length = _FIXED_BYTES[wire]
                else:
                    raise _Malformed(f"wire type {wire} at byte {at}")
                begin = at + used
                at = begin + length
                if at > end:
                    raise _Malformed(
                        f"{length} bytes from byte {begin} on exceed what they lie in, which ends at {end}"
                    )
                yield number, wire, (begin, at)

    def text(self, span: Span) -> bytes:
        begin, end = span
        self._text_left -= end - begin
        if self._text_left < 0:
            raise _Malformed(f"its names take more than {_TEXT_MAX_BYTES} bytes")
        return self._peek(begin, end - begin)

    def numbers(self, span: Span) -> list[int]:
        """Whole numbers, packed."""
        begin, end = span
        if end - begin > _PARTS_MAX * _VARINT_MAX_BYTES:
            raise _Malformed(f"{end - begin} bytes of dimensions at byte {begin}")
        packed, at, found = self._peek(begin, end - begin), 0, []
        while at < len(packed):
            value, at = _varint(packed, at)
            found.append(value)
        return found

    def _peek(self, at: int, length: int) -> bytes:
        offset = at - self._window_at
        if not 0 <= offset <= len(self._window) - length:
            window = os.pread(self._fd, max(_WINDOW_BYTES, length), at)
            while len(window) < length:
                more = os.pread(self._fd, length - len(window), at + len(window))
                if not more:
                    raise _Malformed("it became shorter while it was read")
                window += more
            self._window, self._window_at, offset = window, at, 0
        return self._window[offset : offset + length]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for used in range(_VARINT_MAX_BYTES):
        try:
            byte = data[at + used]
        except IndexError:
            raise _Malformed("a number is cut off") from None
        value |= (byte & 0x7F) << 7 * used
        if byte < 0x80:
            return value & (1 << 64) - 1, at + used + 1
    raise _Malformed("a number is too long")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _int32(value: int) -> int:
    """As protobuf reads an enumeration."""
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >> 31 else value


@dataclass(slots=True)
class _Tensor:
    name: str = ""
    nbytes: int = 0
    files: list[str] = field(default_factory=list)  # where its values lie, or none


class _Model:
    """Walks a file once and counts. Each method reads one kind of message, ``depth`` messages down."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._operators: Counter[tuple[str, str]] = Counter()
        self._opsets: dict[str, int] = {}
        self._weights = 0
        self._inline_bytes = 0
        self._external_bytes = 0
        self._files: dict[str, None] = {}

    def read(self) -> OnnxFile:
        ir_version, producer, graph = 0, "", _Parts()
        for number, wire, value in self._reader.fields(self._reader.all):
            match number, wire:
                case 1, 0:
                    ir_version = _signed(value)
                case 2, 2:
                    producer = self._text(value)
                case 7, 2:
                    graph.add(value)
                case 8, 2:
                    self._read_opset((value,))
                case 25, 2:
                    self._read_function((value,), 1)
        if not graph.found:
            raise _Malformed("it has no graph")
        inputs, outputs, names = self._read_graph(graph.message, 1)
        return OnnxFile(
            ir_version,
            producer,
            self._opsets,
            dict(self._operators),
            tuple(inputs),
            tuple(outputs),
            tuple(names),
            self._weights,
            self._inline_bytes,
            self._external_bytes,
            tuple(self._files),
        )

    def _read_opset(self, message: Message) -> None:
        domain, version = "", 0
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 2:
                    domain = _domain(self._text(value))
                case 2, 0:
                    version = _signed(value)
        self._opsets[domain] = version

    def _read_function(self, message: Message, depth: int) -> None:
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 7, 2:
                    self._read_node((value,), depth + 1)
                case 11, 2:
                    self._read_attribute((value,), depth + 1)

    def _read_graph(self, message: Message, depth: int) -> tuple[list[Port], list[Port], list[str]]:
        """Inputs, outputs, and the names of initializers."""
        _check_depth(depth)
        inputs: list[Port] = []
        outputs: list[Port] = []
        names: list[str] = []
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 2:
                    self._read_node((value,), depth + 1)
                case 5, 2:
                    names.append(self._add(self._read_tensor((value,), depth + 1)))
                case 11, 2:
                    inputs.append(self._read_port((value,), depth + 1))
                case 12, 2:
                    outputs.append(self._read_port((value,), depth + 1))
                case 15, 2:
                    names.append(self._add(self._read_sparse((value,), depth + 1)))
        return inputs, outputs, names

    def _read_node(self, message: Message, depth: int) -> None:
        _check_depth(depth)
        operator, domain = "", ""
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 4, 2:
                    operator = self._text(value)
                case 5, 2:
                    self._read_attribute((value,), depth + 1)
                case 7, 2:
                    domain = _domain(self._text(value))
        self._operators[domain, operator] += 1

    def _read_attribute(self, message: Message, depth: int) -> None:
        """Tensors and graphs in it, whatever type it says that it has."""
        _check_depth(depth)
        tensor, graph, sparse = _Parts(), _Parts(), _Parts()
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 5, 2:
                    tensor.add(value)
                case 6, 2:
                    graph.add(value)
                case 22, 2:
                    sparse.add(value)
                case 10, 2:
                    self._add(self._read_tensor((value,), depth + 1))
                case 11, 2:
                    self._read_graph((value,), depth + 1)
                case 23, 2:
                    self._add(self._read_sparse((value,), depth + 1))
        if tensor.found:
            self._add(self._read_tensor(tensor.message, depth + 1))
        if graph.found:
            self._read_graph(graph.message, depth + 1)
        if sparse.found:
            self._add(self._read_sparse(sparse.message, depth + 1))

    def _read_tensor(self, message: Message, depth: int) -> _Tensor:
        _check_depth(depth)
        tensor = _Tensor()
        dims: list[int] = []
        element, location, text_bytes = 0, 0, 0
        files: list[str] = []
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 0:
                    dims.append(value)
                case 1, 2:
                    dims += self._reader.numbers(value)
                case 2, 0:
                    element = _int32(value)
                case 6, 2:
                    text_bytes += value[1] - value[0]
                case 8, 2:
                    tensor.name = self._text(value)
                case 13, 2:
                    files += self._read_location((value,))
                case 14, 0:
                    location = _int32(value)
            if len(dims) > _PARTS_MAX:
                raise _Malformed(f"a tensor has more than {_PARTS_MAX} dimensions")
        bits = _ELEMENTS.get(element, ("", 0))[1]
        # What has dimensions below 0 or is larger than any memory is not loaded, so it does not matter.
        elements = math.prod(min(max(_signed(dim), 0), 1 << 48) for dim in dims)
        tensor.nbytes = text_bytes if element == _STRING else min((elements * bits + 7) // 8, 1 << 62)
        tensor.files = files if location == _EXTERNAL else []
        return tensor

    def _read_location(self, message: Message) -> Iterable[str]:
        """The value of an entry whose key says that it is where the values lie."""
        key, value = b"", b""
        for number, wire, span in self._reader.fields(message):
            match number, wire:
                case 1, 2:
                    key = self._reader.text(span)
                case 2, 2:
                    value = self._reader.text(span)
        return [os.fsdecode(value)] if key == b"location" else []

    def _read_sparse(self, message: Message, depth: int) -> _Tensor:
        """One tensor, under the name of its values, as large as values and indices."""
        _check_depth(depth)
        values, indices = _Parts(), _Parts()
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 2:
                    values.add(value)
                case 2, 2:
                    indices.add(value)
        tensor = self._read_tensor(values.message, depth + 1)
        other = self._read_tensor(indices.message, depth + 1)
        return _Tensor(tensor.name, tensor.nbytes + other.nbytes, tensor.files + other.files)

    def _add(self, tensor: _Tensor) -> str:
        self._weights += 1
        self._files |= dict.fromkeys(tensor.files)
        if tensor.files:
            self._external_bytes += tensor.nbytes
        else:
            self._inline_bytes += tensor.nbytes
        return tensor.name

    def _read_port(self, message: Message, depth: int) -> Port:
        name, kind = "", _Parts()
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 2:
                    name = self._text(value)
                case 2, 2:
                    kind.add(value)
        return self._read_type(name, kind.message, depth + 1)

    def _read_type(self, name: str, message: Message, depth: int) -> Port:
        _check_depth(depth)
        parts, member = _Parts(), 0
        for number, wire, value in self._reader.fields(message):
            if number in _KINDS and wire == _BYTES:
                if number != member:  # one of them only, the last
                    parts, member = _Parts(), number
                parts.add(value)
        kind = _KINDS.get(member, "")
        match kind:
            case "tensor" | "sparse":
                return self._read_tensor_type(name, kind, parts.message, depth + 1)
            case "sequence" | "optional":
                inner = self._members(parts.message)[0].get(1, _Parts())
                return Port(name, kind, self._read_type("", inner.message, depth + 1).type, None)
            case "map":
                messages, numbers = self._members(parts.message)
                value_type = self._read_type("", messages.get(2, _Parts()).message, depth + 1).type
                return Port(name, kind, f"{_element(numbers.get(1, 0))},{value_type}", None)
            case _:
                return Port(name, kind, "", None)

    def _read_tensor_type(self, name: str, kind: str, message: Message, depth: int) -> Port:
        messages, numbers = self._members(message)
        element = _element(numbers.get(1, 0))
        if 2 not in messages:
            return Port(name, kind, element, None)
        shape: list[int | str | None] = []
        for number, wire, value in self._reader.fields(messages[2].message):
            if (number, wire) == (1, _BYTES):
                shape.append(self._read_dim((value,)))
                if len(shape) > _PARTS_MAX:
                    raise _Malformed(f"'{name[:40]}' has more than {_PARTS_MAX} dimensions")
        return Port(name, kind, element, tuple(shape))

    def _read_dim(self, message: Message) -> int | str | None:
        dim: int | str | None = None
        for number, wire, value in self._reader.fields(message):
            match number, wire:
                case 1, 0:
                    dim = _signed(value)
                case 2, 2:
                    dim = self._text(value) or None
        return dim

    def _members(self, message: Message) -> tuple[dict[int, _Parts], dict[int, int]]:
        """The first two fields of a message, as messages and as whole numbers."""
        messages: dict[int, _Parts] = {}
        numbers: dict[int, int] = {}
        for number, wire, value in self._reader.fields(message):
            if number <= 2 and wire == _BYTES:
                messages.setdefault(number, _Parts()).add(value)
            elif number <= 2 and wire == _VARINT:
                numbers[number] = value
        return messages, numbers

    def _text(self, span: Span) -> str:
        return self._reader.text(span).decode("utf-8", "replace")


class _Parts:
    """The parts of a message that should be there once; protobuf joins what comes in several."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span) -> None:
        if len(self._spans) >= _PARTS_MAX:
            raise _Malformed(f"a message comes in more than {_PARTS_MAX} parts")
        self._spans.append(span)

    @property
    def found(self) -> bool:
        return bool(self._spans)

    @property
    def message(self) -> Message:
        return tuple(self._spans)


def _check_depth(depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise _Malformed(f"it nests deeper than {_DEPTH_MAX} messages")


def _element(code: int) -> str:
    code = _int32(code)
    return _ELEMENTS[code][0] if code in _ELEMENTS else f"type {code}"


def _domain(text: str) -> str:
    return "" if text == "ai.onnx" else text
