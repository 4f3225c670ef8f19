"""A scenario's file: TOML, of which every error names the line and the key. docs/simulate.md says what keys mean."""

from __future__ import annotations

import difflib
import math
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import msgspec.inspect

from penstock.broker.options import BrokerOptions
from penstock.simulate.costs import NORMAL_MAX, BatchCost, table_of
from penstock.simulate.scenario import (
    NEVER,
    Delays,
    ModelPlan,
    Outage,
    Scenario,
    ScenarioError,
    Sweep,
    SweepKey,
    Traffic,
    WorkerGroup,
)
from penstock.simulate.schema import (
    KEYS_OF,
    NEEDED_BY,
    NOT_OF_TRACES,
    DelaysTable,
    ModelTable,
    OutageTable,
    SweepTable,
    TopTable,
    TrafficTable,
    WorkersTable,
)
from penstock.wire.messages import MAX_TENANT, MAX_TIMEOUT_US
from penstock.worker.config import ConfigError, ModelConfig, load_config
from penstock.worker.tomllines import KeyPath, line_of, lines_of

T = TypeVar("T")

_WEIGHT_MIN, _WEIGHT_MAX = 0.001, 1000.0  # of a tenant, as in bin/options.py
_FILE_MAX_BYTES: Final = 1 << 20
_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s|m|h)", re.ASCII)
_DAY_S: Final = 86_400.0
_SYNTAX: Final = re.compile(r"(.*) \(at line (\d+), column \d+\)")
_STEP: Final = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
_CONFIG_KEY: Final = re.compile(r"key '([^']+)': (.*)", re.DOTALL)

_SECTIONS: Final = ("workers", "models", "traffic", "delays", "broker", "sweep")


def read_scenario(path: Path) -> Scenario:
    """Raises ScenarioError."""
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_MAX_BYTES + 1)
        if len(data) > _FILE_MAX_BYTES:
            raise ScenarioError(f"{path} has more than {_FILE_MAX_BYTES} bytes, too many for a scenario")
        return parse_scenario(data.decode("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def parse_scenario(text: str, path: Path) -> Scenario:
    """``path``: for what is said of it, and for the files that it names, which lie beside it. Raises ScenarioError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX.fullmatch(str(error))
        line, what = (match[2], match[1]) if match else (str(text.count("\n") + 1), str(error))
        raise ScenarioError(f"{path}: line {line}: {what}") from None
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    return _Reading(values, text.replace("\r\n", "\n"), path).scenario()


class _Reading:
    """One file, on its way to a Scenario. Every method raises ScenarioError."""

    def __init__(self, values: dict[str, Any], text: str, path: Path) -> None:
        self._values = values
        self._lines = lines_of(text)
        self._path = path

    def scenario(self) -> Scenario:
        values = self._values
        self._check_keys(values, (*_names(TopTable), *_SECTIONS), ())
        top = self._convert({key: each for key, each in values.items() if key not in _SECTIONS}, TopTable, ())
        duration_s = self._seconds(top.duration, ("duration",), 1e-3, _DAY_S)
        tables = self._tables("models")
        made = [self._models(table, at) for at, table in tables]
        self._check_unique(
            [(f"{each.name}, {each.version}", at) for (at, _), some in zip(tables, made, strict=True) for each in some],
            "model",
        )
        models = [each for some in made for each in some]
        groups = [self._workers(table, at, models) for at, table in self._tables("workers")]
        self._check_unique([(each.name, ("workers", at)) for at, each in enumerate(groups)], "group of workers")
        traffic = [self._traffic(table, at, models, duration_s) for at, table in self._tables("traffic")]
        self._check_unique([(each.name, ("traffic", at)) for at, each in enumerate(traffic)], "traffic")
        warmup_s = self._seconds(top.warmup, ("warmup",), 0.0, _DAY_S)
        if warmup_s >= duration_s:
            raise self._error(("warmup",), f"it is less than the duration, which is {top.duration}")
        return Scenario(
            name=self._path.stem,
            seed=top.seed,
            duration_s=duration_s,
            warmup_s=warmup_s,
            step_s=self._seconds(top.step, ("step",), 0.0, 1.0),
            gateways=top.gateways,
            groups=tuple(groups),
            models=tuple(models),
            traffic=tuple(traffic),
            delays=self._delays(),
            options=self._options(sum(group.count for group in groups)),
            sweep=self._sweep(traffic),
        )

    # --- the sections ---

    def _delays(self) -> Delays:
        given = self._convert(self._table("delays"), DelaysTable, ("delays",))
        seconds = [self._seconds(getattr(given, key), ("delays", key), 0.0, 10.0) for key in _names(DelaysTable)]
        return Delays(*seconds)

    def _options(self, workers: int) -> BrokerOptions:
        values = self._table("broker")
        options = self._convert(values, BrokerOptions, ("broker",))
        for key in values:
            value = getattr(options, key)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise self._error(("broker", key), f"it is 0 or more, not {value}")
        for tenant, weight in options.tenant_weights.items():
            if not 0 < len(tenant) <= MAX_TENANT or not _WEIGHT_MIN <= weight <= _WEIGHT_MAX:
                raise self._error(
                    ("broker", "tenant_weights", tenant),
                    f"a tenant has 1 to {MAX_TENANT} letters, and a weight from {_WEIGHT_MIN} to {_WEIGHT_MAX}",
                )
        if workers > options.workers_max:
            where: KeyPath = ("broker", "workers_max") if "workers_max" in values else ("workers", 0, "count")
            raise self._error(where, f"{workers} workers are more than workers_max, which is {options.workers_max}")
        return options

    def _models(self, values: dict[str, Any], at: KeyPath) -> list[ModelPlan]:
        own, known = _names(ModelTable), _names(ModelConfig)
        self._check_keys(values, (*own, *known), at)
        given = self._convert({key: each for key, each in values.items() if key in own}, ModelTable, at)
        config = self._config({key: each for key, each in values.items() if key not in own}, at)
        if not given.batchable and (keys := config.batch_keys):
            raise self._error((*at, keys[0]), "it has no effect where batchable = false: leave one of them out")
        batchable = given.batchable and config.max_batch_size != 0
        cost = self._cost(given, config.rows_max if batchable else 1, at)
        if given.copies == 1:
            return [ModelPlan(given.name, given.version, config, batchable, cost)]
        return [
            ModelPlan(f"{given.name}-{number}", given.version, config, batchable, cost)
            for number in range(given.copies)
        ]

    def _config(self, values: dict[str, Any], at: KeyPath) -> ModelConfig:
        """What is said as in a model.toml is judged by what judges a model.toml, whatever its keys are today."""
        if not values:
            return ModelConfig()
        with tempfile.TemporaryDirectory(prefix="penstock-simulate-") as directory:
            path = Path(directory) / "model.toml"
            try:
                path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()), encoding="utf-8")
                return load_config(path)
            except ConfigError as error:
                said = re.sub(r"(:\d+)?: ", "", str(error).removeprefix(str(path)), count=1)  # the lines are our own
                match = _CONFIG_KEY.fullmatch(said)
                if match is None:
                    raise self._error(at, said) from None
                raise self._error((*at, match[1]), match[2]) from None
            except _NotToml as error:
                raise self._error(at, str(error)) from None

    def _cost(self, given: ModelTable, size: int, at: KeyPath) -> BatchCost:
        jitter, shape = given.jitter, given.jitter_shape
        if shape == "normal" and jitter > NORMAL_MAX:
            raise self._error((*at, "jitter"), f"of a normal distribution it is at most {NORMAL_MAX}")
        lasts_s = self._seconds(given.jitter_lasts, (*at, "jitter_lasts"), 0.0, 3600.0)
        if lasts_s and not jitter:
            raise self._error((*at, "jitter_lasts"), "it has no effect without jitter: leave it out")
        if given.batch_ms is None:
            fixed_s, per_row_s = (given.fixed_ms or 0.0) / 1e3, (given.per_row_ms or 0.0) / 1e3
            if not fixed_s + per_row_s:
                raise self._error(at, "a model says what its batches take: fixed_ms and per_row_ms, or batch_ms")
            return BatchCost(fixed_s, per_row_s, (), jitter, shape, lasts_s)
        if given.fixed_ms is not None or given.per_row_ms is not None:
            raise self._error((*at, "batch_ms"), "with it there are no fixed_ms and per_row_ms")
        times: dict[int, float] = {}
        for key, milliseconds in given.batch_ms.items():
            if not re.fullmatch(r"[1-9]\d{0,6}", key, re.ASCII):
                raise self._error((*at, "batch_ms", key), f"{key!r} is no number of rows")
            times[int(key)] = milliseconds / 1e3
        if max(times, default=0) < size:
            raise self._error((*at, "batch_ms"), f"it says nothing of batches of {size} rows, which there may be")
        return BatchCost(0.0, 0.0, table_of(times), jitter, shape, lasts_s)

    def _workers(self, values: dict[str, Any], at: KeyPath, models: Sequence[ModelPlan]) -> WorkerGroup:
        given = self._convert(values, WorkersTable, at)
        number = at[-1]
        served: dict[str, ModelPlan] = {}
        for index, pattern in enumerate(given.models):
            found = [each for each in models if fnmatchcase(each.name, pattern)]
            if not found:
                raise self._error((*at, "models", index), self._no_model(pattern, models))
            served |= {each.name: each for each in found}
        instances = given.instances or max((each.config.instances for each in served.values()), default=1)
        if given.parallel is not None and given.parallel > instances:
            raise self._error((*at, "parallel"), f"no more than {instances} batches run at once, its instances")
        outages: list[Outage] = []
        for index, each in enumerate(given.outages):
            outages.append(self._outage(each, (*at, "outages", index), outages))
        return WorkerGroup(
            given.name or ("worker" if number == 0 else f"worker{number}"),
            given.count,
            tuple(served),
            given.instances or 0,
            given.parallel or 0,
            given.speed,
            tuple(outages),
        )

    def _outage(self, given: OutageTable, at: KeyPath, before: Sequence[Outage]) -> Outage:
        dies_s = self._seconds(given.dies, (*at, "dies"), 0.0, _DAY_S)
        returns_s = NEVER
        if given.returns is not None:
            returns_s = self._seconds(given.returns, (*at, "returns"), 0.0, _DAY_S)
            if returns_s <= dies_s:
                raise self._error((*at, "returns"), f"it is after {given.dies}, when they die")
        if before and dies_s <= before[-1].returns_s:
            raise self._error((*at, "dies"), "it is after they have returned from the outage before")
        return Outage(dies_s, returns_s, given.silent)

    def _traffic(self, values: dict[str, Any], at: KeyPath, models: Sequence[ModelPlan], duration_s: float) -> Traffic:
        given = self._convert(values, TrafficTable, at)
        kind = given.arrivals
        for key in values:
            owners = [each for each, keys in KEYS_OF.items() if key in keys]
            if (owners and kind not in owners) or (kind == "trace" and key in NOT_OF_TRACES):
                whose = f"it goes with {' and '.join(owners)}" if owners else "each request of a trace has its own"
                raise self._error((*at, key), f"arrivals are '{kind}' here; {whose}")
        for key in NEEDED_BY[kind]:
            if key not in values:
                raise self._error(at, f"traffic with arrivals '{kind}' says '{key}'")
        seconds = {
            key: self._seconds(text, (*at, key), least, most)
            for key, least, most in (
                ("deadline", 1e-3, MAX_TIMEOUT_US * 1e-6),
                ("begin", 0.0, _DAY_S),
                ("end", 1e-3, _DAY_S),
                ("burst_every", 1e-3, _DAY_S),
                ("burst_length", 1e-3, _DAY_S),
                ("day", 1e-3, _DAY_S),
                ("think", 0.0, _DAY_S),
                ("hangup_after", 0.0, _DAY_S),
            )
            if (text := getattr(given, key)) is not None
        }
        end_s = seconds.get("end", duration_s)
        if end_s > duration_s or seconds["begin"] >= end_s:
            key = "end" if end_s > duration_s else "begin"
            raise self._error((*at, key), f"traffic lies within the duration, which is {duration_s:g}s, and has one")
        if kind == "bursts" and seconds["burst_length"] >= seconds["burst_every"]:
            raise self._error((*at, "burst_length"), "a burst is shorter than the time from one to the next")
        number = at[-1]
        return Traffic(
            name=given.name or f"traffic{number}",
            arrivals=kind,
            models=() if given.model is None else self._chosen(given, at, models),
            rows=self._rows(given, at, models),
            nbytes=given.bytes,
            tenant=given.tenant,
            priority=given.priority,
            deadline_s=seconds["deadline"],
            begin_s=seconds["begin"],
            end_s=end_s,
            rate=given.rate or 0.0,
            burst_rate=given.burst_rate or 0.0,
            burst_every_s=seconds.get("burst_every", 0.0),
            burst_length_s=seconds.get("burst_length", 0.0),
            swing=given.swing,
            day_s=seconds.get("day", duration_s),
            users=given.users or 0,
            think_s=seconds["think"],
            hangups=given.hangups,
            hangup_after_s=seconds["hangup_after"],
            trace=None if given.file is None else self._path.parent / given.file,
        )

    def _chosen(self, given: TrafficTable, at: KeyPath, models: Sequence[ModelPlan]) -> tuple[tuple[str, float], ...]:
        assert given.model is not None
        found = list(dict.fromkeys(each.name for each in models if fnmatchcase(each.name, given.model)))
        if not found:
            raise self._error((*at, "model"), self._no_model(given.model, models))
        weights = [1.0 / (rank + 1) ** given.skew for rank in range(len(found))]
        return tuple((name, weight / sum(weights)) for name, weight in zip(found, weights, strict=True))

    def _rows(self, given: TrafficTable, at: KeyPath, models: Sequence[ModelPlan]) -> tuple[int, ...]:
        rows = given.rows if isinstance(given.rows, tuple) else (given.rows,)
        for each in models:
            if given.model is not None and fnmatchcase(each.name, given.model):
                size = each.config.rows_max
                if each.batchable and max(rows) > size:
                    raise self._error((*at, "rows"), f"model '{each.name}' takes at most {size} rows in a batch")
        return rows

    def _sweep(self, traffic: Sequence[Traffic]) -> Sweep | None:
        if "sweep" not in self._values:
            return None
        given = self._convert(self._table("sweep"), SweepTable, ("sweep",))
        keys: list[SweepKey] = [key for key in ("load", "without", "workers") if getattr(given, key) is not None]
        if len(keys) != 1:
            raise self._error(("sweep",), "a sweep is over one of load, without and workers")
        key = keys[0]
        values = getattr(given, key)
        names = [each.name for each in traffic]
        for number, value in enumerate(values if key == "without" else ()):
            if value and value not in names:
                raise self._error(("sweep", key, number), f"no traffic is called {value!r}; there are {names}")
            if value and len(names) == 1:
                raise self._error(("sweep", key, number), "without it there is no traffic")
        return Sweep(key, tuple(values))

    # --- values ---

    def _table(self, name: str) -> dict[str, Any]:
        values = self._values.get(name, {})
        if not isinstance(values, dict):
            raise self._error((name,), f"it is a table, [{name}]")
        return values

    def _tables(self, name: str) -> list[tuple[KeyPath, dict[str, Any]]]:
        values = self._values.get(name)
        if values is None:
            raise self._error((), f"a scenario has [[{name}]]")
        if not isinstance(values, list) or not values or not all(isinstance(each, dict) for each in values):
            raise self._error((name,), f"it is an array of tables, [[{name}]]")
        return [((name, number), each) for number, each in enumerate(values)]

    def _convert(self, values: dict[str, Any], kind: type[T], at: KeyPath) -> T:
        self._check_keys(values, _names(kind), at)
        if kind is WorkersTable:
            for number, each in enumerate(values.get("outages", ())):
                if isinstance(each, dict):
                    self._check_keys(each, _names(OutageTable), (*at, "outages", number))
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `")
            path: KeyPath = tuple(int(step[2]) if step[2] else step[1] for step in _STEP.finditer(where.strip("`$")))
            raise self._error((*at, *path), what) from None

    def _check_keys(self, values: Mapping[str, Any], known: Sequence[str], at: KeyPath) -> None:
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
                raise self._error((*at, key), f"unknown key; {hint}")

    def _check_unique(self, named: Sequence[tuple[str, KeyPath]], what: str) -> None:
        seen: set[str] = set()
        for name, at in named:
            if name in seen:
                raise self._error(at, f"a second {what} '{name}'")
            seen.add(name)

    def _no_model(self, pattern: str, models: Sequence[ModelPlan]) -> str:
        names = [each.name for each in models]
        near = difflib.get_close_matches(pattern, names, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names[:10])}"
        return f"no model is called {pattern!r}; {hint}"

    def _seconds(self, text: str, at: KeyPath, least: float, most: float) -> float:
        match = _DURATION.fullmatch(text.strip())
        if match is None:
            raise self._error(at, f"{text!r} is no duration; write a number and a unit, such as '500us', '2ms' or '1s'")
        seconds = float(match[1]) * _UNITS_S[match[2]]
        if not least <= seconds <= most:
            raise self._error(at, f"{text!r} is not between {least:g} and {most:g} seconds")
        return seconds

    def _error(self, at: KeyPath, sentence: str) -> ScenarioError:
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).removeprefix(".")
        key = f"key '{name}': " if at else ""
        return ScenarioError(f"{self._path}: line {line_of(self._lines, at)}: {key}{sentence}")


class _NotToml(Exception):
    pass


def _toml(value: Any) -> str:
    """A value of a model.toml, as it is written there. Raises _NotToml for what none has."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            if not escaped.isprintable():
                raise _NotToml("a text has letters that cannot be printed")
            return f'"{escaped}"'
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{_toml(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    raise _NotToml(f"{value} is nothing that a model.toml says")


def _names(kind: type[Any]) -> list[str]:
    return [each.name for each in msgspec.inspect.type_info(kind).fields]  # type: ignore[attr-defined]
