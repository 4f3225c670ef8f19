"""A model.toml: what one has to say to mean a configuration, and changes to one that keep all else in it: comments,
order, spaces."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from penstock.worker.config import ModelConfig

_VALUE: Final = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s#"']+)"""


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
        case tuple():
            return f"[{', '.join(map(_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{key} = {_value(each)}' for key, each in value.items())}}}"
    return f'"{value}"'  # no text in a configuration has what would have to be escaped


def edit(text: str, values: Mapping[str, int | str]) -> str:
    """TOML with these top-level keys set: in the line where each stands, or in new lines behind the others. Raises
    EditError when that does not come out as it should, and nothing else is tried then."""
    before = _parse(text)
    for key, value in values.items():
        written = f'"{value}"' if isinstance(value, str) else str(value)
        line = re.compile(
            rf"""^([ \t]*(["']?){re.escape(key)}\2[ \t]*=[ \t]*){_VALUE}(?=[ \t]*(?:#.*)?\r?$)""", re.MULTILINE
        )
        head, tables = _before_tables(text)
        if line.search(head):
            head = line.sub(lambda match, written=written: match[1] + written, head, count=1)  # type: ignore[misc]
        else:
            end = "\r\n" if "\r\n" in text else "\n"
            gap = "" if not head or head.endswith("\n") else end
            head = f"{head}{gap}{key} = {written}{end}"
        text = head + tables
    if _parse(text) != before | dict(values):
        raise EditError(f"it is not written in the way that lines can be changed in; set {dict(values)} by hand")
    return text


def _parse(text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EditError(f"it is no TOML: {error}") from None


def _before_tables(text: str) -> tuple[str, str]:
    """What comes before the first table, and the rest."""
    match = re.search(r"^[ \t]*\[", text, re.MULTILINE)
    return (text[: match.start()], text[match.start() :]) if match else (text, "")
