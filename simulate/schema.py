"""The tables of a scenario's file, key by key, with what each may be. docs/simulate.md says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from msgspec import Meta, Struct

from penstock.simulate.costs import Shape
from penstock.simulate.scenario import Arrivals
from penstock.wire.messages import MAX_NAME, MAX_PRIORITY, MAX_TENANT
from penstock.worker.config import MAX_BATCH_SIZE

BATCH_MAX_S: Final = 3600.0

_Rate = Annotated[float, Meta(gt=0, le=1e7)]
_Count = Annotated[int, Meta(ge=1, le=100_000)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
_Rows = Annotated[int, Meta(ge=1, le=MAX_BATCH_SIZE)]
_Text = str  # a duration, such as "2ms"

# Keys that some arrivals alone have, and of these the ones that they must have.
KEYS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "poisson": ("rate",),
    "bursts": ("rate", "burst_rate", "burst_every", "burst_length"),
    "diurnal": ("rate", "swing", "day"),
    "users": ("users", "think"),
    "trace": ("file",),
}
NEEDED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "poisson": ("model", "rate"),
    "bursts": ("model", "rate", "burst_rate", "burst_every", "burst_length"),
    "diurnal": ("model", "rate"),
    "users": ("model", "users"),
    "trace": ("file",),
}
# What each request of a trace has of its own.
NOT_OF_TRACES: Final = ("model", "skew", "rows", "bytes", "tenant", "priority", "deadline")


class Table(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base of all: a table of the file, whose unknown keys are found before it is converted."""


class DelaysTable(Table, frozen=True, kw_only=True):
    client: _Text = "0ms"
    hop: _Text = "50us"
    broker_request: _Text = "10us"


class OutageTable(Table, frozen=True, kw_only=True):
    dies: _Text
    returns: _Text | None = None
    silent: bool = False


class WorkersTable(Table, frozen=True, kw_only=True):
    name: _Name = ""
    count: _Count = 1
    instances: Annotated[int, Meta(ge=1, le=64)] | None = None
    parallel: Annotated[int, Meta(ge=1, le=64)] | None = None
    speed: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    models: tuple[_Name, ...] = ("*",)
    outages: tuple[OutageTable, ...] = ()


class ModelTable(Table, frozen=True, kw_only=True):
    """Beside the keys of a model.toml."""

    name: _Name
    version: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)] = "1"
    copies: Annotated[int, Meta(ge=1, le=4096)] = 1
    batchable: bool = True
    fixed_ms: Annotated[float, Meta(ge=0, le=BATCH_MAX_S * 1e3)] | None = None
    per_row_ms: Annotated[float, Meta(ge=0, le=BATCH_MAX_S * 1e3)] | None = None
    batch_ms: dict[str, Annotated[float, Meta(gt=0, le=BATCH_MAX_S * 1e3)]] | None = None
    jitter: Annotated[float, Meta(ge=0, le=3)] = 0.0
    jitter_shape: Shape = "lognormal"
    jitter_lasts: _Text = "0ms"


class TrafficTable(Table, frozen=True, kw_only=True):
    name: _Name = ""
    arrivals: Arrivals = "poisson"
    model: _Name | None = None
    skew: Annotated[float, Meta(ge=0, le=10)] = 0.0
    rows: _Rows | Annotated[tuple[_Rows, ...], Meta(min_length=1, max_length=64)] = 1
    bytes: Annotated[int, Meta(ge=0, le=1 << 32)] = 0
    tenant: Annotated[str, Meta(max_length=MAX_TENANT)] = ""
    priority: Annotated[int, Meta(ge=0, le=MAX_PRIORITY)] = 0
    deadline: _Text = "30s"
    begin: _Text = "0s"
    end: _Text | None = None
    rate: _Rate | None = None
    burst_rate: _Rate | None = None
    burst_every: _Text | None = None
    burst_length: _Text | None = None
    swing: _Share = 0.8
    day: _Text | None = None
    users: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    think: _Text = "0s"
    hangups: _Share = 0.0
    hangup_after: _Text = "0s"
    file: Annotated[str, Meta(min_length=1)] | None = None


class SweepTable(Table, frozen=True, kw_only=True):
    load: Annotated[tuple[Annotated[float, Meta(gt=0, le=1000)], ...], Meta(min_length=1, max_length=64)] | None = None
    without: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)] | None = None
    workers: Annotated[tuple[_Count, ...], Meta(min_length=1, max_length=64)] | None = None


class TopTable(Table, frozen=True, kw_only=True):
    duration: _Text
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    warmup: _Text = "0s"
    step: _Text = "0ms"
    gateways: Annotated[int, Meta(ge=1, le=1024)] = 1
