"""Where models lie on disk: ``MODELS/<name>/<version>/model.onnx``, with ``MODELS/<name>/model.toml``, or one file.

Where there is no model.toml, Triton's ``MODELS/<name>/config.pbtxt`` is read, if it is there (see tritonconfig.py).

Which of a model's versions are served is a matter of its ``version_policy`` (see versions.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.wire.messages import MAX_NAME
from penstock.worker.config import CPU, ConfigError, ModelConfig, default_config, load_config
from penstock.worker.tritonconfig import FILE_NAME, MODEL_FILE_NAME, Declared, TritonConfig, load_triton
from penstock.worker.versions import is_version, wanted

_DEFAULTS: Final = ModelConfig()


class RepositoryError(Exception):
    """There is nothing to serve here; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A version of a model to be served, or (with ``problem``, a sentence) one that cannot be. ``config_name``: of the
    file that ``config`` is from, if it is from one; ``unheeded``: what that asks for and does not get, a sentence each;
    ``declared``: the inputs and outputs that it names."""

    name: str
    version: str
    path: Path
    config: ModelConfig = _DEFAULTS
    problem: str = ""
    config_name: str = "model.toml"
    unheeded: tuple[str, ...] = ()
    declared: tuple[Declared, ...] = ()


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
    return [ModelFile(_shown(path.stem), "1", path, default_config(device), check_name(path.stem))]


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
    problem = check_name(name)
    if problem:
        return [ModelFile(_shown(name), "1", directory, problem=problem)]
    try:
        entries = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    except OSError as error:
        return [ModelFile(name, "1", directory, problem=f"cannot read {directory}: {error.strerror}")]
    there = list(filter(is_version, entries))
    strays = [_stray(name, directory / entry) for entry in sorted(entries) if _is_stray(directory / entry)]
    try:
        found, config_name = _configuration(directory, device)
    except ConfigError as error:
        version = wanted("latest", there)[0] if there else "1"
        return [ModelFile(name, version, directory / version / MODEL_FILE_NAME, problem=str(error))]
    if not there:
        problem = f"{directory} has no version directory; put the model at {name}/1/{found.file_name}"
        return strays or [ModelFile(name, "1", directory, problem=problem)]
    versions = wanted(found.config.version_policy, there)
    return [_find_version(name, directory / version, found, config_name) for version in versions] + strays


def _configuration(directory: Path, device: str) -> tuple[TritonConfig, str]:
    """A model's configuration, and the name of the file that it is from. Raises ConfigError."""
    own = directory / "model.toml"
    if not own.exists():
        try:
            return load_triton(directory / FILE_NAME, directory.name, device), FILE_NAME
        except FileNotFoundError:
            pass
    return TritonConfig(load_config(own, device)), own.name


def _find_version(name: str, directory: Path, found: TritonConfig, config_name: str) -> ModelFile:
    path = directory / found.file_name
    if path.is_dir():
        path /= MODEL_FILE_NAME  # as Triton has models whose weights lie in files beside them
    problem = "" if path.is_file() else f"{path} does not exist"
    return ModelFile(name, directory.name, path, found.config, problem, config_name, found.unheeded, found.declared)


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


def check_name(name: str) -> str:
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
