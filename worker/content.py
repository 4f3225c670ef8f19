"""What a version of a model is made of, as a digest: two workers that say the same one of it give the same answers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Final

from penstock.wire.process import fields
from penstock.worker.manifest import Unusable, sum_file
from penstock.worker.onnxfile import OnnxFileError, read_onnx
from penstock.worker.repository import ModelFile

log = logging.getLogger("penstock.worker")

_FORMAT: Final = 1
_NOT_CACHED: Final = "answers of a model are not cached"


def content_digest(file: ModelFile) -> str:
    """Of a version that has just been loaded: its files, and the settings that its results follow from. "" where it
    cannot be known what was loaded, since its files are not as they were when they were looked at; that is logged, and
    they are about to be loaded anew. Reads all of them."""
    try:
        paths = [file.path, *[file.path.parent / each for each in read_onnx(file.path).external_files]]
        sums = [(path.name, sum_file(path).sha256) for path in paths]
        problem = _why_unknown(file, paths)  # last: whatever was replaced while it was loaded or read shows
    except (OnnxFileError, Unusable, OSError) as error:
        problem = str(error)
    if problem:
        log.warning(_NOT_CACHED, extra=fields(model=file.name, version=file.version, reason=problem))
        return ""
    config = file.config
    settings = [config.providers, config.tf32, config.fp16]
    return hashlib.sha256(json.dumps([_FORMAT, sums, settings]).encode()).hexdigest()


def _why_unknown(file: ModelFile, paths: list[Path]) -> str:
    """Why a model may not have been loaded from its files as they are, or "". Raises OSError."""
    known = {name: about for name, *about in file.fingerprint}
    for path in paths:
        names = [os.path.relpath(path, parent) for parent in file.path.parents]
        then = next((known[name] for name in names if name in known), None)
        if then is None:
            return f"{path} lies where changes of it are not seen; put it into the version's own directory"
        about = path.stat()
        if [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns] != then:
            return f"{path} was changed while it was loaded"
    return ""
