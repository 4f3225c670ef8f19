"""Triton's logging extension: which lines this server's gateways write, while they run.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_logging.md has it. What is changed
holds for all gateways of the server, at once for the one that is asked and for the others with their next beat, within
two seconds; broker and workers go on as they were started (``--log-level``).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final

import orjson

from penstock.gateway.about import OBJECT, SERVER, About, json
from penstock.gateway.application import Application
from penstock.gateway.common import Common, Section
from penstock.gateway.connection import Exchange
from penstock.gateway.routes import Route
from penstock.gateway.target import Handler, Target
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.tensors import Buffer

EXTENSION: Final = "logging"
_TELL: Final = About("Which lines the gateways write", SERVER, json(OBJECT))
_SET: Final = About("Have the gateways write other lines", SERVER, json(OBJECT), json(OBJECT), errors=(400, 503))
_SECTION: Final = "logging"
_LEVELS: Final = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_FIXED: Final = {
    "log_file": ("", "lines go to standard error; have whoever starts the server put them elsewhere"),
    "log_format": ("default", "the form of lines is chosen when the server starts, with --log-format"),
}
_VERBOSE: Final = "log_verbose_level"
_VERBOSE_MAX: Final = 1000


def read_change(body: Buffer) -> Section:
    """What a request wants to be otherwise. Raises PenstockError naming the setting."""
    try:
        wanted: Any = orjson.loads(body) if len(body) else {}
    except orjson.JSONDecodeError as error:
        raise PenstockError(BAD_INPUT, f"the request is not JSON: {error}") from None
    if type(wanted) is not dict:
        raise PenstockError(BAD_INPUT, "the request is a JSON object with log settings")
    for key, value in wanted.items():
        if key in _LEVELS:
            if type(value) is not bool:
                raise PenstockError(BAD_INPUT, f"'{key}' is true or false")
        elif key == _VERBOSE:
            if type(value) is not int or not 0 <= value <= _VERBOSE_MAX:
                raise PenstockError(
                    BAD_INPUT, f"'{key}' is a whole number from 0 to {_VERBOSE_MAX}; from 1 on all is said"
                )
        elif key in _FIXED:
            only, why = _FIXED[key]
            if value != only:
                raise PenstockError(BAD_INPUT, f"'{key}' cannot be changed while the server runs: {why}")
        else:
            known = ", ".join([*_LEVELS, _VERBOSE, *_FIXED])
            raise PenstockError(BAD_INPUT, f"unknown log setting '{key[:80]}'; there are {known}")
    return {key: value for key, value in wanted.items() if key not in _FIXED}


class LogSettings:
    """``routes``: for the application to answer. ``look``: whether others have changed something, now and then."""

    def __init__(self, application: Application, common: Common, root: logging.Logger | None = None) -> None:
        self._application = application
        self._common = common
        self._root = root or logging.getLogger()
        self._begun = self._root.getEffectiveLevel()  # as it was started
        self._followed: Section = {}
        self.routes: list[Route[Handler]] = [
            Route("GET", "/v2/logging", self._tell, about=_TELL),
            Route("POST", "/v2/logging", self._set, about=_SET),
        ]
        self.look()

    def _tell(self, exchange: Exchange, target: Target) -> None:
        self.look()
        self._application.answer_json(exchange, self._settings(self._followed))

    def _set(self, exchange: Exchange, target: Target) -> None:
        self._application.read_body(exchange, target, partial(self._change))

    def _change(self, exchange: Exchange, target: Target, body: Buffer) -> None:
        wanted = read_change(body)
        self._common.change(_SECTION, lambda section: section.update(wanted))
        self._tell(exchange, target)

    def _settings(self, section: Section) -> dict[str, Any]:
        levels = {key: self._begun <= level for key, level in _LEVELS.items()}
        verbose = int(self._begun <= logging.DEBUG)
        return {
            "log_file": "",
            **{key: bool(section.get(key, said)) for key, said in levels.items()},
            _VERBOSE: section.get(_VERBOSE, verbose),
            "log_format": "default",
        }

    def look(self) -> None:
        """Follow what is set now. As long as nothing is, nobody's log is touched."""
        section = self._common.read(_SECTION)
        if section is self._followed or not (section or self._followed):
            return
        self._followed = section
        for handler in self._root.handlers:
            for each in [each for each in handler.filters if isinstance(each, _Only)]:
                handler.removeFilter(each)
        if not section:
            self._root.setLevel(self._begun)
            return
        settings = self._settings(section)
        wanted = {level for key, level in _LEVELS.items() if settings[key]}
        if settings[_VERBOSE]:
            wanted.add(logging.DEBUG)
        for handler in self._root.handlers:
            handler.addFilter(_Only(frozenset(wanted)))
        self._root.setLevel(min(wanted, default=logging.CRITICAL))


class _Only(logging.Filter):
    """Lines of some levels, and what is worse than an error."""

    def __init__(self, levels: frozenset[int]) -> None:
        super().__init__()
        self._levels = levels

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno in self._levels or record.levelno > logging.ERROR
