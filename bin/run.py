"""Running one process: start, serve, stop, and a sentence instead of a traceback for what its user can mend."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from penstock.bin import logs
from penstock.bin.options import end_with
from penstock.wire.endpoints import EndpointError
from penstock.wire.process import EXIT_DEFECT, fields, raise_descriptor_limit

log = logging.getLogger("penstock")


class Process(Protocol):
    def start(self) -> None: ...
    def serve(self) -> Any: ...
    def stop(self) -> None: ...


P = TypeVar("P", bound=Process)


def run(role: str, log_format: str, log_level: str, parent: int, make: Callable[[], P]) -> tuple[P, Any]:
    """Set up logging, run a process to its end, and return it with what ``serve`` returned. Exits 1 when it cannot
    start."""
    logs.set_up(role, log_format, log_level)
    end_with(parent)
    threading.excepthook = _die
    raise_descriptor_limit()
    process = make()
    try:
        process.start()
        # What has been imported lives as long as the process: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        return process, process.serve()
    except EndpointError as error:
        log.error("cannot start", extra=fields(reason=str(error)))
        sys.exit(1)
    finally:
        process.stop()


def _die(hook: threading.ExceptHookArgs) -> None:
    """A thread that ends by an exception would leave a process that only looks alive: end it, and be started anew."""
    log.critical("thread failed", exc_info=hook.exc_value, extra=fields(thread=hook.thread and hook.thread.name))
    os._exit(EXIT_DEFECT)
