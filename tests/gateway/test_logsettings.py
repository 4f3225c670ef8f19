"""Which lines are logged: by level, one by one, and in all gateways."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from penstock.gateway.common import Common
from penstock.gateway.logsettings import LogSettings
from tests.gateway.serving import Loop
from tests.gateway.test_application import Desk

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class Gateway:
    def __init__(self, loop: Loop, runtime: Path, level: int = logging.INFO) -> None:
        self.lines: list[str] = []
        self.root = logging.getLogger(f"root of test {uuid4()}")
        self.root.setLevel(level)
        self.root.propagate = False
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.root.addHandler(handler)
        self.desk = Desk(loop)
        self.settings = LogSettings(self.desk.application, Common(runtime), self.root)
        self.desk.application.add(self.settings.routes)

    def set(self, **settings: Any) -> dict[str, Any]:
        answer = self.desk.ask("POST", "/v2/logging", json.dumps(settings).encode())
        assert answer.status == 200, answer.error
        told: dict[str, Any] = json.loads(answer.body)
        assert json.loads(self.desk.ask("GET", "/v2/logging").body) == told
        return told

    def said(self) -> list[str]:
        self.lines.clear()
        for name, level in LEVELS.items():
            self.root.log(level, name)
        return self.lines


@pytest.fixture(autouse=True)
def pytests_own() -> Iterator[None]:
    """Its handlers, which it gives to logs that end at themselves, too, are for all tests."""
    handlers = logging.getLogger().handlers
    before = [(handler, list(handler.filters)) for handler in handlers]
    yield
    for handler, filters in before:
        handler.filters[:] = filters


@pytest.fixture
def pair(loop: Loop, tmp_path: Path) -> tuple[Gateway, Gateway]:
    return Gateway(loop, tmp_path), Gateway(loop, tmp_path)


def test_each_level_by_itself(pair: tuple[Gateway, Gateway]) -> None:
    gateway, _ = pair
    assert gateway.said() == ["info", "warning", "error", "critical"]
    assert gateway.set(log_warning=False)["log_warning"] is False
    assert gateway.said() == ["info", "error", "critical"]
    gateway.set(log_info=False, log_error=False)
    assert gateway.said() == ["critical"]
    gateway.set(log_verbose_level=1)
    assert gateway.said() == ["debug", "critical"]
    gateway.set(log_verbose_level=0, log_info=True, log_warning=True, log_error=True)
    assert gateway.said() == ["info", "warning", "error", "critical"]


def test_others_follow_when_they_look(pair: tuple[Gateway, Gateway]) -> None:
    one, other = pair
    one.set(log_info=False)
    assert other.said() == ["info", "warning", "error", "critical"]
    other.settings.look()
    assert other.said() == ["warning", "error", "critical"]


def test_they_begin_as_the_server_was_started(loop: Loop, tmp_path: Path) -> None:
    gateway = Gateway(loop, tmp_path, logging.WARNING)
    told = gateway.set()
    assert (told["log_info"], told["log_warning"], told["log_verbose_level"]) == (False, True, 0)
    assert gateway.said() == ["warning", "error", "critical"]
    assert Gateway(loop, tmp_path, logging.DEBUG).set()["log_verbose_level"] == 1


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"log_info": "yes"}', b'{"log_verbose_level": 1.5}', b'{"x": 1}'])
def test_what_makes_no_sense_changes_nothing(pair: tuple[Gateway, Gateway], body: bytes) -> None:
    gateway, _ = pair
    assert gateway.desk.ask("POST", "/v2/logging", body).status == 400
    assert gateway.said() == ["info", "warning", "error", "critical"]


def test_a_log_is_not_touched_until_something_is_set(loop: Loop, tmp_path: Path) -> None:
    gateway = Gateway(loop, tmp_path)
    gateway.root.setLevel(logging.ERROR)
    gateway.settings.look()
    assert gateway.said() == ["error", "critical"]
    assert gateway.root.handlers[0].filters == []
