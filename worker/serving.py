"""The models that a worker has in memory: what it knows of each, and what it has told the broker of them. Pure.

The broker hears all of them in the worker's hello, and from then on what has changed: at once when little does, and ten
times a second when many models are loaded one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.wire.messages import (
    BATCH_REASONS,
    WATCH,
    Cost,
    Costs,
    Message,
    Version,
    WorkerHello,
    WorkerModels,
)
from penstock.wire.metrics import Meters, Value, size_label
from penstock.wire.models import IDLE, READY, SERVED, UNAVAILABLE, Load, ModelState, Route
from penstock.worker.batcher import Batch, Batcher, Line, ModelKey, Rules
from penstock.worker.costs import Curve, batch_sizes
from penstock.worker.events import Followed, Loaded, Tried
from penstock.worker.execute import Executed
from penstock.worker.model import Model
from penstock.worker.options import MAX_COMPUTE_S

_TELL_S: Final = 0.1  # between two times that the broker is told what has changed of models
_COSTS_S: Final = 0.1  # and of what batches take
_COMPUTE_TIMES: Final = 10  # what a batch is expected to take: it may take so much longer
_ROWS_TOLD: Final = 0.1  # of the size that batches are picked to have: a larger change is told


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a worker is. ``instances``: compute threads; ``control``: one of CONTROLS; ``repository``: where its models
    lie, if that is on the broker's host."""

    id: bytes
    name: str
    device: str
    pid: int
    endpoints: tuple[str, ...]
    instances: int
    local: bool  # on the broker's host
    control: str = WATCH
    repository: str = ""


class _Series:
    """A model's metrics, found once."""

    def __init__(self, meters: Meters, key: ModelKey) -> None:
        self.queue_seconds = meters.histogram("penstock_queue_seconds", *key)
        self.request_seconds = meters.histogram("penstock_request_seconds", *key)
        self.compute_seconds = meters.histogram("penstock_compute_seconds", *key)
        self.batch_rows = meters.histogram("penstock_batch_rows", *key)
        self.sizes: dict[int, tuple[Value, ...]] = {}
        self.input_seconds = meters.value("penstock_input_seconds", *key)
        self.model_seconds = meters.value("penstock_model_seconds", *key)
        self.last = meters.value("penstock_last_batch_seconds", *key)
        self.batches = {reason: meters.value("penstock_batches", *key, reason) for reason in BATCH_REASONS}


def _size_of(meters: Meters, key: ModelKey, rows: int) -> tuple[Value, ...]:
    names = "batches", "input_seconds", "model_seconds", "output_seconds"
    return tuple([meters.value(f"penstock_size_{name}", *key, str(rows)) for name in names])


class _Served:
    """A model in memory. ``rows_told``: how many the broker knows its batches to have."""

    __slots__ = ("curve", "limit_s", "line", "model", "rows_told", "series", "used")

    def __init__(self, model: Model, line: Line, curve: Curve, now: float) -> None:
        self.model = model
        self.line = line
        self.curve = curve
        self.limit_s = model.config.max_compute_s
        self.rows_told = 0
        self.used = now  # when one of its batches ended last
        self.series: _Series | None = None


def _with_build(state: ModelState, build: str) -> ModelState:
    return state if state.spec is None else state._replace(spec=state.spec._replace(build=build))


class Serving:
    """``states``, ``routes``: as they are now, by version and by model. ``instances``: compute threads."""

    def __init__(
        self,
        identity: Identity,
        states: Sequence[ModelState],
        batcher: Batcher,
        meters: Meters,
        max_compute_s: float = MAX_COMPUTE_S,
    ) -> None:
        self.identity = identity
        self.instances = identity.instances
        self.states: dict[ModelKey, ModelState] = {(state.name, state.version): state for state in states}
        self.routes: dict[str, Route] = {}
        self.loads: Sequence[Load] = ()  # as the broker has ordered them
        self._batcher = batcher
        self._meters = meters
        self._max_compute_s = max_compute_s
        self._served: dict[ModelKey, _Served] = {}
        self._leaving: dict[ModelKey, bool] = {}  # from memory, once nothing of it is held; whether it is told gone
        self._replaced: list[_Served] = []  # of which something is held
        # What the broker is to be told, and not before when.
        self._changed: dict[ModelKey, None] = {}
        self._gone: dict[ModelKey, None] = {}
        self._rerouted: dict[str, None] = {}
        self._grown = False
        self._new: dict[ModelKey, None] = {}  # whose costs it does not know
        self._tell_at = 0.0
        self._heard = 0  # the order that was followed last
        self._urgent = False  # at once
        self._renewing: dict[ModelKey, str] = {}  # versions that may be replaced, and the builds that are not told
        self._ran: set[ModelKey] = set()  # whose batches have ended since it was last told of costs
        self._costs_due = 0.0  # when it may be told again
        self._unmeasured: set[ModelKey] = set()  # that are new, or have run, since the last beat

    def used(self, key: ModelKey) -> float:
        """When a version was used last. May be called by any thread."""
        served = self._served.get(key)
        return 0.0 if served is None else served.used

    def find(self, key: ModelKey) -> Model | None:
        served = self._served.get(key)
        return None if served is None else served.model

    # --- what becomes of models ---

    def loaded(self, event: Loaded, now: float) -> None:
        state, model = event.state, event.model
        key = (state.name, state.version)
        before_state = self.states.get(key)
        if before_state is not None and before_state.state == IDLE != state.state:
            self._urgent = True  # or the broker would not hear that it has been loaded, should it soon be IDLE again
        if model is not None:
            self._renewing.pop(key, None)
        elif key in self._renewing:
            state = _with_build(state, "")
        self.states[key] = state
        self._changed[key] = None
        self._gone.pop(key, None)
        if model is not None:
            self._leaving.pop(key, None)
            before = self._served.get(key)
            self._meters.value("penstock_model_run_bytes", *key).value = model.run_bytes
            nbytes = model.run_bytes + (model.weights.nbytes if model.weights is not None else 0)
            self._meters.value("penstock_model_bytes", *key, self.identity.device).value = nbytes
            self._meters.value("penstock_model_evictions", *key)  # from 0, so that the first one is seen
            curve = Curve(model.sizes or batch_sizes(model.spec.max_batch_size), bool(model.sizes))
            curve.begin(model.warm_s)
            served = _Served(model, self._batcher.set_rules(key, self._rules(model), curve), curve, now)
            self._served[key] = served
            self._new[key] = None
            self._unmeasured.add(key)
            if before is not None:
                served.series = before.series
                self._replaced.append(before)
        elif state.state == READY:
            if self._leaving.get(key) is not None:
                del self._leaving[key]
        elif key in self._leaving:
            self._leaving[key] = False
        self._meters.value("penstock_model_ready", *key).value = int(state.state in SERVED)

    def renewing(self, key: ModelKey, on: bool) -> None:
        """See Renewing. The broker is told at once that what serves is not to be cached any more; of what has just been
        loaded it is told, and so it is of what was not loaded and serves on."""
        state = self.states.get(key)
        if on:
            if state is not None and state.spec is not None and state.spec.build:
                self._renewing[key] = state.spec.build
                self.states[key], self._changed[key], self._urgent = _with_build(state, ""), None, True
            return
        build = self._renewing.pop(key, "")
        if build and state is not None and state.spec is not None:
            self.states[key], self._changed[key] = _with_build(state, build), None

    def rested(self, key: ModelKey) -> None:
        """It is IDLE, and goes from memory once nothing of it is held."""
        if key in self._served:
            self._leaving[key] = False
            self._meters.value("penstock_model_evictions", *key).value += 1

    @property
    def resting(self) -> list[Version]:
        """What is IDLE and in memory still."""
        keys = [key for key in self._served.keys() - self._leaving.keys() if self.states[key].state == IDLE]
        return [Version(*key) for key in sorted(keys)]

    def tried(self, event: Tried) -> None:
        key = (event.name, event.version)
        self._meters.value("penstock_model_loads", *key, "loaded" if event.done else "failed").value += 1
        self._meters.value("penstock_model_load_seconds", *key).value = event.seconds

    def unwanted(self, key: ModelKey) -> None:
        """It goes once nothing of it is held."""
        if key in self.states:
            self._leaving[key] = True

    def released(self) -> list[Model]:
        """Models of which nothing is held any more, and that nobody needs: their memory is to be returned. Here they
        are forgotten."""
        if not self._leaving and not self._replaced:
            return []
        released = [each.model for each in self._replaced if not each.line.held]
        self._replaced = [each for each in self._replaced if each.line.held]
        for key, gone in list(self._leaving.items()):
            served = self._served.get(key)
            if served is not None and served.line.held:
                continue
            del self._leaving[key]
            if served is not None:
                del self._served[key]
                self._batcher.drop(key)
                self._ran.discard(key)
                self._new.pop(key, None)
                released.append(served.model)
            if gone:
                del self.states[key]
                self._changed.pop(key, None)
                self._renewing.pop(key, None)
                self._gone[key] = None
                self._meters.forget(*key)
        return released

    def routed(self, route: Route) -> None:
        if route.versions or route.wanted:
            self.routes[route.name] = route
        else:
            self.routes.pop(route.name, None)
        self._rerouted[route.name] = None

    def followed(self, event: Followed, epoch: int) -> None:
        if event.epoch == epoch:
            self._heard, self._urgent = event.serial, True

    def grow(self, instances: int) -> None:
        self.instances = instances
        self._grown = True
        for key, served in self._served.items():
            self._batcher.set_rules(key, self._rules(served.model))

    def lose_device(self, reason: str) -> None:
        """The broker keeps the reason, and gives what this worker holds to others when it ends."""
        for key, state in self.states.items():
            self.states[key] = state._replace(state=UNAVAILABLE, reason=reason)
            self._meters.value("penstock_model_ready", *key).value = 0
            self._changed[key] = None
        self._urgent = True  # the process is about to end

    def _rules(self, model: Model) -> Rules:
        spec, config = model.spec, model.config
        preferred = config.preferred_batch_sizes if spec.batchable else None
        return Rules(
            rows_max=spec.max_batch_size,
            delay_s=config.max_queue_delay_s,
            instances=config.instances,
            window=spec.max_batch_size * (self.instances + 1),
            batchable=spec.batchable,
            weight=config.weight,
            target_s=config.latency_target_s if spec.batchable else 0.0,
            sizes=model.sizes,
            enough=preferred[0] if preferred else 0,
        )

    # --- what their batches take ---

    def limit_s(self, batch: Batch) -> float:
        """How long a batch may compute."""
        served = self._served.get(batch.model)
        if served is not None and served.limit_s:
            return served.limit_s
        return max(self._max_compute_s, _COMPUTE_TIMES * batch.expected_s) if self._max_compute_s else float("inf")

    def learn(self, event: Executed, now: float) -> None:
        """What a batch took that has not failed."""
        assert event.batch.line is not None, f"{event.batch} is of no model"
        event.batch.line.curve.learn(event.batch.rows, event.compute_s, now)
        if event.batch.model in self._served:
            self._served[event.batch.model].used = now
        self._ran.add(event.batch.model)
        self._unmeasured.add(event.batch.model)

    def count(self, event: Executed) -> None:
        key, batch = event.batch.model, event.batch
        served = self._served.get(key)
        series = None if served is None else served.series
        if series is None:
            series = _Series(self._meters, key)
            if served is not None:
                served.series = series
        for waited_s, count in event.queue_s:
            series.queue_seconds.observe(waited_s, count)
            series.request_seconds.observe(waited_s + event.compute_s, count)
        series.compute_seconds.observe(event.compute_s)
        series.batch_rows.observe(batch.rows)
        series.batches[batch.reason].value += 1
        requests = sum([count for _, count in event.queue_s])
        for run in event.runs:
            series.input_seconds.value += run.input_s * requests
            series.model_seconds.value += run.model_s * requests
            size = size_label(run.rows)
            values = series.sizes.get(size)
            if values is None:
                values = series.sizes[size] = _size_of(self._meters, key, size)
            batches, input_s, model_s, output_s = values
            batches.value += 1
            input_s.value += run.input_s
            model_s.value += run.model_s
            output_s.value += run.output_s
        series.last.value = max(series.last.value, event.ended)
        if event.failed_rows:
            self._meters.value("penstock_failed_seconds", *key).value += event.failed_s
            self._meters.value("penstock_failed_rows", *key).value += event.failed_rows

    def measure(self) -> None:
        """What batches are expected to be, at the time of a beat."""
        unmeasured, self._unmeasured = self._unmeasured, set()
        for key in unmeasured & self._served.keys():
            served = self._served[key]
            rows = served.line.limit
            self._meters.value("penstock_batch_rows_max", *key).value = rows
            self._meters.value("penstock_expected_batch_seconds", *key).value = served.curve.seconds(rows)

    # --- what the broker is told ---

    def hello(self) -> WorkerHello:
        """All of it; nothing has changed since."""
        for each in (self._changed, self._gone, self._rerouted):
            each.clear()
        self._grown = self._urgent = False
        identity = self.identity
        return WorkerHello(
            0,
            identity.name,
            identity.device,
            identity.pid,
            identity.endpoints,
            self.instances,
            tuple(self.states.values()),
            tuple(self.routes.values()),
            identity.control,
            tuple(self.loads),
            identity.repository,
        )

    def welcomed(self, again: bool) -> None:
        """By a broker that knows what the hello said. ``again``: it had welcomed this worker before."""
        self._new = dict.fromkeys(self._served)
        self._meters.tell_all()
        self._tell_at = 0.0
        if not again:
            self._heard = 0

    @property
    def _news(self) -> bool:
        return bool(self._changed or self._gone or self._rerouted or self._grown or self._urgent)

    @property
    def has_untold(self) -> bool:
        return bool(self._news or self._new)

    def due(self) -> float:
        """When there is something to tell."""
        if self._urgent:
            return 0.0
        return self._tell_at if self._news or self._new else float("inf")

    def tell(self, epoch: int, now: float) -> list[Message]:
        """What has changed, when it is time to tell it."""
        if not (self._news or self._new) or (now < self._tell_at and not self._urgent):
            return []
        said: list[Message] = []
        if self._news:
            models = tuple([self.states[key] for key in self._changed])
            gone = tuple([Version(*key) for key in self._gone])
            routes = tuple([self.routes.get(name, Route(name)) for name in self._rerouted])
            said.append(WorkerModels(epoch, models, gone, routes, self.instances, self._heard))
            for each in (self._changed, self._gone, self._rerouted):
                each.clear()
            self._grown = self._urgent = False
            self._tell_at = now + _TELL_S
        new, self._new = self._new, {}
        return said + self._costs(epoch, new)

    def tell_costs(self, epoch: int, now: float) -> list[Message]:
        """What has changed of those of models that have run since."""
        if not self._ran:
            return []
        self._costs_due = now + _COSTS_S
        ran, self._ran = self._ran, set()
        return self._costs(epoch, [key for key in ran if self._has_changed(key)])

    def tell_costs_soon(self, epoch: int, now: float) -> list[Message]:
        """The same, not too often."""
        return self.tell_costs(epoch, now) if now >= self._costs_due else []

    def _costs(self, epoch: int, keys: Sequence[ModelKey] | dict[ModelKey, None]) -> list[Message]:
        costs = []
        for key in keys:
            served = self._served[key]
            config = served.model.config
            rows = served.rows_told = served.line.limit
            weight, idle_us = config.weight_thousandths, max(1, round(config.max_sequence_idle_s * 1e6))
            costs.append(Cost(*key, config.instances, rows, weight, *served.curve.tell(), idle_us))
        return [Costs(epoch, costs)] if costs else []

    def _has_changed(self, key: ModelKey) -> bool:
        served = self._served.get(key)
        if served is None:
            return False
        return served.curve.changed() or abs(served.line.limit - served.rows_told) > _ROWS_TOLD * served.rows_told

    def validate(self) -> None:
        """For tests. Raises AssertionError saying what is wrong."""
        assert self._served.keys() <= self.states.keys(), "a model is in memory that is not declared"
        assert self._leaving.keys() <= self.states.keys(), "a model leaves that is not declared"
        assert self._new.keys() <= self._served.keys(), "of a model that is not there costs are to be told"
        assert self._changed.keys() <= self.states.keys(), "of a model that is not there the state is to be told"
        assert not self._gone.keys() & self.states.keys(), "a model that is there is to be told gone"
        for key, served in self._served.items():
            assert self._batcher.limit(key) == served.line.limit, f"{key} waits in another's line"
