"""Triton's trace extension: which requests are traced, while the server runs.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_trace.md has it. Where ``tracing``
is on (tracing.py), every request has its spans; these settings say of which models, of how many requests one, and how
many more. A model's own settings go before those of all. They hold for all gateways of the server, and a count for all
of them together: each trace adds a byte to a file in the runtime directory, and where that byte is says how many there
were. Where spans go, OpenTelemetry's own variables say.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import orjson

from penstock.gateway.about import OBJECT, SERVER, About, json
from penstock.gateway.application import Application
from penstock.gateway.common import Common, Section
from penstock.gateway.connection import Exchange
from penstock.gateway.routes import Route
from penstock.gateway.target import Handler, Target
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.tensors import Buffer

EXTENSION: Final = "trace"
_TELL: Final = About("Which requests are traced", SERVER, json(OBJECT), errors=(404,))
_SET: Final = About("Have other requests traced", SERVER, json(OBJECT), json(OBJECT), errors=(400, 404, 503))
COUNT_GLOB: Final = "trace-*.count"  # files of counts, in the runtime directory
_SECTION: Final = "trace"
_LEVEL, _RATE, _COUNT = "trace_level", "trace_rate", "trace_count"
_OFF, _ON = ["OFF"], ["TIMESTAMPS"]
_NUMBERS: Final = {_RATE: 1, _COUNT: -1}  # the least that each can be
_NUMBER_MAX: Final = (1 << 31) - 1
_FIXED: Final = {
    "trace_file": ("", "spans go where OTEL_EXPORTER_OTLP_ENDPOINT says, and to no file"),
    "log_frequency": ("0", "spans are sent as they come, and written to no file"),
    "trace_mode": ("opentelemetry", "that is the only one"),
}
_COUNTER: Final = "counter"  # beside a count: the name of its file


def read_change(body: Buffer, enabled: bool) -> Section:
    """What a request wants to be otherwise, None for what is to be as if nothing had been said. Raises PenstockError
    naming the setting. ``enabled``: spans can be made."""
    try:
        wanted: Any = orjson.loads(body) if len(body) else {}
    except orjson.JSONDecodeError as error:
        raise PenstockError(BAD_INPUT, f"the request is not JSON: {error}") from None
    if type(wanted) is not dict:
        raise PenstockError(BAD_INPUT, "the request is a JSON object with trace settings")
    changes: Section = {}
    for key, value in wanted.items():
        if key in _FIXED:
            only, why = _FIXED[key]
            if value is not None and str(value) != only:
                raise PenstockError(BAD_INPUT, f"'{key}' cannot be changed: {why}")
        elif key == _LEVEL:
            changes[key] = None if value is None else _level(value, enabled)
        elif key in _NUMBERS:
            changes[key] = None if value is None else _number(key, value)
        else:
            known = ", ".join([_LEVEL, *_NUMBERS, *_FIXED])
            raise PenstockError(BAD_INPUT, f"unknown trace setting '{key[:80]}'; there are {known}")
    return changes


def _level(value: Any, enabled: bool) -> list[str]:
    levels = [value] if type(value) is str else value
    if type(levels) is not list or not levels or any(each not in ("OFF", "TIMESTAMPS", "TENSORS") for each in levels):
        raise PenstockError(BAD_INPUT, f"'{_LEVEL}' is a list of OFF or TIMESTAMPS")
    if "TENSORS" in levels:
        raise PenstockError(BAD_INPUT, f"'{_LEVEL}' cannot be TENSORS: traces have times, and no tensors")
    if levels == _OFF:
        return _OFF
    if "OFF" in levels:
        raise PenstockError(BAD_INPUT, f"'{_LEVEL}' is OFF, or others")
    if not enabled:
        raise PenstockError(
            BAD_INPUT, f"'{_LEVEL}' cannot be TIMESTAMPS: set tracing = true in [gateway] of the configuration"
        )
    return _ON


def _number(key: str, value: Any) -> int:
    number = int(value) if type(value) is str and value.removeprefix("-").isdecimal() and len(value) < 12 else value
    if type(number) is not int or not _NUMBERS[key] <= number <= _NUMBER_MAX:
        raise PenstockError(BAD_INPUT, f"'{key}' is a whole number from {_NUMBERS[key]} to {_NUMBER_MAX}")
    return number


class TraceSettings:
    """``routes``: for the application to answer. ``enabled``: spans can be made; ``runtime``: the directory, if
    there is one."""

    def __init__(self, application: Application, common: Common, runtime: Path | None, enabled: bool) -> None:
        self._application = application
        self._common = common
        self._runtime = runtime
        self._enabled = enabled
        self._seen: dict[str, int] = {}  # requests since the last that was traced, by model, "" for all
        self._counters: dict[str, _Counter] = {}
        self.routes: list[Route[Handler]] = []
        for path in ("/v2/trace/setting", "/v2/models/{model}/trace/setting"):
            self.routes += [Route("GET", path, self._tell, about=_TELL), Route("POST", path, self._set, about=_SET)]

    def _tell(self, exchange: Exchange, target: Target) -> None:
        if target.model:
            self._application.current(target)  # says where there is none
        settings = self._settings(target.model)
        counter = settings.pop(_COUNTER, "")
        count = settings[_COUNT] if settings[_COUNT] < 0 else max(0, settings[_COUNT] - self._counter(counter).used())
        self._application.answer_json(
            exchange,
            {
                "trace_file": "",
                _LEVEL: settings[_LEVEL],
                _RATE: str(settings[_RATE]),
                _COUNT: str(count),
                "log_frequency": "0",
                "trace_mode": "opentelemetry",
            },
        )

    def _set(self, exchange: Exchange, target: Target) -> None:
        if target.model:
            self._application.current(target)
        self._application.read_body(exchange, target, partial(self._change))

    def _change(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        wanted = read_change(body, self._enabled)

        def change(section: Section) -> None:
            own = section.setdefault(target.model, {})
            own.update(wanted)
            if _COUNT in wanted:  # it begins anew
                if old := own.pop(_COUNTER, ""):
                    self._counter(old).remove()
                if wanted[_COUNT] is not None and wanted[_COUNT] >= 0:
                    own[_COUNTER] = uuid4().hex
            section[target.model] = {key: value for key, value in own.items() if value is not None}

        self._common.change(_SECTION, change)
        self._tell(exchange, target)

    def _settings(self, model: str) -> Section:
        """In force for a model, "" for those without their own."""
        section = self._common.read(_SECTION)
        settings: Section = {_LEVEL: _ON if self._enabled else _OFF, _RATE: 1, _COUNT: -1}
        for name in dict.fromkeys(("", model)):
            own = section.get(name, {})
            if _COUNT in own:
                settings.pop(_COUNTER, None)
            settings |= own
        return settings

    def wants(self, model: str) -> bool:
        """Whether a request that has ended is to be traced; counts it."""
        section = self._common.read(_SECTION)
        if not section:
            return True
        settings = self._settings(model)
        if settings[_LEVEL] == _OFF:
            return False
        scope = model if _RATE in section.get(model, {}) else ""
        seen = self._seen.get(scope, 0) + 1
        if seen < settings[_RATE]:
            self._seen[scope] = seen
            return False
        self._seen[scope] = 0
        return settings[_COUNT] < 0 or self._counter(settings[_COUNTER]).take(settings[_COUNT])

    def _counter(self, name: str) -> _Counter:
        counter = self._counters.get(name)
        if counter is None:
            if len(self._counters) > len(self._common.read(_SECTION)) + 1:
                self._counters.clear()  # of settings that are no more
            path = None if self._runtime is None or not name else self._runtime / COUNT_GLOB.replace("*", name)
            counter = self._counters[name] = _Counter(path)
        return counter


class _Counter:
    """How many traces there were, in all gateways: a file with a byte for each; in memory where there is no path."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._used = 0

    def used(self) -> int:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._used = os.stat(self._path).st_size
        return self._used

    def take(self, most: int) -> bool:
        """Count one, if there may be one more."""
        if self.used() >= most:
            return False
        if self._path is None:
            self._used += 1
            return True
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, b".")
                return os.lseek(fd, 0, os.SEEK_CUR) <= most  # behind the byte, wherever others were meanwhile
            finally:
                os.close(fd)
        except OSError:
            return False

    def remove(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
