"""Where models lie on disk: ``MODELS/<name>/<version>/model.onnx``, with ``MODELS/<name>/model.toml``, or one file.

Which of a model's versions are served is a matter of its ``version_policy`` (see versions.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.wire.messages import MAX_NAME
from penstock.worker.config import CPU, ConfigError, ModelConfig, default_config, load_config
from penstock.worker.versions import is_version, wanted

_DEFAULTS: Final = ModelConfig()


class RepositoryError(Exception):
    """There is nothing to serve here; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A version of a model to be served, or (with ``problem``, a sentence) one that cannot be."""

    name: str
    version: str
    path: Path
    config: ModelConfig = _DEFAULTS
    problem: str = ""


def find_models(path: Path, device: str = CPU) -> list[ModelFile]:
    """What a repository has to serve: of each model the versions that its policy asks for, the newest first; or the
    model in a file; as they run on a device. Raises RepositoryError."""
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
    if all(is_version(entry.name) for entry in entries) and any((entry / "model.onnx").exists() for entry in entries):
        raise RepositoryError(f"{path} is one model, not a repository; give {path.resolve().parent} instead")
    return [file for entry in entries for file in _find_model(entry, device)]


def _find_model(directory: Path, device: str) -> list[ModelFile]:
    name = directory.name
    problem = _check_name(name)
    if problem:
        return [ModelFile(_shown(name), "1", directory, problem=problem)]
    try:
        entries = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    except OSError as error:
        return [ModelFile(name, "1", directory, problem=f"cannot read {directory}: {error.strerror}")]
    there = list(filter(is_version, entries))
    strays = [_stray(name, directory / entry) for entry in sorted(entries) if _is_stray(directory / entry)]
    if not there:
        problem = f"{directory} has no version directory; put the model at {name}/1/model.onnx"
        return strays or [ModelFile(name, "1", directory, problem=problem)]
    try:
        config = load_config(directory / "model.toml", device)
    except ConfigError as error:
        version = wanted("latest", there)[0]
        return [ModelFile(name, version, directory / version / "model.onnx", problem=str(error))]
    return [
        _find_version(name, directory / version, config) for version in wanted(config.version_policy, there)
    ] + strays


def _find_version(name: str, directory: Path, config: ModelConfig) -> ModelFile:
    path = directory / "model.onnx"
    return ModelFile(name, directory.name, path, config, "" if path.is_file() else f"{path} does not exist")


def _is_stray(directory: Path) -> bool:
    """Whether it holds a model that its name keeps from being a version."""
    name = directory.name
    return not is_version(name) and not name.startswith(".") and (directory / "model.onnx").is_file()


def _stray(name: str, directory: Path) -> ModelFile:
    problem = f"{directory} is no version: its name is no whole number without leading zeros; rename it"
    return ModelFile(name, _shown(directory.name), directory / "model.onnx", problem=problem)


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
