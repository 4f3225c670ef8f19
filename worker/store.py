"""The store of prepared models: weights on disk, as ONNX Runtime's kernels want them, which all workers map.

A plain session has its own copy of all weights. One on a prepared model maps them, and the page cache has them once.
The store belongs to one user. ``ROOT/KEY/`` is a prepared model (see manifest.py), and what the key stands for never
changes, so nothing is ever written to twice: entries are made in ``ROOT/tmp-*`` and renamed into place. Two kinds of
locks (flock, which the kernel drops when a process ends, however it ends):

``ROOT/prepare.lock``  whoever prepares: one at a time on a host, since it takes much memory. What is in ``tmp-*`` when
                       it is taken was left by somebody who was killed, and is removed.
``ROOT/KEY.lock``      shared by all who use an entry or wait for it; who wants to remove the entry needs it alone.

Where it does not work, for want of room or rights, a model is loaded as if there was no store, and it is said what that
costs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from penstock.wire.process import fields
from penstock.worker.manifest import (
    FORMAT,
    KEY_LETTERS,
    MODEL,
    FileSum,
    Manifest,
    Setting,
    Source,
    Unusable,
    check_entry,
    find_source,
    sync,
    write_manifest,
)
from penstock.worker.onnxfile import OnnxFileError, read_onnx
from penstock.worker.options import WorkerOptions
from penstock.worker.prepare import NotPrepared, Tell, find_setting, prepare, say_oserror

log = logging.getLogger("penstock.worker")

_PREPARE_LOCK: Final = "prepare.lock"
_TEMPORARY: Final = "tmp-"
_LOCK_SUFFIX: Final = ".lock"
_ENGINES: Final = "engines"
_SOURCE: Final = "source"  # the path of the model, in a directory of TensorRT's engines
_NOT_USABLE: Final = "prepared model is not usable"
_WAIT_MAX_S: Final = 3600.0  # for others who prepare
_WAIT_TELL_S: Final = 3.0  # between two words on waiting
_WAIT_ROUND_S: Final = 0.05  # between two looks whether a lock is free: waiting for one cannot be given up


class StoreError(Exception):
    """The store cannot be used; the message is why."""


class Weights:
    """How the weights of a model came to be in memory. ``prepared``: the model in the store, None where this process
    has a copy of its own; ``nbytes``: of all weights. The entry stays in the store for as long as this object lives."""

    def __init__(self, nbytes: int, prepared: Path | None = None, lock: int = -1) -> None:
        self.nbytes = nbytes
        self.prepared = prepared
        self._release = weakref.finalize(self, os.close, lock) if lock >= 0 else None

    @property
    def shared(self) -> bool:
        return self.prepared is not None

    def give_up(self, name: str, reason: str) -> None:
        """Have a copy of its own after all."""
        self.prepared = None
        if self._release is not None:
            self._release()
        log.warning(
            "weights are not shared",
            extra=fields(
                model=name, reason=reason, cost=f"each worker holds its own copy of {_mb(self.nbytes)} of weights"
            ),
        )


class Store:
    """``root``: see ``default_root``. ``min_bytes``: models with less weights are left out. ``on_gpu``: models are
    prepared for a GPU."""

    def __init__(self, root: Path, min_bytes: int = 0, on_gpu: bool = False) -> None:
        self.root = root
        self._min_bytes = min_bytes
        self._on_gpu = on_gpu
        self._settings: dict[bool, Setting] = {}

    @property
    def on_gpu(self) -> bool:
        return self._on_gpu

    def take(self, path: Path, name: str) -> Weights:
        """A model's weights: shared if possible. What stands in the way is a warning."""
        try:
            nbytes = read_onnx(path).weight_bytes
        except OnnxFileError:
            return Weights(0)  # ONNX Runtime will say what is wrong with it
        if nbytes < self._min_bytes:
            return Weights(nbytes)
        try:
            return self.open(path, name, lambda event, about: _log(name, event, about))
        except StoreError as error:
            weights = Weights(nbytes)
            weights.give_up(name, str(error))
            return weights

    def open(self, path: Path, name: str, tell: Tell) -> Weights:
        """A model's entry, which is made where there is none, or none that can be believed. Raises StoreError."""
        nbytes = 0
        try:
            check_root(self.root)
            source = self.find(path)
            nbytes = source.nbytes
            entry = self.root / source.key
            lock = self._share(source.key, tell)
            try:
                manifest = self._find(entry, tell) or self._make(source, name, lock, tell)
                if manifest.problem:
                    raise StoreError(manifest.problem)
            except BaseException:
                _close(lock)
                raise
        except (Unusable, NotPrepared) as error:
            raise StoreError(str(error)) from None
        except OSError as error:
            raise StoreError(say_oserror(error, self.root, nbytes)) from None
        return Weights(source.weight_bytes, entry / MODEL, lock)

    def engines(self, path: Path, built_for: str) -> Path:
        """A directory for what TensorRT builds of a model. ``built_for``: the GPU's architecture, the versions of
        TensorRT and the driver. Raises StoreError."""
        try:
            check_root(self.root)
            source = self.find(path, on_gpu=True)
            folder = self.root / _ENGINES / f"{source.key}-{built_for}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _SOURCE).write_text(str(source.path))
        except Unusable as error:
            raise StoreError(str(error)) from None
        except OSError as error:
            raise StoreError(say_oserror(error, self.root, 0)) from None
        return folder

    def find(self, path: Path, on_gpu: bool | None = None) -> Source:
        """A model's files and its key. ``on_gpu``: what it is prepared for, if not what this store prepares for. Raises
        Unusable and OSError."""
        return find_source(path, self._setting(self._on_gpu if on_gpu is None else on_gpu))

    def _setting(self, on_gpu: bool) -> Setting:
        if on_gpu not in self._settings:
            self._settings[on_gpu] = find_setting(on_gpu)
        return self._settings[on_gpu]

    def _find(self, entry: Path, tell: Tell) -> Manifest | None:
        """What can be believed."""
        if not os.path.lexists(entry):
            return None
        try:
            return check_entry(entry)
        except Unusable as error:
            tell(_NOT_USABLE, {"reason": str(error), "entry": entry.name[:12]})
            return None

    def _make(self, source: Source, name: str, lock: int, tell: Tell) -> Manifest:
        entry = self.root / source.key
        alone = _lock(self.root / _PREPARE_LOCK, fcntl.LOCK_EX, tell, "waiting while another model is prepared")
        try:
            # Somebody else may have made it meanwhile; if not, it has been said why.
            found = self._find(entry, lambda event, about: None)
            if found is not None:
                return found
            self._sweep()
            begin = time.monotonic()
            tell("preparing model", {"step": "starting", "weights": _mb(source.weight_bytes)})
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.root))
            try:
                problem, files = "", dict[str, FileSum]()
                try:
                    held = [fd for fd in (alone, lock) if fd >= 0]
                    files = prepare(source.path, source.key, source.nbytes, folder, held, tell, self._on_gpu)
                except NotPrepared as error:
                    if not error.lasting:
                        raise
                    problem = str(error)
                    _empty(folder)
                manifest = self._describe(source, name, files, problem)
                write_manifest(folder, manifest)
                self._publish(folder, entry)
            finally:
                _remove(folder)
            if problem:
                return manifest
            tell("model prepared", {"seconds": round(time.monotonic() - begin, 1), "disk": _mb(_size(manifest))})
            # As read back from the disk, like everybody else.
            return check_entry(entry)
        finally:
            _close(alone)

    def _describe(self, source: Source, name: str, files: Mapping[str, FileSum], problem: str) -> Manifest:
        setting = self._setting(self._on_gpu)
        return Manifest(
            format=FORMAT,
            key=source.key,
            name=name,
            source=str(source.path),
            onnxruntime=setting.onnxruntime,
            provider=setting.provider,
            options=setting.options,
            cpu=setting.cpu,
            weight_bytes=source.weight_bytes,
            files=dict(files),
            problem=problem,
        )

    def _publish(self, folder: Path, entry: Path) -> None:
        sync(folder)
        if os.path.lexists(entry):
            # Whoever has mapped it keeps what it has mapped: a file is never written to, nor cut off.
            self.discard(entry)
        os.rename(folder, entry)
        sync(self.root)

    def discard(self, entry: Path) -> None:
        """Raises OSError."""
        away = self.root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        os.rename(entry, away)
        _remove(away)

    def _sweep(self) -> None:
        for left in self.root.glob(f"{_TEMPORARY}*"):
            _remove(left)

    def _share(self, key: str, tell: Tell) -> int:
        return _lock(self.root / f"{key}{_LOCK_SUFFIX}", fcntl.LOCK_SH, tell, "waiting while a model is removed")

    # --- for prune ---

    def entries(self) -> Iterator[Path]:
        """What lies under keys, whatever it is. Raises OSError."""
        for name in sorted(os.listdir(self.root)):
            if len(name) == KEY_LETTERS and not set(name) - set("0123456789abcdef"):
                yield self.root / name

    def built(self) -> Iterator[tuple[Path, str, Path]]:
        """Directories of TensorRT's engines, their keys, and the models that they are of. Raises OSError."""
        for folder in sorted((self.root / _ENGINES).glob(f"{'?' * KEY_LETTERS}-*")):
            try:
                source = Path((folder / _SOURCE).read_text())
            except (FileNotFoundError, UnicodeDecodeError):
                source = Path()
            yield folder, folder.name[:KEY_LETTERS], source

    @contextlib.contextmanager
    def alone(self, entry: Path) -> Iterator[bool]:
        """Whether nobody uses an entry; nobody begins to before this ends. Raises OSError."""
        path = entry.with_name(f"{entry.name}{_LOCK_SUFFIX}")
        lock = try_lock(path, fcntl.LOCK_EX)
        try:
            yield lock is not None
            if lock is not None and not os.path.lexists(entry):
                path.unlink(missing_ok=True)
        finally:
            if lock is not None:
                _close(lock)

    def sweep(self) -> None:
        """Remove what killed processes left, if nobody prepares just now, and locks of what there is no more. Raises
        OSError."""
        lock = try_lock(self.root / _PREPARE_LOCK, fcntl.LOCK_EX)
        if lock is None:
            return
        self._sweep()
        _close(lock)
        for path in self.root.glob(f"{'?' * KEY_LETTERS}{_LOCK_SUFFIX}"):
            with self.alone(path.with_suffix("")):
                pass  # its end removes the lock of nothing


class Taken(Store):
    """A store from which the one model that is loaded has been taken before: whoever tries and loads a model reads it
    once, and says once what stands in the way."""

    def __init__(self, root: Path, on_gpu: bool, weights: Weights) -> None:
        super().__init__(root, on_gpu=on_gpu)
        self.weights = weights

    def take(self, path: Path, name: str) -> Weights:
        return self.weights


def default_root(given: str = "") -> Path:
    """``[worker] store``, else the user's cache. Raises StoreError where the user has no home."""
    try:
        if given:
            return Path(given).expanduser().absolute()
        cache = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
        return base / "penstock" / "models"
    except RuntimeError:
        raise StoreError("this user has no home directory; name a directory with [worker] store") from None


def find_store(options: WorkerOptions, on_gpu: bool = False) -> Store:
    """Raises StoreError where there can be none."""
    return Store(default_root(options.store), options.store_min_bytes, on_gpu)


def check_root(root: Path) -> None:
    """Make the root where there is none. Raises OSError, and StoreError for one that others could have filled."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    about = root.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise StoreError(f"{root} is no directory")
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise StoreError(f"{root} belongs to somebody else, or others may write to it; make it yours with mode 0700")


def try_lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds the lock; -1 where nothing can be locked because nothing can be written; None when it is
    taken. Raises OSError."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return -1
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            # Who held it until now may have removed it: then what is locked here guards nothing.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(path: Path, kind: int, tell: Tell, why: str, clock: Callable[[], float] = time.monotonic) -> int:
    """Wait for a lock, and say so. Raises OSError and StoreError."""
    begin = clock()
    told = begin - _WAIT_TELL_S
    while True:
        lock = try_lock(path, kind)
        if lock is not None:
            return lock
        now = clock()
        if now - begin > _WAIT_MAX_S:
            raise StoreError(f"{path} has been locked for {_WAIT_MAX_S:.0f} s")
        if now - told >= _WAIT_TELL_S:
            told = now
            tell(why, {"seconds": round(now - begin)})
        time.sleep(_WAIT_ROUND_S)


def _log(name: str, event: str, about: Mapping[str, object]) -> None:
    level = logging.WARNING if event == _NOT_USABLE else logging.INFO  # a disk that changes what it was given
    log.log(level, event, extra=fields(model=name, **about))


def _close(lock: int) -> None:
    if lock >= 0:
        os.close(lock)


def _remove(path: Path) -> None:
    """Whatever it is, as far as it can be."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _empty(folder: Path) -> None:
    for name in os.listdir(folder):
        os.unlink(folder / name)


def _size(manifest: Manifest) -> int:
    return sum(each.size for each in manifest.files.values())


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 10_000_000 else f"{nbytes / 1e6:.2f} MB"
