"""The thread that keeps a worker's models as its repository, or whoever orders them, wants them: it watches, looks and
loads, and obeys lifecycle.py, which decides.

It talks with the worker's main thread by two queues, each with an eventfd that wakes the other side. What a model took
in memory is returned here, too, where nobody waits for it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from penstock.wire.messages import EXPLICIT, MAX_SENTENCE, NONE, WATCH, Loads, Unload, Wake
from penstock.wire.models import READY, UNAVAILABLE, ModelState
from penstock.wire.process import fields
from penstock.worker.config import CPU
from penstock.worker.content import content_digest
from penstock.worker.events import Discard, Followed, Loaded, Renewing, Rested, Routed, Tried, Unwanted
from penstock.worker.lifecycle import Declare, Lifecycle, Placed, Ticket, Used, Word
from penstock.worker.memory import give_back
from penstock.worker.model import LoadError, Model
from penstock.worker.probe import load_and_probe, unheeded
from penstock.worker.repository import Look, ModelFile, Repository, RepositoryError
from penstock.worker.store import Store, Weights
from penstock.worker.tester import Tester
from penstock.worker.watch import POLL_S, Changes, Watch

log = logging.getLogger("penstock.worker")

_AT_ONCE: Final = 32  # models that are asked for together, so that some are tried while others are loaded
_GATHER_S: Final = 0.05  # that changes are gathered before they are looked at; a copy makes many
_LOOKS_MAX: Final = 3  # until nothing that is new has to be watched
_BEGIN_MAX_S: Final = 10.0  # that the beginning waits for files to be still
_END_MAX_S: Final = 2.0  # that the end waits for a model that is being loaded
_FOREVER: Final = float("inf")

Event: TypeAlias = Loaded | Renewing | Tried | Unwanted | Rested | Routed | Followed


class Keeper:
    """``begin`` looks for the first time; ``start`` has the thread load what was found; ``take`` gives what there is to
    tell the worker's core once ``fileno`` is readable. ``settled``: all that was there at first is loaded, or cannot
    be."""

    def __init__(
        self,
        path: Path,
        tester: Tester,
        device: str = CPU,
        control: str = WATCH,
        links_out: bool = False,
        nbytes_max: int = 0,
    ) -> None:
        """``nbytes_max``: of models in memory; 0: no limit."""
        self.settled = False
        self._repository = Repository(path, device, links_out)
        self._watch = Watch(path, self._repository.is_file)
        self._lifecycle = Lifecycle(control, nbytes_max)
        self._used: Used = lambda key: 0.0
        self._tester = tester
        self._device = device
        self._store: Store | None = None
        self._loads: dict[str, str] = {}  # that have been ordered, with their configurations
        self._changes = Changes()  # that are yet to be looked at
        self._look_at = _FOREVER
        self._poll_at = _FOREVER
        self._told_reason = ""
        self._events: deque[Event] = deque()
        self._asks: deque[Unload | Loads | Wake | Discard] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # of the main thread
        self._asked = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # of this one
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._ended = False  # because of a defect

    # --- for the main thread ---

    def begin(self) -> list[ModelFile]:
        """Look for the first time. Returns what is to be loaded. Raises RepositoryError."""
        if self._lifecycle.control == WATCH:
            self._watch.start()
        look = self._look(None)
        if look.problem:
            raise RepositoryError(look.problem)
        return [file for found in look.models.values() for file in found.files]

    def start(self, store: Store | None, used: Used) -> None:
        """``used``: when a version was used last; called on the thread."""
        self._store, self._used = store, used
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake

    def take(self) -> list[Event]:
        """What has happened since the last call."""
        if self._ended:
            raise RuntimeError("the thread that keeps the models has ended; what ended it is said above")
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def has_news(self) -> bool:
        return bool(self._events) or self._ended

    def ask(self, what: Unload | Loads | Wake | Discard) -> None:
        """What the broker says of models; or models that nobody else holds any more, to be given up."""
        self._asks.append(what)
        os.eventfd_write(self._asked, 1)

    def stop(self) -> None:
        """Let the thread end. One that is loading a model is left behind; it is a daemon."""
        self._stopping = True
        os.eventfd_write(self._asked, 1)
        if self._thread is not None:
            self._thread.join(timeout=_END_MAX_S)
            if self._thread.is_alive():
                return
        self._watch.stop()
        os.close(self._asked)
        os.close(self._wake)

    # --- the thread ---

    def _run(self) -> None:
        try:
            began = time.monotonic()
            while not self._stopping:
                self._turn()
                now = time.monotonic()
                self._tell(self._lifecycle.make_room(now, self._used))
                files = self._lifecycle.next(now, _AT_ONCE)
                if files:
                    self._load_all(files)
                    continue
                if not self.settled and (self._lifecycle.settled or time.monotonic() - began > _BEGIN_MAX_S):
                    self.settled = True
                    os.eventfd_write(self._wake, 1)
                self._sleep(_FOREVER if self.settled else began + _BEGIN_MAX_S)
        finally:
            if not self._stopping:
                self._ended = True
                os.eventfd_write(self._wake, 1)

    def _turn(self) -> None:
        """Whatever has been asked for, or has changed by now."""
        while self._asks:
            self._obey(self._asks.popleft())
        now = time.monotonic()
        if self._watch.fileno() >= 0:
            self._gather(self._watch.take(), now)
        if now >= self._poll_at or now >= self._look_at:
            changes, self._changes, self._look_at = self._changes, Changes(), _FOREVER
            everything = changes.everything or now >= self._poll_at
            self._look(None if everything else frozenset(changes.models), changes.placed)
        if now >= self._lifecycle.due():
            self._look(self._lifecycle.restless(now))

    def _gather(self, changes: Changes, now: float) -> None:
        if not changes:
            return
        self._changes.everything |= changes.everything
        self._changes.models |= changes.models
        self._changes.placed |= changes.placed
        self._look_at = now if changes.placed else min(self._look_at, now + _GATHER_S)

    def _sleep(self, until: float) -> None:
        until = min(until, self._lifecycle.due(), self._look_at, self._poll_at)
        left = until - time.monotonic()
        poll = select.poll()
        poll.register(self._asked, select.POLLIN)
        if self._watch.fileno() >= 0:
            poll.register(self._watch.fileno(), select.POLLIN)
        for readable, _ in poll.poll(None if left == _FOREVER else max(0.0, left) * 1000 + 1):
            if readable == self._asked:
                os.eventfd_read(self._asked)

    def _obey(self, ask: Unload | Loads | Wake | Discard) -> None:
        match ask:
            case Unload(versions=versions):
                self._tell(self._lifecycle.unload([(each.name, each.version) for each in versions]))
            case Loads(epoch=epoch, serial=serial, loads=loads):
                self._loads = {load.name: load.config for load in loads}
                if self._lifecycle.control == NONE:
                    self._tell([Followed(epoch, serial)])
                else:
                    self._look(None, ticket=(epoch, serial))
            case Wake(model=model, version=version):
                self._tell(self._lifecycle.wake(model, version))
            case Discard(models):
                models.clear()
                give_back()

    # --- looking ---

    def _look(self, names: frozenset[str] | None, placed: Placed = (), ticket: Ticket | None = None) -> Look:
        """At some models, or all; and have what was looked at be watched."""
        look = self._look_once(names)
        if self._lifecycle.control == WATCH:
            for _ in range(_LOOKS_MAX):
                directories = [(each.name, path) for each in look.models.values() for path in each.directories]
                if not self._watch.follow(directories, look.names is None):
                    break
                look = self._look_once(look.names)
            self._poll_at = time.monotonic() + POLL_S if self._watch.polls else _FOREVER
            if self._watch.reason != self._told_reason:
                self._told_reason = self._watch.reason
                about = fields(reason=self._watch.reason, every_s=POLL_S)
                log.warning("the repository is looked at now and then, since nobody tells of changes", extra=about)
        words = self._lifecycle.looked(look, time.monotonic(), placed, ticket)
        for word in words:
            if isinstance(word, Declare) and word.state.state == UNAVAILABLE:
                _log_failure(word.state)
        self._tell(words)
        return look

    def _look_once(self, names: frozenset[str] | None) -> Look:
        loads = self._loads if self._lifecycle.control == EXPLICIT else None
        look = self._repository.look(names, loads, time.time_ns())
        if names is not None and not look.problem and not names <= look.models.keys():
            return self._repository.look(None, loads, time.time_ns())  # one is not there: is anything?
        return look

    # --- loading ---

    def _load_all(self, files: Sequence[ModelFile]) -> None:
        """Callers hear that answers are not to be cached long before any of these can give other ones: to try and load
        a model takes longer."""
        self._renew(files, True)
        self._try_all(files)
        self._renew(files, False)

    def _renew(self, files: Sequence[ModelFile], on: bool) -> None:
        self._events += [Renewing(file.name, file.version, on) for file in files]
        os.eventfd_write(self._wake, 1)

    def _try_all(self, files: Sequence[ModelFile]) -> None:
        for file, problem, store in self._tester.ahead(files, self._device, self._store):
            if self._stopping:
                return
            self._turn()
            if not self._lifecycle.begins(file):
                continue
            began = time.monotonic()
            state, model = load(file, store, self._device, problem)
            took = time.monotonic() - began
            self._events.append(Tried(file.name, file.version, model is not None, took))
            nbytes = 0 if model is None else file.nbytes + model.run_bytes
            self._tell(self._lifecycle.loaded(file, state, nbytes, time.monotonic(), took), model)
            if model is None:
                _log_failure(state)
            del model

    def _tell(self, words: Sequence[Word], model: Model | None = None) -> None:
        """``model``: what has just been loaded."""
        for word in words:
            self._events.append(
                Loaded(word.state, model if word.fresh else None) if isinstance(word, Declare) else word
            )
        if words:
            os.eventfd_write(self._wake, 1)


def load(file: ModelFile, store: Store | None, device: str, problem: str = "") -> tuple[ModelState, Model | None]:
    """A model and how it fares. ``problem``: of its trial, because of which it is not loaded."""
    start = time.monotonic()
    try:
        if problem:
            raise LoadError(problem)
        model = load_and_probe(file, store, device=device)
    except LoadError as error:
        # A path in it may hold what is not UTF-8.
        reason = str(error).encode("utf-8", "replace").decode()[:MAX_SENTENCE]
        return ModelState(file.name, file.version, UNAVAILABLE, reason, None), None
    log.info(
        "model loaded",
        extra=fields(
            model=file.name,
            version=file.version,
            batchable=model.spec.batchable,
            alone_because=model.why_alone,
            run_mb=round(model.run_bytes / 1e6, 1),
            **_describe(model.weights),
            seconds=round(time.monotonic() - start, 3),
        ),
    )
    if said := unheeded(file, model):
        # In one line, since of each kind only some a second are written.
        about = fields(model=file.name, version=file.version, reason=". ".join(said))
        log.warning("settings have no effect", extra=about)
    spec = model.spec._replace(build=content_digest(file)) if file.config.response_cache else model.spec
    return ModelState(file.name, file.version, READY, model.why_alone, spec), model


def _describe(weights: Weights | None) -> dict[str, object]:
    if weights is None:
        return {}
    return {"weights": "shared" if weights.shared else "private", "weights_mb": round(weights.nbytes / 1e6, 1)}


def _log_failure(state: ModelState) -> None:
    about = fields(model=state.name, version=state.version, reason=state.reason)
    log.error("model cannot be served", extra=about)
