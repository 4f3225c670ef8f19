"""Gateways' connections on a real loop."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.gateway.connection import Application
from penstock.gateway.options import GatewayOptions
from penstock.wire.arena import Arena
from penstock.wire.slots import Slots
from tests.gateway.serving import Echo, Loop, Serving


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def slots() -> Iterator[Slots]:
    """Of an arena of 1 MiB; all are given back in the end."""
    slots = Slots(Arena(1 << 20, "test"))
    yield slots
    assert (slots.arena.allocator.used, slots.waiting) == (0, 0), "a slot was not given back"
    slots.close()


@pytest.fixture
def serve(loop: Loop) -> Iterator[Callable[..., Serving]]:
    """``serve(application, **limits)``"""
    servings: list[Serving] = []

    def start(
        application: Application, tls: ssl.SSLContext | None = None, slots: Slots | None = None, **limits: Any
    ) -> Serving:
        servings.append(Serving(loop, application, GatewayOptions(**limits), tls, slots))
        return servings[-1]

    yield start
    for serving in servings:
        serving.close()
