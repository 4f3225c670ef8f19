"""New versions of models in a repository that servers read at the same time: written aside, and renamed once they are
whole and on the disk, so that nobody sees half of one.

The gateway and the commands share it. What the files hold is not looked at here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, TypeAlias

from penstock.wire.messages import MAX_NAME
from penstock.wire.tensors import Buffer

MODEL_FILE: Final = "model.onnx"
FILES_MAX: Final = 1000  # of one version
_CLASHES_MAX: Final = 100  # numbers that others took first, before it is given up
_LEFTOVER_S: Final = 86_400.0  # what was being written so long ago is nobody's any more
_ASIDE: Final = re.compile(r"\.[0-9a-f]{16}\.tmp")
_VERSION: Final = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
_VERSION_MAX: Final = 10**18 - 1
_TAKEN: Final = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

# What a file is to hold: what another does, or parts one after another.
Content: TypeAlias = "Path | Iterable[Buffer]"


class PublishError(Exception):
    """Nothing was published, and nothing is left behind; the message is a sentence."""


def check_model(name: str) -> str:
    """Why a model cannot have this name, or ""."""
    if not name:
        return "a model has a name"
    if name.startswith(".") or "/" in name:
        return f"a model's name is one of a directory, without / and without a dot in front, not {name[:40]!r}"
    if len(name) > MAX_NAME or not name.isprintable():
        return f"a model's name has at most {MAX_NAME} characters, all of which can be printed; not {name[:40]!r}"
    return ""


def check_version(version: str) -> str:
    """Why a version cannot have this name, or ""."""
    if _VERSION.fullmatch(version):
        return ""
    return f"a version is a whole number of at most 18 digits, without leading zeros, not {version[:40]!r}"


def check_inside(name: str) -> str:
    """Why a file that lies beside a model cannot have this name, or ""."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        return f"{name[:200]!r} does not lie beside the model; export it with its data in its own directory"
    return ""


def publish(repository: Path, model: str, files: Mapping[str, Content], version: str = "") -> str:
    """Put a version of a model into a repository, and return its number. ``files``: by their names in its directory.
    ``version``: "" for the highest that is there, plus 1. Raises PublishError; what raises while it is read of
    ``files`` ends it, too."""
    problem = check_model(model) or (check_version(version) if version else "")
    problem = problem or next(filter(None, map(check_inside, files)), "")
    if problem:
        raise PublishError(problem)
    if len(files) > FILES_MAX:
        raise PublishError(f"a version has at most {FILES_MAX} files, and this one has {len(files)}")
    if not repository.is_dir():
        raise PublishError(
            f"{repository} is no model repository; versions can be published where a server was given a directory of "
            "the form NAME/VERSION/model.onnx"
        )
    directory = repository / model
    try:
        if version and _is_taken(directory / version):
            raise _taken(model, version)
        return _publish(repository, directory, files, version)
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in _FULL:
            sentence = f"there is no room for it in {repository}: {what}; make some, and publish it again"
        else:
            sentence = f"it cannot be written to {directory}: {error.filename or ''}: {what}".replace(": : ", ": ")
        raise PublishError(sentence) from None


def _publish(repository: Path, directory: Path, files: Mapping[str, Content], version: str) -> str:
    is_new = not directory.exists()
    base = repository if is_new else directory
    _remove_leftovers(base)
    aside = base / f".{secrets.token_hex(8)}.tmp"
    whole = aside / (version or _next(directory))
    try:
        whole.mkdir(parents=True)
        for name, content in files.items():
            _write(whole / name, content)
        for each in {whole, *[(whole / name).parent for name in files], aside}:
            _sync(each)
        if is_new and _rename(aside, directory):
            # With its version in it: a model without one would be said to be wrong.
            _sync(repository)
            return whole.name
        for _ in range(_CLASHES_MAX):
            number = version or _next(directory)
            if _rename(whole, directory / number):
                _sync(directory)
                return number
            if version:
                raise _taken(directory.name, version)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    raise PublishError(f"others publish '{directory.name}' all the time; name a version, or try again")


def _taken(model: str, version: str) -> PublishError:
    return PublishError(
        f"version {version} of model '{model}' is there already; publish another number, or none for the next"
    )


def _is_taken(path: Path) -> bool:
    """An empty directory is nobody's."""
    try:
        return bool(os.listdir(path))
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True


def _next(directory: Path) -> str:
    """The number behind the highest that is there, served or not."""
    with contextlib.suppress(FileNotFoundError):
        there = [int(name) for name in os.listdir(directory) if _VERSION.fullmatch(name)]
        if there and max(there) >= _VERSION_MAX:
            raise PublishError(f"{directory} has a version {max(there)}, and there is no number behind it; name one")
        return str(max(there, default=0) + 1)
    return "1"


def _rename(source: Path, target: Path) -> bool:
    """False when somebody was there before."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
        _sync(path)
        return
    with path.open("xb") as file:
        for part in content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have it on the disk: a power cut must not leave a version of which half is there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_leftovers(directory: Path) -> None:
    """Of those that died while they published."""
    late = time.time() - _LEFTOVER_S
    for name in filter(_ASIDE.fullmatch, os.listdir(directory)):
        with contextlib.suppress(FileNotFoundError):  # another's that has ended
            if os.lstat(directory / name).st_mtime < late:
                shutil.rmtree(directory / name, ignore_errors=True)
