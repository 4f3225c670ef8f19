"""Who lets others in while descriptors run out."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Iterator

import pytest

from penstock.wire.doors import Doors


class Door:
    def __init__(self) -> None:
        self.open = True

    def pause(self) -> None:
        self.open = False

    def resume(self) -> None:
        self.open = True


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_all_doors_are_shut_while_there_are_no_descriptors_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "penstock")
    doors, several = Doors(), [Door(), Door()]
    for door in several:
        doors.add(door)
    assert doors.look()
    with no_descriptors():
        assert [doors.look(), doors.look()] == [False, False]
        assert [door.open for door in several] == [False, False]
    assert [doors.look(), doors.look()] == [True, True]
    assert [door.open for door in several] == [True, True]
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "descriptors run out",
        "there are descriptors again",
    ]


def test_one_that_has_shut_itself_is_opened_by_the_next_look() -> None:
    doors, door = Doors(), Door()
    doors.add(door)
    door.pause()
    assert doors.look()
    assert door.open
