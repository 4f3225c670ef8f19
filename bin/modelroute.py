"""``penstock models rollback`` and ``traffic``: which versions requests mean, changed while they are served."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from penstock.bin import options
from penstock.bin.asking import Outcome, Server, asks, end, fail
from penstock.bin.modeldir import ModelDir, ModelDirError, find_repository, pin, unpin
from penstock.bin.modellist import in_words
from penstock.bin.modelpush import seen
from penstock.bin.modeltoml import edit
from penstock.client import PenstockError
from penstock.wire.models import SERVED, UNAVAILABLE, ModelState, Route

_WAIT_S: Final = 60.0
_NUMBER: Final = re.compile(r"\d{1,18}", re.ASCII)
_SPECIFIC: Final = "version_policy {{ specific {{ versions: [{}] }} }}"

_models = click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="The model repository.  [default: the one that the server serves]",
)
_no_wait = click.option("--no-wait", is_flag=True, help="Do not wait until the server has followed.")


@click.command()
@click.argument("model")
@click.option(
    "--to", metavar="N", default="", help="The version.  [default: the newest before the one that is current]"
)
@click.option("--undo", is_flag=True, help="Go forward again: ask for the versions that were asked for before.")
@_models
@_no_wait
@asks(_WAIT_S)
def rollback(server: Server, model: str, to: str, undo: bool, models: Path | None, no_wait: bool) -> None:
    """Have MODEL serve the version that was current before: its model.toml asks for that one alone from then on.

    Requests that are under way end where they began. A later push is not served until --undo.
    """
    if to and undo:
        raise click.UsageError("--to goes back and --undo forward; give one of them")
    try:
        target = ModelDir(find_repository(server, models), model)
        target.versions()
        version = _go_forward(target) if undo else _go_back(server, target, to, offline=models is not None)
    except ModelDirError as error:
        fail(str(error), options.EXIT_CANNOT_SERVE)
    if not no_wait:
        end(server.wait(model, lambda states, route: seen(states, route, version, True)))


def _go_forward(target: ModelDir) -> str:
    """The version that is asked for from now on. Raises ModelDirError."""
    from penstock.worker.versions import asked_for

    def forward(text: str) -> str:
        after = unpin(text)
        if after is None:
            raise ModelDirError(f"{target.toml} has no rollback to be undone")
        return after

    target.change(forward, "take its version_policy out, or name other versions there")
    config = target.config()
    asked = asked_for(config.version_policy, target.versions())
    click.echo(f"{target.toml} asks for {', '.join(asked) or 'no version'} again: {_policy(config.version_policy)}")
    if not asked:
        raise ModelDirError(f"model '{target.name}' has no version")
    return asked[0]


def _go_back(server: Server, target: ModelDir, to: str, offline: bool) -> str:
    """The version that is asked for from now on. ``offline``: there may be no server. Raises ModelDirError."""
    config = target.config()
    if to:
        target.check_version(to)
        version = to
    else:
        current = _current(server, target, offline)
        older = [each for each in target.versions() if int(each) < int(current)]
        if not older:
            raise ModelDirError(f"model '{target.name}' has no version before {current}, which is current; push one")
        version = older[0]
    target.change(lambda text: pin(text, version, config), f"write {_SPECIFIC.format(version)}")
    click.echo(f"version_policy = [{version}] in {target.toml}; it was {_policy(config.version_policy)}")
    click.echo(f"to go forward again: penstock models rollback {target.name} --undo")
    if config.traffic:
        click.echo(f"traffic goes on as it does: {in_words(config.traffic, ' %')}; see penstock models traffic")
    if config.labels:
        click.echo(f"labels stay as they are: {in_words(config.labels)}")
    return version


def _current(server: Server, target: ModelDir, offline: bool) -> str:
    """The version that is served where none is named. Raises ModelDirError."""
    from penstock.worker.versions import asked_for

    try:
        with server.connect() as client:
            for route in client.routes():
                if route.name == target.name and route.versions:
                    return route.versions[0]
    except PenstockError:
        if not offline:
            raise
    asked = asked_for(target.config().version_policy, target.versions())
    if not asked:
        raise ModelDirError(f"model '{target.name}' has no version")
    return asked[0]


def _policy(policy: object) -> str:
    """As it is written in a model.toml."""
    match policy:
        case str():
            return f'"{policy}"'
        case dict():
            return f"{{latest = {policy['latest']}}}"
        case tuple():
            return str(list(policy))
    return str(policy)


@click.command()
@click.argument("model")
@click.argument("parts", nargs=-1, metavar="[TARGET=PERCENT]...")
@click.option("--label", "labels", multiple=True, metavar="NAME=N", help="Name a version; NAME= takes the name away.")
@click.option("--clear", is_flag=True, help="Send all that names no version to the current one again.")
@_models
@_no_wait
@asks(_WAIT_S)
def traffic(
    server: Server,
    model: str,
    parts: Sequence[str],
    labels: Sequence[str],
    clear: bool,
    models: Path | None,
    no_wait: bool,
) -> None:
    """Say where requests for MODEL go that name no version, or change it: traffic digits stable=95 canary=5.

    A target is a label or the number of a version, and the parts add up to 100. Requests with the same header
    Penstock-Sticky go to the same version. Without parts, labels and --clear: shows what there is.
    """
    if parts and clear:
        raise click.UsageError("--clear takes the traffic out, and parts set it; give one of them")
    if not (parts or labels or clear):
        _show(server, model)
        return
    try:
        target = ModelDir(find_repository(server, models), model)
        wanted = _change(target, _pairs(parts, "%"), _pairs(labels), clear)
    except ModelDirError as error:
        fail(str(error), options.EXIT_CANNOT_SERVE)
    if not no_wait:
        end(server.wait(model, lambda states, route: followed(states, route, wanted)))


def _show(server: Server, model: str) -> None:
    with server.connect() as client:
        route = next((route for route in client.routes() if route.name == model), None)
    if route is None:
        fail(f"the server has no model '{model}'; 'penstock models ls' has those that it has")
    labels = dict(route.labels)
    if not route.traffic:
        click.echo(f"all to version {route.versions[0]}" if route.versions else "no version is served")
    for each, percent in route.traffic:
        click.echo(f"{percent:3} % {each}{f' (version {labels[each]})' if each in labels else ''}")
    for label, version in route.labels:
        if label not in dict(route.traffic):
            click.echo(f"  0 % {label} (version {version})")


def _pairs(values: Sequence[str], unit: str = "") -> dict[str, int | None]:
    """NAME=NUMBER; None where no number follows. Raises click.UsageError."""
    found: dict[str, int | None] = {}
    for each in values:
        name, equals, number = each.rpartition("=")
        number = number.removesuffix(unit) if unit else number
        if not name or not equals or not (_NUMBER.fullmatch(number) or not (number or unit)):
            form = "TARGET=PERCENT, such as stable=95" if unit else "NAME=N, such as stable=3"
            raise click.UsageError(f"{each!r} is not of the form {form}")
        if name in found:
            raise click.UsageError(f"'{name}' is there twice")
        found[name] = int(number) if number else None
    return found


def _change(target: ModelDir, parts: Mapping[str, int | None], given: Mapping[str, int | None], clear: bool) -> Route:
    """Set them in the model's model.toml. What its route is to be then, without versions. Raises ModelDirError."""
    config = target.config()
    labels = {name: number for name, number in {**config.labels, **given}.items() if number is not None}
    shares = {} if clear else {name: part or 0 for name, part in parts.items()} or dict(config.traffic)
    for version in {*map(str, labels.values()), *[each for each in shares if each.isdecimal()]}:
        target.check_version(version)
    values: dict[str, Mapping[str, int] | None] = {"traffic": shares or None}
    if given:
        values["labels"] = labels or None
    target.change(
        lambda text: edit(text, values),
        "Triton knows neither labels nor traffic; a model.toml in its place may have them, and the rest of it as "
        "'penstock check' shows it",
    )
    said = [f"traffic {in_words(shares, ' %')}" if shares else "no traffic"]
    said += [f"labels {in_words(labels)}"] if labels else []
    click.echo(f"{target.toml}: {', '.join(said)}")
    return Route(
        target.name, (), tuple([(name, str(number)) for name, number in labels.items()]), tuple(shares.items())
    )


def followed(states: Mapping[str, ModelState], route: Route | None, wanted: Route) -> Outcome | None:
    """Whether a server's route is the one that is ``wanted``, and all that it leads to is served; None: not yet."""
    if route is None or (dict(route.labels), dict(route.traffic)) != (dict(wanted.labels), dict(wanted.traffic)):
        return None
    led = [states.get(version) for version in sorted(wanted.wanted)]
    for state in led:
        if state is not None and state.state == UNAVAILABLE:
            rest = "; requests that would go there go to the current version"
            return Outcome(False, f"version {state.version} is not served: {state.reason}{rest}")
    if all(state is not None and state.state in SERVED for state in led):
        return Outcome(True, "the server has followed")
    return None
