"""The benchmark of an idle server counts what processes use."""

from __future__ import annotations

import os
import threading
import time

import pytest

from bench import idle


def test_the_time_of_all_threads_is_counted() -> None:
    """Also of one that is not the process's first."""
    used = threading.Event()
    end = threading.Event()

    def work() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        used.set()
        end.wait(30)

    before = idle.cpu_ns(os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    assert used.wait(30)
    assert idle.cpu_ns(os.getpid()) - before >= 0.045e9
    end.set()
    thread.join()


def test_percents_are_of_one_core() -> None:
    assert idle.percents({"a": 1_000, "b": 0}, {"a": 1_000, "b": 500_000_000}, 2.0) == {
        "a": 0.0,
        "b": pytest.approx(25),
    }
