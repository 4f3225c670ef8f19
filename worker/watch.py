"""Sees that something has changed in a repository: by inotify, or by looking every two seconds where the kernel does
not tell.

It says where something has changed, not what: that is for whoever looks. One thing is said beside, since no look can
tell: what has been renamed into place is whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from inotify_simple import INotify, flags

POLL_S: Final = 2.0  # between two looks where nothing tells of changes
_WATCHES_MAX: Final = 16_384  # directories
# File systems that others write to without this kernel being told. (FUSE's tell nobody of what its daemon sees.)
_DEAF: Final = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|fuse(\..*)?|fuseblk|9p|v9fs|ceph|lustre|gpfs|afs|ocfs2|gfs2|virtiofs|beegfs|glusterfs"
)
# A file that is written to tells so once it is closed: whether it goes on changing is for later looks to see.
_MASK: Final = (
    flags.CREATE
    | flags.DELETE
    | flags.CLOSE_WRITE
    | flags.ATTRIB
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)
_LOST: Final = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT | flags.IGNORED
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")  # as mountinfo writes what would break its lines


@dataclass(slots=True)
class Changes:
    """``everything``: it may be anywhere; else in ``models``. ``placed``: a model, and what has been renamed into its
    directory, or "" where that was itself."""

    everything: bool = False
    models: set[str] = field(default_factory=set)
    placed: set[tuple[str, str]] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.everything or bool(self.models)


class Watch:
    """Of a repository, or (with ``is_file``) of one file. ``fileno``: readable once something has changed; -1 where
    nobody tells: then it is to be looked at every POLL_S."""

    def __init__(self, root: Path, is_file: bool = False) -> None:
        self.reason = ""  # why it has to be looked at
        self._root = root
        self._is_file = is_file
        self._inotify: INotify | None = None
        self._paths: dict[int, dict[Path, str]] = {}  # by watch: the directories, and the models that they are of
        self._watches: dict[Path, int] = {}
        self._top = root.parent if is_file else root

    def start(self) -> None:
        kind = file_system(self._top)
        if _DEAF.fullmatch(kind):
            self.reason = f"{self._top} lies on a file system of the kind {kind}"
            return
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            self.reason = f"inotify: {error.strerror}"

    def stop(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._paths.clear()
        self._watches.clear()

    def fileno(self) -> int:
        return -1 if self._inotify is None else self._inotify.fileno()

    @property
    def polls(self) -> bool:
        """Whether nobody tells of all that changes: also while the repository is away."""
        return self._inotify is None or self._top not in self._watches

    def follow(self, directories: Iterable[tuple[str, Path]], everything: bool) -> bool:
        """Have these directories of models watched, beside the repository itself; ``everything``: and no others.
        Whether any is new: what happened in it before was not told."""
        if self._inotify is None:
            return False
        wanted = {self._top: "", **{path: name for name, path in directories}}
        if self._root.is_symlink():  # which is made to lead elsewhere by renaming another over it
            wanted[self._root.parent] = ""
        new = [path for path, name in wanted.items() if self._add(path, name)]
        if everything:
            for path in self._watches.keys() - wanted.keys():
                self._remove(path)
        return bool(new)

    def _add(self, path: Path, name: str) -> bool:
        """Whether it was not watched, or is another directory by now."""
        if self._inotify is None or (path not in self._watches and len(self._watches) >= _WATCHES_MAX):
            self._give_up(f"there are more than {_WATCHES_MAX} directories")
            return False
        try:
            watch: int = self._inotify.add_watch(path, _MASK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
                self._remove(path)
            else:
                self._give_up(f"inotify: {os.strerror(error.errno or 0)} (see /proc/sys/fs/inotify)")
            return False
        if self._watches.get(path) == watch:
            return False
        self._remove(path)
        self._watches[path] = watch
        self._paths.setdefault(watch, {})[path] = name
        return True

    def _remove(self, path: Path) -> None:
        watch = self._watches.pop(path, None)
        if watch is None:
            return
        paths = self._paths.get(watch, {})
        paths.pop(path, None)
        if not paths:
            self._paths.pop(watch, None)
            with contextlib.suppress(OSError):  # the kernel has taken it away with its directory
                assert self._inotify is not None
                self._inotify.rm_watch(watch)

    def _give_up(self, reason: str) -> None:
        if self._inotify is not None:
            self.stop()
            self.reason = reason

    def take(self) -> Changes:
        """What has changed since the last call; where nobody tells, that it may be anything."""
        changes = Changes()
        if self._inotify is None:
            changes.everything = True
            return changes
        for watch, mask, _, name in self._inotify.read(0):
            if mask & flags.Q_OVERFLOW:
                changes.everything = True
                continue
            for path, model in list(self._paths.get(watch, {}).items()):
                self._hear(changes, path, model, mask, name)
            if mask & flags.IGNORED:
                for path in self._paths.pop(watch, {}):
                    self._watches.pop(path, None)
        return changes

    def _hear(self, changes: Changes, path: Path, model: str, mask: int, name: str) -> None:
        if self._is_file:
            if name in ("", self._root.name):
                changes.everything = True
        elif path != self._top and not model:  # where the link to the repository lies
            if name == self._root.name:
                changes.everything = True
        elif mask & _LOST and not name:
            if model:
                changes.models.add(model)
                if mask & flags.MOVE_SELF:
                    self._remove(path)  # what comes to its place is another
            else:
                changes.everything = True
        elif not model:
            if name and not name.startswith("."):
                if mask & flags.ISDIR or mask & (flags.MOVED_TO | flags.MOVED_FROM | flags.CREATE | flags.DELETE):
                    changes.models.add(name)
                if mask & flags.MOVED_TO:
                    changes.placed.add((name, ""))
        else:
            changes.models.add(model)
            if mask & flags.MOVED_TO and path == self._top / model:
                changes.placed.add((model, name))


def file_system(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """The kind of file system that a path lies on, as the kernel calls it; "" where that is not known."""
    try:
        real = path.resolve()
        lines = Path(mounts).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    found, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        parts, about = left.split(" "), right.split(" ")
        if len(parts) < 5 or len(about) < 2:
            continue
        point = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), parts[4]))
        # Of several at one place the last is on top.
        if len(point.parts) >= found and real.is_relative_to(point):
            found, kind = len(point.parts), about[0]
    return kind
