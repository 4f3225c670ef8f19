"""What the classes are called that a model's outputs tell apart: a text file with a label in each line, the first for
index 0, beside the model's configuration. Triton's config.pbtxt names it as an output's ``label_filename``, a
model.toml in ``class_labels``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from penstock.wire.models import MAX_LABELS, ModelSpec


def problem_of_file(name: str) -> str:
    """Why a file cannot be called so, or ""."""
    parts = PurePosixPath(name).parts
    if not parts or len(name) > 255 or not name.isprintable() or name.startswith("/") or ".." in parts:
        return f"{name[:80]!r} is no file in the model's directory"
    return ""


def read_labels(spec: ModelSpec, files: Iterable[tuple[str, Path]]) -> tuple[ModelSpec, list[str]]:
    """A model with the labels of its outputs, and a sentence for each file that says none."""
    found: list[tuple[str, str]] = []
    said: list[str] = []
    outputs = [each.name for each in spec.outputs]
    left = MAX_LABELS
    for output, path in sorted(files):
        try:
            if output not in outputs:
                raise ValueError(f"the model has no output '{output[:80]}'; its outputs are {', '.join(outputs)[:200]}")
            text = "\n".join(_lines(path, left))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            said.append(f"labels of output '{output[:80]}' in {path}: {reason}; classes are told by their numbers")
            continue
        left -= len(text)
        found.append((output, text))
    return spec._replace(labels=tuple(found)), said


def _lines(path: Path, most: int) -> Iterator[str]:
    """Raises OSError, and ValueError for what is no text or too long."""
    # What is no file, such as a pipe, must not make us wait.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file")
        content = file.read(4 * most + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if len(text) > most:
        raise ValueError(f"it has more than the {most} characters that are left for a model's labels")
    yield from (line.strip() for line in text.rstrip().splitlines())
