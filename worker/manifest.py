"""What an entry of the store of prepared models is called, what it says of itself, and whether it can be believed.

An entry is a directory under its key: ``model.onnx`` (optimized for this processor), ``weights.bin`` (its weights, as
ONNX Runtime's kernels want them) and ``manifest.json``. A weight that has changed gives wrong answers in silence, so
every opener checks the sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from penstock.worker.onnxfile import OnnxFileError, read_onnx

FORMAT: Final = 1  # of entries; another one makes other keys
MODEL, WEIGHTS, MANIFEST = "model.onnx", "weights.bin", "manifest.json"
KEY_LETTERS: Final = 64
_MANIFEST_MAX_BYTES: Final = 1 << 20
# What decides which kernels ONNX Runtime takes, and so how it lays out weights: on x86, and on ARM.
_CPU_FIELDS: Final = frozenset(
    {"vendor_id", "cpu family", "model", "flags"}
    | {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"}
)


class Unusable(Exception):
    """An entry that must not be used, or a model that cannot be in the store; the message is why."""


class FileSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``problem``: why this model cannot be prepared, which is found out once; then there are no files."""

    format: int
    key: str
    name: str
    source: str  # the model's path when it was prepared
    onnxruntime: str
    provider: str
    options: dict[str, str]
    cpu: str  # a digest
    weight_bytes: int
    files: dict[str, FileSum]
    problem: str = ""


class Setting(msgspec.Struct, frozen=True):
    """What a model is prepared for. ``options``: those of the session that matter; ``cpu``: see ``cpu_digest``."""

    onnxruntime: str
    provider: str
    options: dict[str, str]
    cpu: str


class Source(msgspec.Struct, frozen=True):
    """A model's files as they are now. ``nbytes``: all of them; ``weight_bytes``: its weights in memory."""

    path: Path
    key: str
    nbytes: int
    weight_bytes: int


def cpu_digest(cpuinfo: str) -> str:
    """Of /proc/cpuinfo: what kinds of processors there are, whatever their number and clock."""
    kinds: set[tuple[str, ...]] = set()
    for block in cpuinfo.split("\n\n"):
        lines = (line.partition(":") for line in block.splitlines())
        kinds.add(
            tuple(
                f"{name.strip()}={' '.join(sorted(value.split()))}"
                for name, _, value in lines
                if name.strip() in _CPU_FIELDS
            )
        )
    return hashlib.sha256(json.dumps(sorted(kinds - {()})).encode()).hexdigest()


def make_key(setting: Setting, model: FileSum, external: Iterable[tuple[str, FileSum]]) -> str:
    """``external``: the files beside the model that hold weights, by where the model says that they lie."""
    parts = [FORMAT, setting.onnxruntime, setting.provider, sorted(setting.options.items()), setting.cpu]
    files = [(location, about.sha256) for location, about in sorted(external)]
    return hashlib.sha256(json.dumps([*parts, model.sha256, files]).encode()).hexdigest()


def find_source(path: Path, setting: Setting) -> Source:
    """Reads all of a model's files. Raises Unusable."""
    try:
        about = read_onnx(path)
        model = sum_file(path)
        external = [(location, sum_file(path.parent / _inside(location))) for location in about.external_files]
    except (OnnxFileError, OSError) as error:
        raise Unusable(str(error)) from None
    nbytes = model.size + sum(each.size for _, each in external)
    return Source(path.resolve(), make_key(setting, model, external), nbytes, about.weight_bytes)


def _inside(location: str) -> str:
    """Raises Unusable for a place that is not below the model's own directory; ONNX Runtime reads no other either."""
    path = PurePosixPath(location)
    if not location or "\0" in location or path.is_absolute() or ".." in path.parts or not path.parts:
        raise Unusable(f"it has weights at {location!r}, which is not below its own directory")
    return location


def sum_file(path: Path, follow: bool = True) -> FileSum:
    """Raises OSError, and Unusable for what is no file, such as a pipe, on which one would wait."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Unusable(f"{path} is no file")
        return FileSum(about.st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(entry: Path) -> Manifest:
    """What an entry says of itself, its files not looked at. Raises Unusable."""
    try:
        _check_mode(os.lstat(entry), entry, stat.S_ISDIR)
        path = entry / MANIFEST
        _check_mode(os.lstat(path), path, stat.S_ISREG)
        with path.open("rb") as file:
            manifest = msgspec.json.decode(file.read(_MANIFEST_MAX_BYTES), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unusable(f"its {MANIFEST} cannot be read: {error}") from None
    if manifest.format != FORMAT or manifest.key != entry.name:
        raise Unusable("it is another one's")
    if set(manifest.files) not in ([{MODEL}, {MODEL, WEIGHTS}] if not manifest.problem else [set()]):
        raise Unusable("it has other files than it should")
    return manifest


def check_entry(entry: Path) -> Manifest:
    """Reads all of an entry. Raises Unusable when it is not whole, not ours, or not as it was made."""
    manifest = read_manifest(entry)
    try:
        if set(os.listdir(entry)) != {MANIFEST, *manifest.files}:
            raise Unusable("it has other files than it should")
        for name, wanted in manifest.files.items():
            about = os.lstat(entry / name)
            _check_mode(about, entry / name, stat.S_ISREG)
            if about.st_size != wanted.size or sum_file(entry / name, follow=False) != wanted:
                raise Unusable(f"{name} is not as it was made")
    except OSError as error:
        raise Unusable(f"it cannot be read: {error}") from None
    return manifest


def _check_mode(about: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    """Nobody but this user may have made it, nor may anybody change it."""
    if not is_kind(about.st_mode):
        raise Unusable(f"{path.name} is a link, or not of its kind")
    if about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise Unusable(f"{path.name} belongs to somebody else, or is open to others")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    seal(path)


def sum_files(folder: Path) -> Mapping[str, FileSum]:
    """Of what a preparation wrote, sealed and on the disk. Raises OSError and Unusable."""
    found = {}
    for name in sorted(os.listdir(folder)):
        seal(folder / name)
        found[name] = sum_file(folder / name, follow=False)
    return found


def seal(path: Path) -> None:
    """To be read by this user alone and written by nobody; on the disk when this returns."""
    os.chmod(path, 0o400)
    sync(path)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
