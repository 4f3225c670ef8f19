"""Options that several commands share, and what they become."""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import ipaddress
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click

from penstock.bin import logs
from penstock.bin.cpus import format_cpus, parse_cpus, usable_cpus
from penstock.bin.devices import CPU, VISIBLE, Device, DeviceError, choose, choose_one
from penstock.broker.options import RECORD_MAX_BYTES, BrokerOptions
from penstock.gateway.cachevalue import problem_of_url
from penstock.gateway.cors import problem_of_origin
from penstock.gateway.options import GatewayOptions
from penstock.jobs.options import JobsOptions
from penstock.jobs.place import Place
from penstock.jobs.store import StoreError, locate
from penstock.wire.endpoints import BrokerAddress, EndpointError, default_runtime_dir, parse_broker
from penstock.wire.messages import MAX_TENANT
from penstock.worker.config import ConfigError, Toml, convert, read_toml
from penstock.worker.gpus import Gpu, Gpus, list_gpus
from penstock.worker.options import WorkerOptions

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_PR_SET_PDEATHSIG: Final = 1

_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s|m)?", re.ASCII)

_WEIGHT_MIN, _WEIGHT_MAX = 0.001, 1000.0  # of a tenant

_LOWEST: Final = {  # of a limit; 0 of the others
    **dict.fromkeys((("gateway", "arena_bytes"), ("worker", "arena_bytes"), ("worker", "run_bytes_max")), -1),
    **dict.fromkeys((("jobs", "lease_s"), ("jobs", "attempts_max"), ("jobs", "connections_max")), 1),
}

EXIT_CANNOT_SERVE: Final = 2  # a file that cannot be served, or nothing that can; also click's code for bad usage


class _Directory(click.Path):
    """A path, and not an address, of which a path would make another directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{value!r} is no directory; a TCP address goes with --bind, --broker or --server", param, ctx)
        return super().convert(value, param, ctx)


def check_tcp(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Of an option that takes a broker's TCP address: without tcp:// it would be taken for a directory."""
    if value is not None and not value.startswith("tcp://"):
        raise click.BadParameter(f"{value!r} is not of the form tcp://HOST:PORT")
    return value


def _check_cpus(ctx: click.Context, param: click.Parameter, value: str | None) -> frozenset[int] | None:
    if value is None:
        return None
    try:
        wanted = parse_cpus(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    usable = usable_cpus()
    if missing := wanted - usable:
        raise click.BadParameter(
            f"this process may not run on {format_cpus(missing)}; it has the cores {format_cpus(usable)}"
        )
    return wanted


runtime_dir = click.option(
    "--runtime-dir",
    type=_Directory(file_okay=False, path_type=Path),
    default=None,
    help="Where the processes of one server find each other.  [default: $XDG_RUNTIME_DIR/penstock]",
)
server = click.option(
    "--server",
    metavar="tcp://HOST:PORT",
    callback=check_tcp,
    default=None,
    help="Ask a server over TCP instead.",
)
config_file = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Limits of the server, in TOML: sections [broker], [worker], [gateway] and [jobs].",
)
allow_client_shm = click.option(
    "--allow-client-shm",
    is_flag=True,
    help="Let clients name shared memory of this host (/dev/shm) for their tensors; also in [gateway].",
)
log_format = click.option("--log-format", type=click.Choice(logs.FORMATS), default="text", show_default=True)
log_level = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
http = click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8000", show_default=True, help="Port 0: any.")
bind = click.option(
    "--bind",
    metavar="tcp://HOST:PORT",
    default="",
    help="Also listen on TCP, for workers and clients that do not share this host's runtime directory. Loopback only.",
)
workers = click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="How many on each device."
)
gateways = click.option("--gateways", type=click.IntRange(1, 256), default=1, show_default=True)
cpus = click.option(
    "--cpus",
    metavar="LIST",
    callback=_check_cpus,
    default=None,
    help="Cores to run on, such as 0-3,6.  [default: all that this process may use]",
)
pin = click.option("--pin", is_flag=True, help="Give each worker cores of its own: an equal share of all there are.")
device = click.option(
    "--device",
    metavar="LIST",
    default=None,
    help="What models run on: cpu, or GPUs such as cuda:0,cuda:1.  [default: every GPU, else the CPU]",
)


def _check_record(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """What can be told at once: a file that cannot be written later stops no server."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value} cannot be written: there is no directory {value.absolute().parent}")
    return value


_record = click.option(
    "--record",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_check_record,
    default=None,
    help="Write what is asked there, for 'penstock simulate': times, models and sizes, and no tensors.",
)
_record_max_bytes = click.option(
    "--record-max-bytes",
    type=click.IntRange(1),
    default=RECORD_MAX_BYTES,
    show_default=True,
    help="How large that file may become.",
)


jobs_store = click.option(
    "--jobs",
    "jobs_store",
    metavar="STORE",
    default=None,
    help="Where jobs are kept: sqlite, a file's absolute path, redis://HOST:PORT/N or off.  [default: [jobs] store]",
)


def jobs_place(given: str | None, limits: JobsOptions, address: BrokerAddress) -> Place | None:
    """Where the jobs of a server are kept; None for nowhere. ``given``: what --jobs says. Raises click.UsageError."""
    runtime = default_runtime_dir() if address.runtime is None else address.runtime.path
    try:
        where = locate(limits.store if given is None else given, runtime)
    except StoreError as error:
        raise click.UsageError(str(error)) from None
    return Place(where, limits) if where else None


def record(command: F) -> F:
    """Both options of a trace."""
    return _record(_record_max_bytes(command))


# The launcher's own: end when it does, however it ends.
parent = click.option("--parent", type=int, default=0, hidden=True)


def process_options(command: F) -> F:
    """What every long-running command takes."""
    for option in (parent, log_level, log_format, runtime_dir):
        command = option(command)
    return command


def broker_address(given: Path | str | None) -> BrokerAddress:
    """Where the broker is. Raises click.UsageError."""
    try:
        return parse_broker(given if given is not None else default_runtime_dir())
    except EndpointError as error:
        raise click.UsageError(str(error)) from None


def find_devices(asked: str | None) -> list[Device]:
    """What ``--device`` names on this machine. Raises click.UsageError. The driver is asked only when a GPU may be
    meant."""
    gpus = Gpus([], "") if asked == CPU.name else list_gpus()
    try:
        return choose(asked, gpus.found, os.environ.get(VISIBLE), gpus.absent)
    except DeviceError as error:
        raise click.UsageError(str(error)) from None


def find_device(asked: str | None, uuid: str) -> Device:
    """What one worker runs on. ``uuid``: of the GPU that the launcher has chosen, which alone is visible then, and goes
    by the name that is ``asked`` for. Raises click.UsageError."""
    gpus = Gpus([], "") if asked == CPU.name else list_gpus()
    if uuid and asked:
        gpu = next((gpu for gpu in gpus.found if gpu.uuid == uuid), Gpu(0, uuid))
        return Device(asked, uuid, gpu.pci, gpu.unusable)
    try:
        return choose_one(asked, gpus.found, os.environ.get(VISIBLE), gpus.absent)
    except DeviceError as error:
        raise click.UsageError(str(error)) from None


class Options(NamedTuple):
    """What a configuration file says, a section for each kind of process."""

    broker: BrokerOptions = BrokerOptions()
    worker: WorkerOptions = WorkerOptions()
    gateway: GatewayOptions = GatewayOptions()
    jobs: JobsOptions = JobsOptions()


def load_options(path: Path | None) -> Options:
    """A configuration file. Raises click.UsageError naming file, line, key and what is expected."""
    try:
        return options_of(read_toml(path)) if path is not None else Options()
    except (ConfigError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None


def options_of(toml: Toml) -> Options:
    """What a configuration file says. Raises ConfigError."""
    for section, values in toml.values.items():
        if section not in Options._fields or not isinstance(values, dict):
            raise toml.error((section,), f"'{section}' is not a section; {_where_else(section)}")
    return Options(
        _limits(toml, "broker", BrokerOptions),
        _limits(toml, "worker", WorkerOptions),
        _limits(toml, "gateway", GatewayOptions),
        _limits(toml, "jobs", JobsOptions),
    )


def _where_else(key: str) -> str:
    """What may have been meant by what is no section."""
    for section, limits in Options()._asdict().items():
        if key in [each.name for each in dataclasses.fields(limits)]:
            return f"it is a key of [{section}]"
    near = difflib.get_close_matches(key, Options._fields, 1)
    if near and near[0] != key:
        return f"did you mean [{near[0]}]?"
    return f"known are {', '.join(f'[{each}]' for each in Options._fields)}"


def _limits(toml: Toml, name: str, kind: type[T]) -> T:
    """A section. Raises ConfigError, also for what is no limit."""
    section = convert(toml, name, kind)
    for key in toml.values.get(name, ()):
        value, lowest = getattr(section, key), _LOWEST.get((name, key), 0)
        if isinstance(value, str):
            if problem := _PROBLEMS[key](value) if name == "jobs" and value else "":
                raise toml.error((name, key), f"[{name}]: key '{key}': {problem}")
            if key == "response_cache_store" and (problem := problem_of_url(value)):
                raise toml.error((name, key), f"[{name}]: key '{key}': {problem}")
            continue  # else a path
        if isinstance(value, tuple):
            problem_of = _problem_of_network if key == "callback_allow" else problem_of_origin
            for at, each in enumerate(value):
                if problem := problem_of(each):
                    raise toml.error((name, key, at), f"[{name}]: key '{key}': {problem}")
            continue
        if isinstance(value, dict):
            for tenant, weight in value.items():
                if problem := _problem_of_weight(tenant, weight):
                    raise toml.error((name, key, tenant), f"[{name}]: key '{key}': {problem}")
        elif not lowest <= value < math.inf:
            raise toml.error((name, key), f"[{name}]: key '{key}': it is {lowest} or more, not {value}")
    return section


def _problem_of_store(store: str) -> str:
    """Why jobs cannot be kept there, as far as that can be told without a look, or ""."""
    try:
        locate(store, Path("/"))
    except StoreError as error:
        return str(error)
    return ""


def _problem_of_secret(secret: str) -> str:
    """Why nothing can be signed with it, or ""."""
    from penstock.jobs.callbacks import read_secret

    try:
        read_secret(secret)
    except ValueError as error:
        return str(error)
    return ""


def _problem_of_network(network: str) -> str:
    """Why these are no addresses that may be called, or ""."""
    try:
        ipaddress.ip_network(network)
    except ValueError as error:
        return f"{error}; a network is written as 10.0.0.0/8 or fd00::/8"
    return ""


_PROBLEMS: Final = {"store": _problem_of_store, "callback_secret": _problem_of_secret}  # of strings in [jobs]


def _problem_of_weight(tenant: str, weight: float) -> str:
    """A tenant that no request can name, or a weight that is none; or ""."""
    if not 0 < len(tenant) <= MAX_TENANT:
        return f"a tenant has 1 to {MAX_TENANT} characters, and not the name {tenant[:80]!r}"
    if not _WEIGHT_MIN <= weight <= _WEIGHT_MAX:
        return f"the weight of '{tenant}' is from {_WEIGHT_MIN} to {_WEIGHT_MAX}, not {weight}"
    return ""


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the launcher ends, even if it is killed."""
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """ "500ms", "10s" or "5m"; a number alone is seconds. Becomes seconds."""

    name = "duration"

    def __init__(self, least: float = 0.0, most: float = 86_400.0) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        match = _DURATION.fullmatch(text)
        if match is None:
            self.fail(f"{text!r} is not a duration; write a number and a unit, such as 500ms, 10s or 5m", param, ctx)
        seconds = float(match[1]) * _UNITS_S[match[2] or "s"]
        if not self._least <= seconds <= self._most:
            self.fail(f"{text!r} is not between {self._least:g} and {self._most:g} seconds", param, ctx)
        return seconds
