"""Where models lie on disk: ``MODELS/<name>/<version>/model.onnx``, with ``MODELS/<name>/model.toml``, or one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.wire.messages import MAX_NAME
from penstock.wire.models import newest
from penstock.worker.config import CPU, ConfigError, ModelConfig, default_config, load_config

_DEFAULTS: Final = ModelConfig()


class RepositoryError(Exception):
    """There is nothing to serve here; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model to be served, or (with ``problem``, a sentence) one that cannot be."""

    name: str
    version: str
    path: Path
    config: ModelConfig = _DEFAULTS
    problem: str = ""


def find_models(path: Path, device: str = CPU) -> list[ModelFile]:
    """The highest version of each model in a repository, or the model in a file, as they run on a device. Raises
    RepositoryError."""
    try:
        if path.is_dir():
            return _find_in_directory(path, device)
        if not path.exists():
            raise RepositoryError(f"{path} does not exist; give an .onnx file or a model repository")
        if path.suffix != ".onnx":
            raise RepositoryError(f"{path} is neither a directory nor an .onnx file")
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from None
    return [ModelFile(_shown(path.stem), "1", path, default_config(device), _check_name(path.stem))]


def _find_in_directory(path: Path, device: str) -> list[ModelFile]:
    entries = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not entries:
        hint = ""
        if loose := sorted(path.glob("*.onnx")):
            hint = f"; {loose[0].name} lies beside it: move it to {path}/{loose[0].stem}/1/model.onnx, or give the file"
        raise RepositoryError(f"{path} holds no models: a repository has the form NAME/VERSION/model.onnx{hint}")
    if all(entry.name.isdecimal() for entry in entries) and any((entry / "model.onnx").exists() for entry in entries):
        raise RepositoryError(f"{path} is one model, not a repository; give {path.resolve().parent} instead")
    return [_find_model(entry, device) for entry in entries]


def _find_model(directory: Path, device: str) -> ModelFile:
    name = directory.name
    problem = _check_name(name)
    if problem:
        return ModelFile(_shown(name), "1", directory, problem=problem)
    try:
        versions = [entry.name for entry in directory.iterdir() if entry.is_dir() and entry.name.isdecimal()]
    except OSError as error:
        return ModelFile(name, "1", directory, problem=f"cannot read {directory}: {error.strerror}")
    if not versions:
        return ModelFile(
            name, "1", directory, problem=f"{directory} has no version directory; put the model at {name}/1/model.onnx"
        )
    version = newest(versions)
    path = directory / version / "model.onnx"
    try:
        config = load_config(directory / "model.toml", device)
    except ConfigError as error:
        return ModelFile(name, version, path, problem=str(error))
    missing = "" if path.is_file() else f"{path} does not exist"
    return ModelFile(name, version, path, config, missing)


def _shown(name: str) -> str:
    """A name as messages can carry it, whatever the file system has."""
    return name.encode("utf-8", "replace").decode()[:MAX_NAME]


def _check_name(name: str) -> str:
    """Why a name cannot be used, or ""."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the name {name!r} is not UTF-8; rename it"
    if len(name) > MAX_NAME:
        return f"the name '{name[:40]}...' is longer than {MAX_NAME} characters; rename it"
    if not name.isprintable():
        return f"the name {name!r} holds characters that cannot be printed; rename it"
    return ""
