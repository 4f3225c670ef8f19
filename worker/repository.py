"""Where models lie on disk: ``MODELS/<name>/<version>/model.onnx``, with ``MODELS/<name>/model.toml``, or one file.

Where there is no model.toml, Triton's ``MODELS/<name>/config.pbtxt`` is read, if it is there (see tritonconfig.py).

``MODELS/<name>/<version>/warmup``, or ``MODELS/<name>/warmup`` for all versions, has recorded requests (see warmup.py).

Which of a model's versions are served is a matter of its ``version_policy``, labels and traffic (see versions.py).

Nothing here is believed to stay as it is: a directory may vanish while it is looked at, and what cannot be read or
followed is a sentence about one model, beside which the others are served.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from penstock.wire.messages import MAX_MODELS, MAX_NAME
from penstock.wire.models import MAX_ROUTES, Route
from penstock.worker.config import CPU, ConfigError, ModelConfig, check_config, default_config, load_config
from penstock.worker.tritonconfig import (
    FILE_NAME,
    MODEL_FILE_NAME,
    TRITON_KEYS,
    Declared,
    TritonConfig,
    load_triton,
    read_triton_json,
)
from penstock.worker.versions import asked_for, is_version, wanted

WARM_UP: Final = "warmup"  # a directory of recorded requests, of a version or else of all versions of a model
CONFIG_NAMES: Final = ("model.toml", FILE_NAME)
# Versions of all models that are served; others may be on their way out beside them, and all are in one message.
VERSIONS_MAX: Final = MAX_MODELS // 2
ENTRIES_MAX: Final = 4096  # of a directory that is looked at
_FILES_MAX: Final = 1024  # that a version is made of
_DEPTH_MAX: Final = 3  # of directories in a version
_INSIDE_MAX: Final = 64  # directories in one of a model, or of a version, that are watched with it
_OTHERS_MAX: Final = 4  # versions that nothing asks for, the newest, which may stand in
_NAMED_MAX: Final = 3  # files in a sentence
_DEFAULTS: Final = ModelConfig()
_NS: Final = 1_000_000_000

# Of each file: its name, device, inode, size, and when its content and what is known of it were changed.
Fingerprint: TypeAlias = tuple[tuple[str, int, int, int, int, int], ...]


class RepositoryError(Exception):
    """There is nothing to serve here; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A version of a model to be served, or (with ``problem``, a sentence) one that cannot be. ``config_name``: of the
    file that ``config`` is from, if it is from one; ``unheeded``: what that asks for and does not get, a sentence each;
    ``declared``: the inputs and outputs that it names. ``warmup``: where requests lie that are run before it serves,
    if anywhere. ``note``: what else there is to say of it. ``fingerprint``: by which a change of its files is seen.
    ``labels``: files that say what the classes of its outputs are called, by output."""

    name: str
    version: str
    path: Path
    config: ModelConfig = _DEFAULTS
    problem: str = ""
    config_name: str = "model.toml"
    unheeded: tuple[str, ...] = ()
    declared: tuple[Declared, ...] = ()
    warmup: Path | None = None
    note: str = ""
    fingerprint: Fingerprint = field(default=(), compare=False)
    labels: tuple[tuple[str, Path], ...] = ()

    @property
    def mark(self) -> tuple[object, ...]:
        """What it is made of: it is to be loaded anew when that changes, and not when only requests go elsewhere."""
        config = msgspec.structs.replace(self.config, version_policy="latest", labels={}, traffic={}, devices=None)
        return self.fingerprint, config, self.path, self.problem, self.unheeded, self.declared

    @property
    def nbytes(self) -> int:
        """Of its files."""
        return sum([each[3] for each in self.fingerprint])

    @property
    def changed_ns(self) -> int:
        """When any of its files was changed last, as a time of day; 0: it has none."""
        return max((max(each[4:]) for each in self.fingerprint), default=0)


@dataclass(frozen=True, slots=True)
class Found:
    """A model as it lies there. ``files``: the versions that ``route`` speaks of, the newest first; ``others``: the
    newest of those that are there beside them; ``strays``: what is no version and looks like one. ``hollow``: no
    version is there, or can be seen; then ``files`` has one that says why. ``config``: by which a change of its
    configuration is seen; ``problem``: why that cannot be followed, so that the one before it is. ``directories``: that
    were looked at."""

    name: str
    route: Route
    files: tuple[ModelFile, ...] = ()
    others: tuple[ModelFile, ...] = ()
    strays: tuple[ModelFile, ...] = ()
    hollow: bool = False
    config: Fingerprint = ()
    problem: str = ""
    directories: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """A repository as it is at a time. ``names``: the models that were looked at, None: all. ``problem``: why nothing
    could be seen, or is there. ``at_ns``: the time of day."""

    models: Mapping[str, Found]
    names: frozenset[str] | None = None
    problem: str = ""
    at_ns: int = 0


def find_models(path: Path, device: str | None = None) -> list[ModelFile]:
    """What a repository has to serve: of each model the versions that its policy asks for and that labels and traffic
    name, the newest first; or the model in a file. ``device``: of the worker that is to load them, as they run there;
    None: of any, as they run on the CPU. Links may lead anywhere. Raises RepositoryError."""
    look = Repository(path, device, links_out=True).look()
    if look.problem:
        raise RepositoryError(look.problem)
    return [file for found in look.models.values() for file in (*found.files, *found.strays)]


class _Kept(NamedTuple):
    """A configuration that could be followed, and what it was read from."""

    stamp: Fingerprint
    override: str
    found: TritonConfig
    name: str


class Repository:
    """A repository that is looked at again and again. ``path`` may be a file. ``device``: as for find_models.
    ``links_out``: whether links may lead out of it."""

    def __init__(self, path: Path, device: str | None = CPU, links_out: bool = False) -> None:
        self.path = path
        self._device = device or CPU
        self._any_device = device is None
        self._links_out = links_out
        self._kept: dict[str, _Kept] = {}  # by model

    @property
    def is_file(self) -> bool:
        return self.path.suffix == ".onnx" and not os.path.isdir(self.path)

    def look(
        self, names: Collection[str] | None = None, loads: Mapping[str, str] | None = None, at_ns: int = 0
    ) -> Look:
        """At models of these names, or all; ``loads``: at none but those, which have these configurations as JSON in
        place of their own, where there is one. Raises nothing."""
        try:
            models = dict(self._models(names, loads))
        except RepositoryError as error:
            return Look({}, None, str(error), at_ns)
        except OSError as error:
            return Look({}, None, f"cannot read {self.path}: {error.strerror}", at_ns)
        if names is None:
            self._kept = {name: kept for name, kept in self._kept.items() if name in models}
        return Look(models, None if names is None else frozenset(names), "", at_ns)

    def _models(self, names: Collection[str] | None, loads: Mapping[str, str] | None) -> Iterator[tuple[str, Found]]:
        root = self.path
        if not os.path.isdir(root):
            if not os.path.exists(root):
                raise RepositoryError(f"{root} does not exist; give an .onnx file or a model repository")
            if root.suffix != ".onnx":
                raise RepositoryError(f"{root} is neither a directory nor an .onnx file")
            found = self._find_file()
            yield found.name, found
            return
        real = _real(root)
        left = VERSIONS_MAX
        for directory in self._directories(names, loads):
            found = self._find(directory, real, "" if loads is None else loads.get(_shown(directory.name), ""))
            left -= len(found.files) + len(found.strays)
            if left < 0:
                problem = f"{root} holds more than the {VERSIONS_MAX} versions that are served; this one is left out"
                missing = replace(_missing(found.name, directory, problem), config=found.config)
                if left < -VERSIONS_MAX:
                    return
                found = missing
            yield found.name, found
        for name in sorted(loads.keys() if loads is not None else ()):
            if (names is None or name in names) and not os.path.isdir(root / name):
                yield name, _missing(name, root / name, f"there is no model '{name[:80]}' in {root}")

    def _directories(self, names: Collection[str] | None, loads: Mapping[str, str] | None) -> list[Path]:
        """Of models, in the order of their names. Raises RepositoryError when there are none."""
        root = self.path
        if names is not None or loads is not None:
            chosen = set(loads or ()) if names is None else set(names) & set(loads) if loads is not None else set(names)
            if chosen <= {each for each in chosen if _is_plain(each)}:
                return [root / name for name in sorted(chosen) if _may_be_model(root / name)]
        entries = sorted(entry for entry in _entries(root) if _may_be_model(entry) and not entry.name.startswith("."))
        if not entries:
            hint = ""
            if loose := sorted(root.glob("*.onnx")):
                name = loose[0]
                hint = f"; {name.name} lies beside it: move it to {root}/{name.stem}/1/model.onnx, or give the file"
            raise RepositoryError(f"{root} holds no models: a repository has the form NAME/VERSION/model.onnx{hint}")
        if all(is_version(entry.name) for entry in entries) and any(
            os.path.exists(each / "model.onnx") for each in entries
        ):
            raise RepositoryError(f"{root} is one model, not a repository; give {_real(root).parent} instead")
        return [each for each in entries if _may_look(_shown(each.name), names, loads)]

    def _find_file(self) -> Found:
        """The model in a file."""
        name = _shown(self.path.stem)
        config = default_config(self._device)
        file = ModelFile(name, "1", self.path, config, check_name(self.path.stem), fingerprint=_stamp(self.path))
        return Found(name, Route(name, ("1",)), (file,), directories=(self.path.parent,))

    def _find(self, directory: Path, root: Path, override: str) -> Found:
        name = directory.name
        if problem := check_name(name) or self._leads_out(directory, root):
            return _missing(_shown(name), directory, problem)
        try:
            entries = [entry.name for entry in _entries(directory) if os.path.isdir(entry)]
        except OSError as error:
            return _missing(name, directory, f"cannot read {directory}: {error.strerror}")
        there = list(filter(is_version, entries))
        strays = tuple([_stray(name, directory / each) for each in sorted(entries) if _is_stray(directory / each)])
        stamp = tuple([part for each in CONFIG_NAMES for part in _stamp(directory / each)])
        problem = ""
        try:
            kept = self._configuration(directory, stamp, override)
        except ConfigError as error:
            problem = str(error)
            before = self._kept.get(name)
            if before is None:
                version = wanted("latest", there)[0] if there else "1"
                file = ModelFile(name, version, directory / version / MODEL_FILE_NAME, problem=problem)
                return Found(name, Route(name, (version,)), (file,), (), (), False, stamp, "", (directory,))
            kept = before
        found = kept.found
        config = found.config
        if not (self._any_device or config.loaded_on(self._device)):
            return Found(name, Route(name), config=stamp, directories=(directory,))
        # What is no version yet may become one that is wrong.
        besides = [each for each in entries if not is_version(each) and not each.startswith(".")]
        looked = [directory, *[directory / each for each in besides[:_INSIDE_MAX]]]
        if not there and not strays:
            lacking = f"{directory} has no version directory; put the model at {name}/1/{found.file_name}"
            missing = _missing(name, directory, lacking)
            return replace(missing, config=stamp, problem=problem, directories=tuple(looked))
        asked = asked_for(config.version_policy, there) if there else []
        route = Route(name, tuple(asked), _labels(config), tuple(config.traffic.items())[:MAX_ROUTES])
        versions = wanted(config.version_policy, there, config.labels, config.traffic) if there else []
        files = [self._find_version(name, directory / each, kept, root) for each in versions]
        beside = [each for each in sorted(there, key=int, reverse=True) if each not in versions][:_OTHERS_MAX]
        others = [self._find_version(name, directory / each, kept, root) for each in beside]
        for each in dict.fromkeys((*versions, *beside)):
            looked += _directories_of(directory / each) if each in there else ()
        return Found(name, route, tuple(files), tuple(others), strays, not there, stamp, problem, tuple(looked))

    def _configuration(self, directory: Path, stamp: Fingerprint, override: str) -> _Kept:
        """A model's configuration, which is read when its file has changed. Raises ConfigError."""
        name = directory.name
        kept = self._kept.get(name)
        if kept is None or (kept.stamp, kept.override) != (stamp, override):
            found, file_name = _configuration(directory, self._device)
            if override:
                found = _override(found, override, name, self._device)
            kept = self._kept[name] = _Kept(stamp, override, found, file_name)
        return kept

    def _find_version(self, name: str, directory: Path, kept: _Kept, root: Path) -> ModelFile:
        found = kept.found
        path = directory / found.file_name
        if os.path.isdir(path):
            path /= MODEL_FILE_NAME  # as Triton has models whose weights lie in files beside them
        warmup = next((each / WARM_UP for each in (directory, directory.parent) if os.path.isdir(each / WARM_UP)), None)
        note = problem = ""
        fingerprint: Fingerprint = ()
        try:
            fingerprint = tuple(_fingerprint(directory, ""))
            if warmup is not None and warmup.parent != directory:
                fingerprint += tuple(_fingerprint(warmup, f"../{WARM_UP}/"))
            for each in dict.fromkeys(found.config.class_labels.values()):
                fingerprint += _stamp(directory.parent / each, f"../{each}")
            problem = self._problem_of_version(directory, path, fingerprint, root)
            note = "" if problem else _beside(path)
        except FileNotFoundError:
            problem = f"{path} does not exist"
        except OSError as error:
            problem = f"cannot read {directory}: {error.strerror}"
        labels = tuple([(output, directory.parent / each) for output, each in found.config.class_labels.items()])
        told = found.unheeded, found.declared, warmup, note, fingerprint, labels
        return ModelFile(name, directory.name, path, found.config, problem, kept.name, *told)

    def _problem_of_version(self, directory: Path, path: Path, fingerprint: Fingerprint, root: Path) -> str:
        if out := self._leads_out(directory, root):
            return out
        if len(fingerprint) > _FILES_MAX:
            return f"{directory} holds more than {_FILES_MAX} files; keep there what the model is made of alone"
        if not os.path.isfile(path):
            kind = "is no file" if os.path.lexists(path) else "does not exist"
            return f"{path} {kind}{_instead(path)}"
        for each in fingerprint:
            if not each[0].startswith(f"../{WARM_UP}/") and (out := self._leads_out(directory / each[0], root)):
                return out
        return ""

    def _leads_out(self, path: Path, root: Path) -> str:
        """That a path is a link, or lies behind one, that leads out of the repository; or ""."""
        if self._links_out:
            return ""
        real = _real(path)
        if real.is_relative_to(root):
            return ""
        return (
            f"{path} leads to {real}, outside of the repository; copy it to where the link is, or allow such links: "
            "links_out = true in [worker] of penstock.toml"
        )


def _may_look(name: str, names: Collection[str] | None, loads: Mapping[str, str] | None) -> bool:
    return (names is None or name in names) and (loads is None or name in loads)


def _may_be_model(path: Path) -> bool:
    """Whether it is a directory, or a link to what is not there now, as when a file system is not mounted."""
    return os.path.isdir(path) or (os.path.islink(path) and not os.path.exists(path))


def _is_plain(name: str) -> bool:
    """Whether a model's name is that of a directory right inside of its repository."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and "?" not in name


def _missing(name: str, directory: Path, problem: str) -> Found:
    file = ModelFile(name, "1", directory, problem=problem)
    looked = (directory,) if os.path.isdir(directory) else ()
    return Found(name, Route(name, ("1",)), (file,), hollow=True, directories=looked)


def _labels(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    return tuple([(label, str(version)) for label, version in config.labels.items()])[:MAX_ROUTES]


def _override(found: TritonConfig, text: str, name: str, device: str) -> TritonConfig:
    """A configuration with what an order says in place of it: keys of a model.toml, or all of Triton's. Raises
    ConfigError."""
    where = f"the configuration that model '{name}' is to be loaded with"
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is a JSON object with keys of a model.toml, or Triton's, not {text[:40]!r}")
    policy = values.get("version_policy")
    if not _is_own(values) and (TRITON_KEYS & values.keys() or isinstance(policy, dict)):
        return read_triton_json(text, where, name, device)
    # Of the file's own keys it has those that differ from the defaults: what is not said is as before.
    own = {key: value for key, value in msgspec.to_builtins(found.config).items() if value is not None}
    return replace(found, config=check_config({**own, **values}, where))


def _is_own(values: Mapping[str, Any]) -> bool:
    """Whether all keys are those of a model.toml, and mean what they mean there."""
    policy = values.get("version_policy")
    means = not isinstance(policy, dict) or all(isinstance(each, int) for each in policy.values())
    return means and values.keys() <= set(ModelConfig.__struct_fields__)


def _real(path: Path) -> Path:
    """Where links lead. What cannot be followed, such as a link to itself, stays as it is: nothing is raised."""
    return Path(os.path.realpath(path))


def _entries(directory: Path) -> list[Path]:
    """No more than ENTRIES_MAX, without an order. Raises OSError, also where their names alone may be read."""
    with os.scandir(directory) as found:
        entries = [directory / entry.name for entry, _ in zip(found, range(ENTRIES_MAX), strict=False)]
    if not os.access(directory, os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return entries


def _stamp(path: Path, name: str = "") -> Fingerprint:
    """Of one file; nothing if it is not there."""
    try:
        about = path.stat()
    except OSError:
        return ()
    times = about.st_mtime_ns, about.st_ctime_ns
    return ((name or path.name, about.st_dev, about.st_ino, about.st_size, *times),)


def _fingerprint(directory: Path, prefix: str, depth: int = 1) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Of all files in a directory, and some more than _FILES_MAX at most. Raises OSError."""
    count = 0
    for path in sorted(_entries(directory)):
        try:
            if os.path.isdir(path):
                parts = list(_fingerprint(path, f"{prefix}{path.name}/", depth + 1)) if depth < _DEPTH_MAX else []
            else:
                parts = list(_stamp(path, prefix + path.name))
        except FileNotFoundError:
            continue  # it has just been removed
        yield from parts
        count += len(parts)
        if count > _FILES_MAX:
            return


def _models_beside(path: Path) -> list[str]:
    """Names of other model files in the directory of one."""
    return sorted(each.name for each in _entries(path.parent) if each.suffix == ".onnx" and each != path)


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED_MAX]) + (" and others" if len(names) > _NAMED_MAX else "")


def _instead(path: Path) -> str:
    """What lies where a model file should, and what to do about it; or ""."""
    try:
        names = _models_beside(path)
    except OSError:
        return ""
    if not names:
        return ""
    which = f"rename it to {path.name}" if len(names) == 1 else f"rename the one that is meant to {path.name}"
    return f"; {_named(names)} {'is' if len(names) == 1 else 'are'} there: {which}"


def _beside(path: Path) -> str:
    """That other models lie beside the one that is served, as a sentence; or ""."""
    names = _models_beside(path)
    if not names:
        return ""
    return f"{path.name} is served, and not {_named(names)} beside it: a version is one model"


def _configuration(directory: Path, device: str) -> tuple[TritonConfig, str]:
    """A model's configuration, and the name of the file that it is from. Raises ConfigError."""
    own = directory / "model.toml"
    if not os.path.exists(own):
        try:
            return load_triton(directory / FILE_NAME, directory.name, device), FILE_NAME
        except FileNotFoundError:
            pass
    return TritonConfig(load_config(own, device)), own.name


def _directories_of(version: Path, depth: int = 1) -> list[Path]:
    """Where the files of a version may lie: what comes into a directory is seen only where it is watched."""
    found = [version]
    if depth < _DEPTH_MAX:
        try:
            entries = sorted(_entries(version))
        except OSError:
            return found
        for path in entries:
            if os.path.isdir(path):
                found += _directories_of(path, depth + 1)
    return found[:_INSIDE_MAX]


def _is_stray(directory: Path) -> bool:
    """Whether it holds a model that its name keeps from being a version."""
    name = directory.name
    return not is_version(name) and not name.startswith(".") and os.path.isfile(directory / "model.onnx")


def _stray(name: str, directory: Path) -> ModelFile:
    problem = f"{directory} is no version: its name is no whole number without leading zeros; rename it"
    shown = "".join([each if each.isprintable() else "?" for each in _shown(directory.name)])
    return ModelFile(name, shown, directory / "model.onnx", problem=problem)


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
