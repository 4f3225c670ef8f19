"""Recorded requests, with which a model is run before it serves: ``warmup/*.npz``, each with an array for each input.

What is made up (probe.py) has the right shapes where they are declared, and no meaning: a model whose work depends on
what it is given, or whose symbolic dimensions take only some sizes, is warm only after requests as they come. They are
somebody's files, so nothing in them is believed: no pickled objects, and no more than there is room for.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import PenstockError
from penstock.wire.models import Layout, ModelSpec, Tensor, TensorSpec, check
from penstock.wire.tensors import DTYPES, Array, datatype_of, to_bf16
from penstock.worker.model import LoadError

FILES_MAX: Final = 64
BYTES_MAX: Final = 256 << 20  # of one file, unpacked
_MEMBER: Final = ".npy"  # what numpy adds to an array's name
_BF16_BITS: Final = np.dtype("V2")  # as numpy writes a bfloat16 of ml_dtypes, which it does not know
_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # savez, savez_compressed
# What zipfile and numpy raise of files that are not what they seem.
_UNREADABLE: Final[tuple[type[Exception], ...]] = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)


def read_requests(spec: ModelSpec, folder: Path) -> Iterator[tuple[Path, list[Array]]]:
    """Each file in the order of their names, with one array per input as ``Model.run`` takes them. Raises LoadError
    naming the file, and the input that does not fit."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".npz")
    except OSError as error:
        raise LoadError(f"{folder} cannot be read: {error.strerror}; mend it, or remove it") from None
    if len(paths) > FILES_MAX:
        raise LoadError(f"{folder} has {len(paths)} recorded requests; {FILES_MAX} are allowed, so remove some")
    for path in paths:
        arrays = _read(path)
        try:
            yield path, _fit(spec, arrays)
        except PenstockError as error:
            raise LoadError(
                f"{path} is no request that the model takes: {error}; record it anew, or remove it"
            ) from None


def _read(path: Path) -> dict[str, Array]:
    """Raises LoadError."""
    name = ""
    if not path.is_file():  # but a pipe, say, on which one would wait
        raise LoadError(f"{path} is no file; write it with numpy.savez, or remove it")
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
        nbytes = sum(each.file_size for each in members)
        if nbytes > BYTES_MAX:
            raise LoadError(f"{path} holds {nbytes} bytes; {BYTES_MAX} are allowed, so record a smaller request")
        for each in members:
            if not each.filename.endswith(_MEMBER) or each.compress_type not in _METHODS:
                raise LoadError(f"{path} holds {each.filename!r}, which is no array; write it with numpy.savez")
        arrays = {}
        with np.load(path, allow_pickle=False) as loaded:
            for name in loaded.files:
                arrays[name] = loaded[name]
    except _UNREADABLE as error:
        if name and "Object arrays cannot be loaded" in str(error):
            raise LoadError(
                f"{path}: input '{name}' is an array of objects, which are not read; strings are "
                "numpy.array([...], dtype='U') or 'S'"
            ) from None
        what = f"input '{name}' of it" if name else "it"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise LoadError(f"{path}: {what} cannot be read ({reason}); write it with numpy.savez") from None
    return arrays


def _fit(spec: ModelSpec, arrays: Mapping[str, Array]) -> list[Array]:
    """In the order of the spec. Raises PenstockError naming what does not fit."""
    datatypes = {each.name: each.datatype for each in spec.inputs}
    check(spec, Layout(tuple(_tensor(name, array, datatypes.get(name, "")) for name, array in arrays.items())))
    return [_convert(each, arrays[each.name]) for each in spec.inputs]


def _tensor(name: str, array: Array, wanted: str) -> Tensor:
    datatype = "BF16" if wanted == "BF16" and _is_bf16(array) else datatype_of(array)
    # A string takes its length at least; how long these are is nobody's business.
    return Tensor(name, datatype, array.shape, 0, element_count(array.shape) * (ITEM_SIZES[datatype] or 4))


def _is_bf16(array: Array) -> bool:
    """Its bits, or numbers, which are rounded as a client's are."""
    return array.dtype.kind == "f" or array.dtype == _BF16_BITS


def _convert(spec: TensorSpec, array: Array) -> Array:
    if spec.datatype == "BYTES":
        texts: list[Any] = array.ravel().tolist()
        found = np.empty(len(texts), dtype=object)
        found[:] = [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in texts]
        return found.reshape(array.shape)
    if spec.datatype == "BF16":
        array = to_bf16(array) if array.dtype.kind == "f" else array.view(np.uint16)
    # Not ascontiguousarray alone, which makes a row of a scalar.
    return np.ascontiguousarray(array, DTYPES[spec.datatype]).reshape(array.shape)
