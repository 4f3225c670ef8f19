"""Protobuf's text format, for configurations that were written for other servers.

What messages there are is a table, from which descriptors are made when a file is first read: no generated code, and
protobuf is imported by nobody who has no such file. Field numbers do not matter in text, so they are counted. All is
declared as of proto2: then a field that is set to its default differs from one that is not set.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.worker.config import ConfigError, read_file

_REASON_MAX: Final = 200  # characters of what protobuf says
_SCALARS: Final = {
    "double": 1,
    "float": 2,
    "int64": 3,
    "uint64": 4,
    "int32": 5,
    "bool": 8,
    "string": 9,
    "bytes": 12,
    "uint32": 13,
}
_MESSAGE, _ENUM = 11, 14
_OPTIONAL, _REPEATED = 1, 3
_TOKEN: Final = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<mark>[][{}<>:,;])|(?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<word>[^\s\#"'{}<>:,;\[\]]+)""",
    re.DOTALL,
)
_STEP: Final = re.compile(r"(\w+)(?:\[(\d+)\]|\[('.*')\])?(?:\.|$)")
_VALUE_PROBLEM: Final = re.compile(r"Couldn't parse|Value out of range|Enum type|Integer out|String ")
_UNKNOWN_FIELD: Final = re.compile(r'Message type "\w+\.(\w+)" has no field named "(.*)"', re.DOTALL)
_MAP: Final = re.compile(r"\{(\w+),(\w+)\}")


def read_text(path: Path) -> str:
    """Raises FileNotFoundError, and ConfigError for what is too large or cannot be read."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """Messages that there are. ``messages``: by name, their fields as ``name:type``, with a space between. A type is a
    scalar, a message or an enumeration; with ``*`` behind it is repeated, and ``{key,value}`` is a map. Of fields with
    ``|`` between them one at most is set. ``enums``: by name, their values, from 0."""

    package: str
    messages: Mapping[str, str]
    enums: Mapping[str, str]

    def parse(self, root: str, text: str, where: str, advice: str) -> Any:
        """The message ``root`` in a text. Raises ConfigError naming ``where`` and the line; ``advice``: what to do
        about fields that are not known."""
        from google.protobuf import text_format

        message = _classes(self)[root]()
        try:
            text_format.Parse(text, message)
        except text_format.ParseError as error:
            line, column = error.GetLine(), error.GetColumn()
            said = self._say(str(error), advice)
            if line is None:
                raise ConfigError(f"{where}: {said}") from None
            named = _field_before(text, line, column or 1) if _VALUE_PROBLEM.match(said) else ""
            raise ConfigError(f"{where}:{line}: {f'{named}: ' if named else ''}{said}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: it is no text format of protobuf: {_brief(str(error))}") from None
        return message

    def parse_json(self, root: str, text: str, where: str, advice: str) -> Any:
        """The same of protobuf's JSON."""
        from google.protobuf import json_format

        message = _classes(self)[root]()
        try:
            json_format.Parse(text, message)
        except (json_format.ParseError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: {self._say(str(error), advice)}") from None
        return message

    def _say(self, reason: str, advice: str) -> str:
        if match := _UNKNOWN_FIELD.search(reason):
            known = [field.partition(":")[0] for field in re.split(r"[ |]", self.messages.get(match[1], ""))]
            near = difflib.get_close_matches(match[2][:100], known, 1)
            hint = f"did you mean '{near[0]}'?" if near else advice
            return f"field '{_brief(match[2])}': unknown in {match[1]}; {hint}"
        place = re.match(r"(?:\d+:\d+ : )?(?:'.*': )?", reason, re.DOTALL)  # where it is, and the rest of that line
        return _brief(reason[place.end() :] if place else reason)


def _field_before(text: str, line: int, column: int) -> str:
    """The field whose value stands there, or ""."""
    rows = text.split("\n")
    match = re.search(r"(\w+)\s*:\s*(?:\[[^][{}]*)?$", rows[line - 1][: column - 1]) if line <= len(rows) else None
    return match[1] if match else ""


class Field(NamedTuple):
    """A field of a text. ``text``: a value that is no message; ``fields``: of one that is."""

    name: str
    line: int
    text: str
    fields: list[Field]


def find_line(text: str, path: str) -> int | None:
    """The line of a field in a text that protobuf has accepted, such as ``instance_group[1].count``, or
    ``parameters['x']`` of a map; of the message that it is missing in where it is not there. None: of the whole
    file."""
    try:
        fields = list(_fields(_tokens(text), ""))
    except (IndexError, StopIteration, RuntimeError, RecursionError):  # what this reads otherwise than protobuf
        return None
    line = None
    for name, index, key in _STEP.findall(path):
        found = [each for each in fields if each.name == name]
        if key:
            found = [each for each in found if any(_is_key(inner, key) for inner in each.fields)]
        if int(index or 0) >= len(found):
            break
        line, fields = found[int(index or 0)].line, found[int(index or 0)].fields
    return line


def _is_key(field: Field, key: str) -> bool:
    return field.name == "key" and field.text[1:-1] == key[1:-1]


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Each with its line; at the end an empty one."""
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise IndexError(at)
        if match.lastgroup != "skip":
            yield match[0], line
        line += match[0].count("\n")
        at = match.end()
    yield "", line


def _fields(tokens: Iterator[tuple[str, int]], end: str) -> Iterator[Field]:
    """Up to the token that ends the message."""
    name, line = next(tokens)
    while name not in (end, ""):
        if name in ",;":
            name, line = next(tokens)
            continue
        token, _ = next(tokens)
        if token == ":":
            token, _ = next(tokens)
        if token in ("{", "<"):
            yield Field(name, line, "", list(_fields(tokens, "}" if token == "{" else ">")))
            name, line = next(tokens)
        elif token == "[":
            yield from _elements(tokens, name)
            name, line = next(tokens)
        else:
            value = token
            while (following := next(tokens))[0][:1] in ("'", '"'):
                value += following[0]
            yield Field(name, line, value, [])
            name, line = following


def _elements(tokens: Iterator[tuple[str, int]], name: str) -> Iterator[Field]:
    """Of a list, each as a field of its own."""
    for token, line in tokens:
        if token in ("]", ""):
            return
        if token in ("{", "<"):
            yield Field(name, line, "", list(_fields(tokens, "}" if token == "{" else ">")))
        elif token != ",":  # texts side by side are one, but no list of texts is asked for here
            yield Field(name, line, token, [])


def _brief(text: str) -> str:
    shown = "".join(each if each.isprintable() else "?" for each in text[: _REASON_MAX + 1])
    return f"{shown[:_REASON_MAX]}..." if len(shown) > _REASON_MAX else shown


@functools.cache
def _classes(schema: Schema) -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{schema.package}.proto", package=schema.package, syntax="proto2")
    for name, values in schema.enums.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in schema.messages.items():
        message = file.message_type.add(name=name)
        for token in fields.split():
            choices = token.split("|")
            for choice in choices:
                field = _add_field(schema, message, *choice.split(":"))
                if len(choices) > 1:
                    field.oneof_index = len(message.oneof_decl)
            if len(choices) > 1:
                message.oneof_decl.add(name=f"choice_{len(message.oneof_decl)}")
    # A pool of its own: other libraries of this process may have registered the same names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{schema.package}.{name}"))
        for name in schema.messages
    }


def _add_field(schema: Schema, message: Any, name: str, kind: str) -> Any:
    field = message.field.add(name=name, number=len(message.field) + 1, label=_OPTIONAL)
    if match := _MAP.fullmatch(kind):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(schema, entry, "key", match[1])
        _add_field(schema, entry, "value", match[2])
        field.label, field.type = _REPEATED, _MESSAGE
        field.type_name = f".{schema.package}.{message.name}.{entry.name}"
        return field
    if kind.endswith("*"):
        kind, field.label = kind[:-1], _REPEATED
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _MESSAGE if kind in schema.messages else _ENUM
        field.type_name = f".{schema.package}.{kind}"
    return field
