"""A model.toml: what one has to say to mean a configuration, and changes to one that keep all else in it: comments,
order, spaces."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from penstock.worker.tomllines import Statement, statements_of

if TYPE_CHECKING:
    from penstock.worker.config import ModelConfig

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")

Value: TypeAlias = int | float | str | Sequence[int | str] | Mapping[str, int]
Change: TypeAlias = tuple[int, int, str]


class EditError(Exception):
    """A file that cannot be changed line by line; the message is a sentence."""


def to_toml(config: ModelConfig) -> str:
    """A model.toml that means this configuration: what is not the default, a line each."""
    plain = type(config)()
    keys = [key for key in config.__struct_fields__ if getattr(config, key) != getattr(plain, key)]
    return "".join(f"{key} = {_value(getattr(config, key))}\n" for key in keys)


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(map(_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{_key(key)} = {_value(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def edit(text: str, values: Mapping[str, Value | None]) -> str:
    """TOML with these top-level keys set, each where it stands, or in a new line behind the others; None: it is taken
    out. A table that has lines of its own keeps them. Raises EditError when that does not come out as it should, and
    nothing else is tried then."""
    wanted = _parse(text) | {
        key: _parse(f"x = {_value(each)}")["x"] for key, each in values.items() if each is not None
    }
    for key in values:
        if values[key] is None:
            wanted.pop(key, None)
    try:
        for key, value in values.items():
            text = _set(text, key, value)
        right = _parse(text) == wanted
    except (EditError, ValueError):
        right = False
    if not right:
        raise EditError(f"it is not written in the way that lines can be changed in; set {dict(values)} by hand")
    return text


def _set(text: str, key: str, value: Value | None) -> str:
    there = [each for each in statements_of(text) if each.path[0] == key]
    if value is None:
        return _change(text, [_line(text, each) for each in there])
    if not there:
        heads = [each.begin for each in statements_of(text) if each.value < 0]
        at = text.rfind("\n", 0, heads[0]) + 1 if heads else len(text)
        return _change(text, [(at, at, _lines(text, at, [f"{key} = {_value(value)}"]))])
    if there[0].path == (key,) and there[0].value >= 0:
        return _change(text, [(there[0].value, there[0].end, _value(value))])
    if value == {}:
        return _set(_set(text, key, None), key, value)
    return _set_table(text, key, value, there) if isinstance(value, Mapping) else text


def _set_table(text: str, key: str, value: Mapping[str, Value], there: Sequence[Statement]) -> str:
    """A table with a line for each of its keys, below a head or with dots."""
    if not text.endswith("\n"):
        text += "\r\n" if "\r\n" in text else "\n"
    changes, known = [], set()
    for each in there:
        if each.value >= 0:
            known.add(each.path[1])
            new = value.get(str(each.path[1]))
            changes.append(_line(text, each) if new is None else (each.value, each.end, _value(new)))
    start = "" if there[0].value < 0 else f"{key}."
    added = [f"{start}{_key(name)} = {_value(new)}" for name, new in value.items() if name not in known]
    at = _line(text, there[-1])[1]
    return _change(text, [*changes, (at, at, _lines(text, at, added))])


def _line(text: str, statement: Statement) -> Change:
    """All of its lines, to be taken out."""
    end = text.find("\n", statement.end)
    return text.rfind("\n", 0, statement.begin) + 1, len(text) if end < 0 else end + 1, ""


def _lines(text: str, at: int, lines: Sequence[str]) -> str:
    """Lines as they are put into a text there."""
    end = "\r\n" if "\r\n" in text else "\n"
    gap = end if lines and at and text[at - 1] != "\n" else ""
    return gap + "".join(f"{line}{end}" for line in lines)


def _change(text: str, changes: Sequence[Change]) -> str:
    """``changes``: in their order, from where to where, and what comes there."""
    for begin, end, new in reversed(changes):
        text = text[:begin] + new + text[end:]
    return text


def _parse(text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EditError(f"it is no TOML: {error}") from None
