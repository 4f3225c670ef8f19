"""``penstock models``"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from penstock.bin import options
from penstock.bin.asking import REACH_S, Server, fail
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.bin.modellist import show
from penstock.client import PenstockError

if TYPE_CHECKING:
    from penstock.worker.repository import ModelFile
    from penstock.worker.store import Store


_MORE: Final = {  # commands that are files of their own, imported when they are asked for
    "ls": "modellist",
    "describe": "modellist",
    "push": "modelpush",
    "rollback": "modelroute",
    "traffic": "modelroute",
    "load": "modelorder",
    "unload": "modelorder",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_MORE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MORE:
            return super().get_command(ctx, cmd_name)
        found: click.Command = getattr(import_module(f"penstock.bin.{_MORE[cmd_name]}"), cmd_name)
        return found


@click.group(cls=_Commands, invoke_without_command=True)
@options.runtime_dir
@options.server
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds.  [default: 5, of 'ls']")
@click.pass_context
def models(context: click.Context, runtime_dir: Path | None, server: str | None, timeout: float | None) -> None:
    """List what the server serves, and why what is not served is not: as 'ls', where no command follows.

    The others publish models, say which of their versions serve, and prepare or import them before a server does.
    """
    if context.invoked_subcommand is None:
        try:
            show(Server(server or runtime_dir, REACH_S if timeout is None else timeout))
        except PenstockError as error:
            fail(str(error))


@models.command()
@click.argument("models", type=click.Path(path_type=Path), default=BUNDLED_MODELS)
@options.config_file
@click.option("--gpu", is_flag=True, help="For workers on a GPU. None is needed for that.")
def prepare(models: Path, config: Path | None, gpu: bool) -> None:
    """Prepare MODELS (a repository or an .onnx file) now, so that workers need not when they start.

    Exit code 2, with a sentence each: what cannot be prepared. A worker would hold its own copy of it.
    """
    problems = 0
    with _Complaints() as complain:
        store, minimum = _open_store(config, gpu)
        for file in _find_models(models):
            problem = file.problem or _prepare(store, minimum, file)
            if problem:
                problems += 1
                complain(f"model {file.name}: {problem}")
    sys.exit(options.EXIT_CANNOT_SERVE if problems else 0)


def _prepare(store: Store, minimum: int, file: ModelFile) -> str:
    """Why it cannot be, or ""."""
    from penstock.worker.onnxfile import OnnxFileError, read_onnx
    from penstock.worker.store import StoreError

    made = []

    def tell(event: str, about: Mapping[str, object]) -> None:
        made.append(event)
        click.echo(f"{file.name}: {event}: {', '.join(f'{key} {value}' for key, value in about.items())}")

    try:
        nbytes = read_onnx(file.path).weight_bytes
        if nbytes < minimum:
            click.echo(f"{file.name}: not prepared: {nbytes} bytes of weights, and each worker loads its own")
            return ""
        store.open(file.path, file.name, tell)
    except (OnnxFileError, StoreError) as error:
        return str(error)
    if "model prepared" not in made:
        click.echo(f"{file.name}: prepared before")
    return ""


@models.command()
@click.argument("models", type=click.Path(path_type=Path), nargs=-1)
@options.config_file
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune(models: Sequence[Path], config: Path | None, dry_run: bool) -> None:
    """Remove what was prepared and no model needs any more.

    Needed is what the file that it was made from, or one of MODELS, would be prepared to here and now. What a process
    has mapped is kept.
    """
    from penstock.worker.manifest import Unusable
    from penstock.worker.prune import find_entries

    with _Complaints() as complain:
        store, _ = _open_store(config)
        wanted = set()
        for path in models:
            for file in _find_models(path):
                try:
                    wanted |= {store.find(file.path, on_gpu).key for on_gpu in (False, True)}
                except (Unusable, OSError) as error:
                    complain(f"model {file.name}: {error}; nothing was removed")
                    sys.exit(options.EXIT_CANNOT_SERVE)
        removed = 0
        for found in find_entries(store, wanted, remove=not dry_run):
            verb = "kept" if found.kept else "would remove" if dry_run else "removed"
            removed += 0 if found.kept else found.nbytes
            click.echo(f"{verb} {found.name} ({found.nbytes / 1e6:.1f} MB): {found.reason}")
        click.echo(f"{removed / 1e6:.1f} MB {'would be ' if dry_run else ''}removed from {store.root}")


@models.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), required=True, help="The model repository.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def import_tfserving(file: Path, into: Path, dry_run: bool) -> None:
    """Make a model repository of FILE, a model_config_list of TensorFlow Serving: links to the models where they lie,
    and their version policies.

    Only ONNX files are served: each version has to have a model.onnx, beside its saved_model.pb or without. Nothing
    that is there is replaced; importing again adds what is new. Exit code 2, with a sentence each: what cannot be
    served.
    """
    from penstock.bin.tfserving import Link, find_versions, perform, plan, read_list
    from penstock.worker.config import ConfigError

    problems, links = 0, False
    with _Complaints() as complain:
        try:
            served = read_list(file)
        except ConfigError as error:
            complain(str(error))
            sys.exit(options.EXIT_CANNOT_SERVE)
        for model in served:
            try:
                found = plan(model, find_versions(model.base), into)
                for line in perform(found.steps, dry_run):
                    click.echo(f"{model.name}: {line}")
            except OSError as error:
                complain(f"model {model.name}: {_say(error)}")
                problems += 1
                continue
            for sentence in found.warnings:
                click.echo(f"warning: model {model.name}: {sentence}")
            for sentence in found.problems:
                complain(f"model {model.name}: {sentence}")
            problems += len(found.problems)
            links = links or any(isinstance(step, Link) for step in found.steps)
    if links:
        click.echo(f"the links lead out of {into}: serve it with links_out = true in [worker] of penstock.toml")
    sys.exit(options.EXIT_CANNOT_SERVE if problems else 0)


def _say(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} does not exist; if it is a path in a container, name the one on this machine"
    return f"{error.filename}: {error.strerror}" if error.strerror else str(error)


class _Complaints:
    """Says what is wrong, and turns what ends the command into a sentence and exit code 2."""

    def __enter__(self) -> Callable[[str], None]:
        return lambda sentence: click.echo(f"penstock: {sentence}", err=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from penstock.worker.repository import RepositoryError
        from penstock.worker.store import StoreError

        if isinstance(error, (RepositoryError, StoreError, OSError)):
            click.echo(f"penstock: {error}", err=True)
            sys.exit(options.EXIT_CANNOT_SERVE)


def _open_store(config: Path | None, on_gpu: bool = False) -> tuple[Store, int]:
    """The store that the configuration names, and from how many bytes of weights on it is used. Raises StoreError."""
    from penstock.worker.store import find_store

    limits = options.load_options(config).worker
    return find_store(limits, on_gpu), limits.store_min_bytes


def _find_models(path: Path) -> list[ModelFile]:
    """Raises RepositoryError."""
    from penstock.worker.repository import find_models

    return find_models(path)
