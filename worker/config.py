"""``model.toml``: what a user may say about a model. Nothing has to be said: names, types and shapes are in the
model."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import msgspec.inspect

_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)")
_MAX_DELAY_S: Final = 60.0
MAX_BATCH_SIZE: Final = 4096  # rows

T = TypeVar("T")


class ConfigError(Exception):
    """A file that cannot be followed; the message names the file, the key and what is expected."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of a model.toml, with Triton's names. ``max_queue_delay``: text with a unit, such as "2ms"."""

    max_batch_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_SIZE)] | None = (
        None  # rows; None: DEFAULT_BATCH_SIZE
    )
    max_queue_delay: str = "0ms"
    instances: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # batches of this model that run at once
    intra_op_threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    intra_op_spinning: bool = False  # look for the next batch in a loop before they sleep

    @property
    def max_queue_delay_s(self) -> float:
        return parse_duration(self.max_queue_delay)


DEFAULT_BATCH_SIZE: Final = 32


def parse_duration(text: str) -> float:
    """ "2ms" -> 0.002 seconds. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, such as '500us', '2ms' or '1s'")
    return float(match[1]) * _UNITS_S[match[2]]


def load_config(path: Path) -> ModelConfig:
    """The configuration in a file, or the defaults where there is none. Raises ConfigError."""
    try:
        values = read_toml(path)
    except FileNotFoundError:
        return ModelConfig()
    config = convert(values, ModelConfig, str(path))
    try:
        if config.max_queue_delay_s > _MAX_DELAY_S:
            raise ValueError(f"{config.max_queue_delay!r} is longer than {_MAX_DELAY_S:.0f}s")
    except ValueError as error:
        raise ConfigError(f"{path}: key 'max_queue_delay': {error}") from None
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, and ConfigError for what is not TOML or cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ConfigError(f"{path}: {error}") from None


def convert(values: dict[str, Any], kind: type[T], where: str) -> T:
    """``values`` as a dataclass or Struct. Raises ConfigError naming ``where``, the key and what is expected."""
    known = [each.name for each in msgspec.inspect.type_info(kind).fields]  # type: ignore[attr-defined]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        raise ConfigError(f"{where}: key '{path.rstrip('`')}': {what}") from None
