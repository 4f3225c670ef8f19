"""TensorFlow Serving's ``model_config_list``, turned into a model repository that leads to the same files.

A model whose newest version is served becomes one link to its base path, so what comes there later is seen here. For
any other policy there has to be a model.toml, which has no business in a directory that is TensorFlow Serving's: then
it is a directory of our own, with a link to each version. What to do is decided by ``plan``, and done by ``perform``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from penstock.bin.modeltoml import to_toml
from penstock.worker.config import ConfigError, ModelConfig, problem_of_label
from penstock.worker.repository import check_name
from penstock.worker.textformat import Schema, read_text
from penstock.worker.versions import NAMED_MAX, VersionPolicy, is_version, wanted

_SCHEMA: Final = Schema(
    "tfserving",
    {
        "ModelServerConfig": "model_config_list:ModelConfigList|custom_model_config:Any",
        "ModelConfigList": "config:ModelConfig*",
        "ModelConfig": (
            "name:string base_path:string model_type:ModelType model_platform:string "
            "model_version_policy:ServableVersionPolicy version_labels:{string,int64} logging_config:LoggingConfig"
        ),
        "ServableVersionPolicy": "latest:Latest|all:All|specific:Specific",
        "Latest": "num_versions:uint32",
        "All": "",
        "Specific": "versions:int64*",
        "LoggingConfig": "log_collector_config:LogCollectorConfig sampling_config:SamplingConfig",
        "LogCollectorConfig": "type:string filename_prefix:string",
        "SamplingConfig": "sampling_rate:double attributes:int32",
        "Any": "type_url:string value:bytes",
    },
    {"ModelType": "MODEL_TYPE_UNSPECIFIED TENSORFLOW OTHER"},
)
_ADVICE: Final = "if it is of a newer TensorFlow Serving, leave it out of a copy of the file, and import that"
_VERSION: Final = re.compile(r"\d{1,18}", re.ASCII)  # there a version's name may begin with zeros
_REMOTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the list. ``warnings``: what is said of it and has no effect here."""

    name: str
    base: Path
    policy: VersionPolicy
    warnings: tuple[str, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Version:
    """A directory of a base path, which has this name and holds one of these files, or none."""

    name: str
    has_onnx: bool = True
    has_saved_model: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    path: Path
    target: Path


@dataclass(frozen=True, slots=True)
class Write:
    path: Path
    text: str


Step = Link | Write


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do for a model. ``problems``: why some of it, or all where there are no steps, cannot be served."""

    steps: tuple[Step, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_list(path: Path) -> list[Served]:
    """Raises FileNotFoundError and ConfigError."""
    return parse_list(read_text(path), str(path))


def parse_list(text: str, where: str) -> list[Served]:
    """The models in a text; ``where`` is its file's name, for messages. Raises ConfigError."""
    message = _SCHEMA.parse("ModelServerConfig", text, where, _ADVICE)
    if message.HasField("custom_model_config"):
        raise ConfigError(f"{where}: custom_model_config: only a model_config_list says where models lie")
    models = [
        _read_model(each, f"{where}: model_config_list.config[{index}]")
        for index, each in enumerate(message.model_config_list.config)
    ]
    if not models:
        raise ConfigError(f"{where}: it names no models; it takes model_config_list {{ config {{ ... }} }}")
    names = [each.name for each in models]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"{where}: model_config_list.config[{index}].name: {name!r} is there twice; rename one")
    return models


def _read_model(config: Any, where: str) -> Served:
    name, base = config.name, config.base_path
    problem = check_name(name)
    if problem or not name or name.startswith(".") or "/" in name:
        raise ConfigError(f"{where}.name: {problem or f'{name!r} cannot be the name of a directory; change it'}")
    if _REMOTE.match(base):
        raise ConfigError(f"{where}.base_path: {base[:80]!r} is not on this machine; copy it here, and name the copy")
    if not base.startswith("/") or not base.isprintable():
        raise ConfigError(f"{where}.base_path: {base[:80]!r} is no absolute path; make it one")
    warnings = []
    labels = dict(sorted(config.version_labels.items()))
    for label, number in labels.items():
        if problem := problem_of_label(label) or ("" if is_version(str(number)) else f"{number} is no version"):
            raise ConfigError(f"{where}.version_labels: {label!r}: {problem}")
    if config.HasField("logging_config"):
        warnings.append("logging_config is left out: requests are not logged; penstock up --record keeps a trace")
    return Served(name, Path(base), _policy(config.model_version_policy, where), tuple(warnings), labels)


def _policy(policy: Any, where: str) -> VersionPolicy:
    path = f"{where}.model_version_policy"
    if policy.HasField("all"):
        return "all"
    if policy.HasField("specific"):
        numbers = tuple(policy.specific.versions)
        if not 1 <= len(numbers) <= NAMED_MAX or not all(0 <= each < 10**18 for each in numbers):
            raise ConfigError(f"{path}.specific.versions: name 1 to {NAMED_MAX} of them, from 0 to {10**18 - 1}")
        return numbers
    count: int = policy.latest.num_versions or 1
    if count > NAMED_MAX:
        raise ConfigError(f"{path}.latest.num_versions: {count} is more than {NAMED_MAX}; write all {{ }}")
    return "latest" if count == 1 else {"latest": count}


def find_versions(base: Path) -> list[Version]:
    """Raises OSError."""
    return [
        Version(each.name, (each / "model.onnx").is_file(), (each / "saved_model.pb").is_file())
        for each in sorted(base.iterdir())
        if _VERSION.fullmatch(each.name) and each.is_dir()
    ]


def plan(model: Served, versions: Sequence[Version], into: Path) -> Plan:
    """What to make of a model of which these versions are there, in a repository."""
    there = {str(int(each.name)): each for each in versions}
    if not there:
        return Plan(problems=(f"{model.base} has no version directory, such as {model.base}/1",))
    asked = wanted(model.policy, there, model.labels)
    problems = tuple(_lacking(model.base, number, there.get(number)) for number in asked)
    problems = tuple(filter(None, problems))
    if len(problems) == len(asked):
        return Plan(problems=problems, warnings=model.warnings)
    home = into / model.name
    if model.policy == "latest" and not model.labels and all(number == each.name for number, each in there.items()):
        return Plan((Link(home, model.base),), problems, model.warnings)
    text = to_toml(ModelConfig(version_policy=model.policy, labels=dict(model.labels)))
    links = [Link(home / number, model.base / each.name) for number, each in there.items() if each.has_onnx]
    if isinstance(model.policy, tuple):
        links = [each for each in links if each.path.name in asked]
        return Plan((Write(home / "model.toml", text), *links), problems, model.warnings)
    later = f"what comes to {model.base} later is not seen at {home}; import again then"
    return Plan((*([Write(home / "model.toml", text)] if text else []), *links), problems, (*model.warnings, later))


def _lacking(base: Path, number: str, version: Version | None) -> str:
    """Why a version cannot be served, or ""."""
    if version is None:
        return f"{base}/{number} is not there, and the version policy names it"
    path = base / version.name
    if version.has_onnx:
        return ""
    if version.has_saved_model:
        return (
            f"{path} holds a saved_model.pb, and only ONNX models are served: python -m tf2onnx.convert "
            f"--saved-model {path} --output {path}/model.onnx"
        )
    return f"{path}/model.onnx does not exist"


def perform(steps: Sequence[Step], dry_run: bool) -> Iterator[str]:
    """Do it, and say what was done. What is there already is left, and never replaced: FileExistsError, before
    anything is done, where it is something else. Raises OSError."""
    left = [step for step in steps if not _is_done(step)]
    for step in left:
        if os.path.lexists(step.path):
            raise FileExistsError(f"{step.path} is there, and is something else; move it away, or import elsewhere")
    for step in steps:
        if step not in left:
            yield f"{step.path} is there"
            continue
        if not dry_run:
            step.path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(step, Link):
            if not dry_run:
                step.path.symlink_to(step.target, target_is_directory=True)
            yield f"{'would link' if dry_run else 'linked'} {step.path} to {step.target}"
        else:
            if not dry_run:
                with step.path.open("x", encoding="utf-8") as file:
                    file.write(step.text)
            yield f"{'would write' if dry_run else 'wrote'} {step.path}: {step.text.strip()}"


def _is_done(step: Step) -> bool:
    if isinstance(step, Link):
        return step.path.is_symlink() and step.path.readlink() == step.target
    return step.path.is_file() and step.path.read_text(encoding="utf-8", errors="replace") == step.text
