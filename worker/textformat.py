"""Protobuf's text format, for configurations that were written for other servers.

What messages there are is a table, from which descriptors are made when a file is first read: no generated code, and
protobuf is imported by nobody who has no such file. Field numbers do not matter in text, so they are counted. All is
declared as of proto2: then a field that is set to its default differs from one that is not set.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from penstock.worker.config import ConfigError

FILE_BYTES_MAX: Final = 1 << 20
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
_UNKNOWN_FIELD: Final = re.compile(r'Message type "\w+\.(\w+)" has no field named "(.*)"', re.DOTALL)
_MAP: Final = re.compile(r"\{(\w+),(\w+)\}")


def read_text(path: Path) -> str:
    """Raises FileNotFoundError, and ConfigError for what is too large or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise ConfigError(f"{path}: it has more than {FILE_BYTES_MAX} bytes, so it is no configuration; replace it")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
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
            line = f":{error.GetLine()}" if error.GetLine() is not None else ""
            raise ConfigError(f"{where}{line}: {self._say(str(error), advice)}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: it is no text format of protobuf: {_brief(str(error))}") from None
        return message

    def _say(self, reason: str, advice: str) -> str:
        if match := _UNKNOWN_FIELD.search(reason):
            known = [field.partition(":")[0] for field in re.split(r"[ |]", self.messages.get(match[1], ""))]
            near = difflib.get_close_matches(match[2][:100], known, 1)
            hint = f"did you mean '{near[0]}'?" if near else advice
            return f"unknown field '{_brief(match[2])}' of {match[1]}; {hint}"
        place = re.match(r"(?:\d+:\d+ : )?(?:'.*': )?", reason, re.DOTALL)  # where it is, and the rest of that line
        return _brief(reason[place.end() :] if place else reason)


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
