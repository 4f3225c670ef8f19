"""The directory of a model in a repository, as commands read and change it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from penstock.bin.asking import Server
from penstock.bin.files import write_whole
from penstock.bin.modeltoml import EditError, to_toml

if TYPE_CHECKING:
    from penstock.worker.config import ModelConfig

# Beside a pin, so that going forward again is one command, too.
_BEFORE: Final = re.compile(r"^# before the rollback: (version_policy = [^\r\n]*)\r?\n", re.MULTILINE)


class ModelDirError(Exception):
    """What is there cannot be used, or not be changed; the message is a sentence."""


def find_repository(server: Server, models: Path | None) -> Path:
    """``models``, or else where the server's models lie. Raises ModelDirError, and PenstockError where none answers."""
    if models is not None:
        return models
    if isinstance(server.address, str) and server.address.startswith("tcp:"):
        raise ModelDirError(
            f"the models of {server.address} lie on its host; run this there, or name them with --models"
        )
    with server.connect() as client:
        found = client.repository()
    if not found:
        raise ModelDirError(
            "the server has not said where its models lie: no worker has joined it; name them with --models"
        )
    return Path(found)


class ModelDir:
    """``path``: the directory, which need not be there. ``toml``, ``pbtxt``: its configuration, if one of them is."""

    def __init__(self, repository: Path, name: str) -> None:
        """Raises ModelDirError for what can be no model."""
        from penstock.client.publish import check_model

        if problem := check_model(name):
            raise ModelDirError(problem)
        if not repository.is_dir():
            raise ModelDirError(f"{repository} is no model repository: a directory of the form NAME/VERSION/model.onnx")
        self.name = name
        self.path = repository / name
        self.toml = self.path / "model.toml"
        self.pbtxt = self.path / "config.pbtxt"

    @property
    def config_path(self) -> Path | None:
        return next((path for path in (self.toml, self.pbtxt) if path.exists()), None)

    def versions(self) -> list[str]:
        """Those that are there, the newest first. Raises ModelDirError when it cannot be read."""
        from penstock.worker.versions import is_version

        try:
            return sorted((each.name for each in self.path.iterdir() if is_version(each.name)), key=int, reverse=True)
        except FileNotFoundError:
            raise ModelDirError(f"there is no model '{self.name}' in {self.path.parent}") from None
        except OSError as error:
            raise ModelDirError(f"cannot read {self.path}: {error.strerror}") from None

    def check_version(self, version: str) -> None:
        """Raises ModelDirError when it is not there."""
        there = self.versions()
        if version not in there:
            raise ModelDirError(f"model '{self.name}' has no version {version}; it has {', '.join(there) or 'none'}")

    def config(self) -> ModelConfig:
        """Raises ModelDirError for one that cannot be followed."""
        return self._read()[0]

    def file_name(self) -> str:
        """Of a version's ONNX file. Raises ModelDirError."""
        return self._read()[1]

    def _read(self) -> tuple[ModelConfig, str]:
        from penstock.worker.config import ConfigError, load_config
        from penstock.worker.tritonconfig import load_triton

        try:
            if self.config_path == self.pbtxt:
                found = load_triton(self.pbtxt, self.name)
                return found.config, found.file_name
            return load_config(self.toml), "model.onnx"
        except (ConfigError, OSError) as error:
            raise ModelDirError(str(error)) from None

    def change(self, what: Callable[[str], str], otherwise: str) -> None:
        """Write another model.toml, which all else in it stays in. ``what``: its text as it is to be; ``otherwise``:
        what to say in a config.pbtxt, where that is what configures the model. Raises ModelDirError, and then nothing
        has changed."""
        from penstock.worker.config import ConfigError, load_config

        if self.config_path == self.pbtxt:
            raise ModelDirError(
                f"{self.pbtxt} is the configuration of model '{self.name}', and is changed by hand: {otherwise}"
            )
        try:
            # As it is: to be read as text would take its line ends for others.
            text = what(self.toml.read_bytes().decode("utf-8") if self.toml.exists() else "")
            with tempfile.TemporaryDirectory() as directory:  # judged before anybody else can see it
                beside = Path(directory) / "model.toml"
                beside.write_bytes(text.encode())
                try:
                    load_config(beside)
                except ConfigError as error:
                    raise ModelDirError(str(error).replace(str(beside), str(self.toml))) from None
            write_whole(self.toml, text)
        except EditError as error:
            raise ModelDirError(f"{self.toml}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelDirError(f"{self.toml} cannot be changed: {getattr(error, 'strerror', None) or error}") from None


def pin(text: str, version: str, before: ModelConfig) -> str:
    """A model.toml that asks for this version alone, and says what it asked for ``before`` any such change. Raises
    EditError."""
    from penstock.bin.modeltoml import edit
    from penstock.worker.config import ModelConfig

    policy = to_toml(ModelConfig(version_policy=before.version_policy)) or 'version_policy = "latest"\n'
    end = "\r\n" if "\r\n" in text else "\n"
    said = "" if _BEFORE.search(text) else f"# before the rollback: {policy.rstrip()}{end}"
    return said + edit(text, {"version_policy": [int(version)]})


def unpin(text: str) -> str | None:
    """A model.toml as it was before a rollback; None: there was none. Raises EditError."""
    import tomllib

    from penstock.bin.modeltoml import edit

    match = _BEFORE.search(text)
    values = tomllib.loads(text)
    if match is None:
        policy = values.get("version_policy")
        return edit(text, {"version_policy": None}) if isinstance(policy, list) and len(policy) == 1 else None
    try:
        before = tomllib.loads(match[1])["version_policy"]
    except (tomllib.TOMLDecodeError, KeyError):
        raise EditError(
            f"its comment '{match[0].strip()}' is not as it was written; set version_policy by hand"
        ) from None
    rest = text[: match.start()] + text[match.end() :]
    return edit(rest, {"version_policy": None if before == "latest" else before})
