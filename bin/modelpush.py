"""``penstock models push``: a new version of a model, seen by the server when it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from penstock.bin import options
from penstock.bin.asking import EXIT_FAILED, Outcome, Server, asks, end, fail
from penstock.bin.modeldir import ModelDir, ModelDirError, find_repository
from penstock.client import PenstockError
from penstock.client.publish import Content, PublishError, check_inside, publish
from penstock.wire.models import SERVED, UNAVAILABLE, ModelState, Route

_WAIT_S = 60.0


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--version", metavar="N", default="", help="Its number.  [default: the highest that is there, plus 1]")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    help="The model repository.  [default: the one that the server serves]",
)
@click.option("--force", is_flag=True, help="Do not look whether FILE is an ONNX model.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is served.")
@asks(_WAIT_S)
def push(server: Server, model: str, file: Path, version: str, models: Path | None, force: bool, no_wait: bool) -> None:
    """Put FILE, an ONNX model, and the files that its weights lie in, into the repository as a new version of MODEL.

    It is copied aside and renamed once it is whole, so that no server sees half of it; where another push takes the
    same number, the next is taken. Then waits until the server serves it: exit code 1, with the reason, when it does
    not. Exit code 2: it could not be published, and nothing is left behind.
    """
    try:
        repository = find_repository(server, models)
        target = ModelDir(repository, model)
        content = files_of(file, target.file_name() if target.config_path == target.pbtxt else "model.onnx", force)
        number = publish(repository, model, content, version)
    except (ModelDirError, PublishError) as error:
        fail(str(error), options.EXIT_CANNOT_SERVE)
    click.echo(f"published version {number} of {model} in {repository}")
    if no_wait:
        return
    try:
        wait(server, target, number)
    except PenstockError as error:
        fail(f"{error}; version {number} is served when a server is (--no-wait does not ask for one)", EXIT_FAILED)


def files_of(path: Path, name: str, force: bool = False) -> dict[str, Content]:
    """What is to be copied: a model, under this name, and the files that its weights lie in. Raises PublishError."""
    from penstock.worker.onnxfile import OnnxFileError, read_onnx

    try:
        beside = read_onnx(path).external_files
    except OnnxFileError as error:
        if not force or not path.is_file():
            raise PublishError(str(error)) from None
        beside = ()
    for each in beside:
        if problem := check_inside(each):
            raise PublishError(f"{path}: {problem}")
        if not (path.parent / each).is_file():
            raise PublishError(
                f"{path} has weights in {path.parent / each}, which is not there; push it from where it is"
            )
    files: dict[str, Content] = {name: path}
    return files | {each: path.parent / each for each in beside}


def wait(server: Server, target: ModelDir, version: str) -> None:
    """Until the server serves a version that is there, or says why it does not. Raises PenstockError."""
    from penstock.worker.versions import asked_for, wanted

    there = target.versions()
    try:
        config = target.config()
    except ModelDirError as error:
        fail(str(error))
    asked = asked_for(config.version_policy, there)
    if version not in wanted(config.version_policy, there, config.labels, config.traffic):
        click.echo(
            f"{target.config_path or target.path} does not ask for it, but for {', '.join(asked)} (version_policy); "
            f"'penstock models rollback {target.name} --undo' goes forward after a rollback"
        )
        return
    first = version == asked[0] and not config.traffic
    end(server.wait(target.name, lambda states, route: seen(states, route, version, first)))


def seen(states: Mapping[str, ModelState], route: Route | None, version: str, first: bool) -> Outcome | None:
    """What a server's states say of a version that is to be served; ``first``: and where none is named. None: nothing
    yet."""
    state = states.get(version)
    if state is None:
        return None
    if state.state == UNAVAILABLE:
        kept = f"; version {route.versions[0]} serves on" if route is not None and route.versions else ""
        return Outcome(False, f"version {version} is not served: {state.reason}{kept}")
    current = route is not None and route.versions[:1] == (version,)
    if state.state in SERVED and (current or not first):
        where = "requests that name no version" if first else "requests that name it"
        return Outcome(True, f"version {version} is {state.state} and serves {where}")
    return None
