"""``penstock models ls`` and ``describe``: what a server serves, and what of it where no version is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from penstock.bin.asking import REACH_S, Server, asks, fail
from penstock.wire.models import ModelState, Route, TensorSpec

_HEADINGS = ("NAME", "VERSION", "STATE", "BATCH", "SERVES", "")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one for each version.")
@asks(REACH_S)
def ls(server: Server, as_json: bool) -> None:
    """List what the server serves, and why what is not served is not.

    SERVES: which requests go to a version beside those that name it: "default" are those that name none, a label those
    that name it, with the part of the others that the model's traffic sends there.
    """
    show(server, as_json)


def show(server: Server, as_json: bool = False) -> None:
    """Raises PenstockError."""
    with server.connect() as client:
        states, routes = client.models(), {route.name: route for route in client.routes()}
    states.sort(key=place)
    if as_json:
        click.echo(json.dumps([_object(state, routes.get(state.name)) for state in states], indent=2))
        return
    rows = [_HEADINGS, *[_row(state, routes.get(state.name)) for state in states]]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip())


def place(state: ModelState) -> tuple[str, bool, int, str]:
    """By name, then by number, and then what is none."""
    version = state.version
    is_number = version.isdecimal()
    return state.name, not is_number, int(version) if is_number else 0, version


def shares(route: Route, version: str) -> Iterator[tuple[str, int | None]]:
    """What leads to a version: labels, or its number, with the part of the traffic that goes there, if any does."""
    traffic, labels = dict(route.traffic), dict(route.labels)
    for label, target in labels.items():
        if target == version:
            yield label, traffic.get(label)
    if version in traffic and version not in labels:
        yield version, traffic[version]


def is_current(route: Route | None, version: str) -> bool:
    return route is not None and route.versions[:1] == (version,)


def serves(route: Route | None, version: str) -> str:
    """What requests beside those that name it go to a version, in words."""
    if route is None:
        return ""
    words = ["default"] if is_current(route, version) and not route.traffic else []
    for target, percent in shares(route, version):
        part = "" if percent is None else f"{percent} %"
        words.append(part if target == version else f"{target} {part}".rstrip())
    return ", ".join(words)


def _row(state: ModelState, route: Route | None) -> tuple[str, str, str, str, str, str]:
    spec = state.spec
    batch = "" if spec is None else str(spec.max_batch_size) if spec.batchable else "alone"
    return state.name, state.version, state.state, batch, serves(route, state.version), state.reason


def _object(state: ModelState, route: Route | None) -> dict[str, Any]:
    spec, led = state.spec, [] if route is None else list(shares(route, state.version))
    return {
        "name": state.name,
        "version": state.version,
        "state": state.state,
        "reason": state.reason,
        "batchable": None if spec is None else spec.batchable,
        "max_batch_size": None if spec is None else spec.max_batch_size,
        "current": is_current(route, state.version),
        "labels": [target for target, _ in led if target != state.version],
        "traffic": sum(percent or 0 for _, percent in led),
    }


@click.command()
@click.argument("model")
@asks(REACH_S)
def describe(server: Server, model: str) -> None:
    """Say all that the server knows of MODEL: its versions, where requests go, inputs and outputs, and its
    configuration."""
    with server.connect() as client:
        states = [state for state in client.models() if state.name == model]
        known = sorted({state.name for state in client.models()})
        route = next((route for route in client.routes() if route.name == model), None)
        repository = client.repository()
    if not states:
        fail(f"the server has no model '{model}'; it has {', '.join(known) or 'none'}")
    for line in description(model, sorted(states, key=place), route, config_of(repository, model)):
        click.echo(line)


def config_of(repository: str, model: str) -> str:
    """Where a model is configured, in words."""
    from penstock.bin.modeldir import ModelDir, ModelDirError

    if not repository:
        return "unknown: no worker has said where its models lie"
    try:
        found = ModelDir(Path(repository), model)
    except ModelDirError:
        return f"none: {repository} is one file"
    if not found.path.exists():
        return f"{found.path} on the server's host"
    return str(found.config_path or f"none ({found.toml} would be one)")


def description(model: str, states: Sequence[ModelState], route: Route | None, config: str) -> Iterator[str]:
    yield model
    yield f"  configuration  {config}"
    current = "" if route is None or not route.versions else f"version {route.versions[0]}"
    yield f"  current        {current or 'none'}"
    if route is not None and route.labels:
        yield f"  labels         {in_words(dict(route.labels))}"
    if route is not None and route.traffic:
        yield f"  traffic        {in_words(dict(route.traffic), ' %')}"
    for state in states:
        yield ""
        led = serves(route, state.version)
        yield f"  version {state.version}  {state.state}{f'  serves {led}' if led else ''}"
        if state.reason:
            yield f"    {state.reason}"
        spec = state.spec
        if spec is not None:
            yield from _tensors("inputs ", spec.inputs)
            yield from _tensors("outputs", spec.outputs)
            yield f"    batches  {f'up to {spec.max_batch_size} rows' if spec.batchable else 'requests run alone'}"


def _tensors(heading: str, tensors: Iterable[TensorSpec]) -> Iterator[str]:
    for each in tensors:
        yield f"    {heading}  {each.name}  {each.datatype} {list(each.shape)}"
        heading = " " * len(heading)


def in_words(values: Mapping[str, object], unit: str = "") -> str:
    return ", ".join(f"{key} {value}{unit}" for key, value in values.items())
