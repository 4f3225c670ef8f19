"""Which entries of the store no model needs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from penstock.worker.manifest import Manifest, Unusable, read_manifest
from penstock.worker.store import Store, check_root


class Found(NamedTuple):
    """An entry, and what becomes of it."""

    name: str  # of the model
    nbytes: int
    kept: bool
    reason: str


def find_entries(store: Store, wanted: Collection[str], remove: bool) -> Iterator[Found]:
    """Each entry, removed (unless ``remove`` is false) when nobody uses it, its key is not in ``wanted``, and the file
    that it was made from has gone or would give another one here. Raises OSError and StoreError."""
    if not store.root.exists():
        return
    check_root(store.root)
    for entry in store.entries():
        name, nbytes = entry.name[:12], _size(entry)
        try:
            manifest = read_manifest(entry)
            name = manifest.name
            reason = "" if entry.name in wanted else _why_useless(store, manifest)
        except Unusable as error:
            reason = f"it is not usable: {error}"
        if not reason:
            yield Found(name, nbytes, True, "it is needed")
            continue
        with store.alone(entry) as alone:
            if alone and remove:
                store.discard(entry)
        yield Found(name, nbytes, not alone, reason if alone else f"it is in use, though {reason}")
    for folder, key, source in store.built():
        reason = "" if key in wanted else _why_no_more(store, source, key, on_gpu=True)
        nbytes = _size(folder)  # whoever has loaded it needs it no more
        if reason and remove:
            store.discard(folder)
        yield Found(f"TensorRT's engines of {source}", nbytes, not reason, reason or "it is needed")
    if remove:
        store.sweep()


def _why_useless(store: Store, manifest: Manifest) -> str:
    return _why_no_more(store, Path(manifest.source), manifest.key, manifest.provider != "CPUExecutionProvider")


def _why_no_more(store: Store, source: Path, key: str, on_gpu: bool) -> str:
    if not source.is_file():
        return f"{source} is gone"
    try:
        if store.find(source, on_gpu).key == key:
            return ""
    except (Unusable, OSError) as error:
        return f"{source} cannot be read: {error}"
    return f"{source} is another one now, or this is another processor or ONNX Runtime"


def _size(entry: Path) -> int:
    total = 0
    for folder, _, names in os.walk(entry):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total
