"""Does a model that looks batchable keep its rows apart? Ask it: two rows at once against each of them alone.

A softmax over the first axis, statistics over the batch, a sort across rows: such models have a symbolic first
dimension and still mix what different users sent. Shapes cannot tell; two runs can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from penstock.wire.datatypes import element_count
from penstock.wire.process import fields
from penstock.wire.tensors import DTYPES, Array, from_bf16, to_bf16
from penstock.worker.classlabels import read_labels
from penstock.worker.config import CPU, without_effect
from penstock.worker.costs import batch_sizes
from penstock.worker.memory import give_back, heap_bytes
from penstock.worker.model import RUN_ERRORS, LoadError, Model, brief, load
from penstock.worker.repository import ModelFile
from penstock.worker.store import Store
from penstock.worker.tritonconfig import contradictions
from penstock.worker.warmup import read_requests

log = logging.getLogger("penstock.worker")

_WARM_UP_MAX_S: Final = 60.0  # of one model
# What symbolic dimensions other than the rows are tried with: many models take any, image models often want multiples.
SIZES: Final = (8, 32, 64, 224, 1, 3, 128, 512)
_MAX_ELEMENTS: Final = 1 << 26  # of one input; larger ones are not tried
_TOLERANCES: Final = {"FP16": 2e-2, "BF16": 5e-2}
_TOLERANCE: Final = 1e-3


def load_and_probe(
    file: ModelFile, store: Store | None = None, warm: bool = True, device: str = CPU, thorough: bool = True
) -> Model:
    """A model that can be served, and (with ``warm``) has run batches of every size, or (without ``thorough``) of the
    smallest and the largest, and the requests that are recorded beside it. ``store``: where its weights may be shared
    with other processes. Raises LoadError."""
    if file.problem:
        raise LoadError(file.problem)
    model = load(file.path, file.name, file.version, file.config, store, device)
    model.spec, model.unlabelled = read_labels(model.spec, file.labels)
    give_back()  # what loading has freed: ONNX Runtime copies weights for a moment, one by one
    size = probe(model)
    if not warm:
        return model
    model.stage()
    if size:
        warm_up(model, size, thorough)
    if file.warmup is not None:
        replay(model, file.warmup)
    return model


def unheeded(file: ModelFile, model: Model) -> list[str]:
    """What a loaded model's configuration asks for and does not get, a sentence each."""
    said = [without_effect(file.config, model.why_alone, file.config_name), *contradictions(file.declared, model.spec)]
    return [*file.unheeded, *filter(None, said), *model.unlabelled]


def probe(model: Model) -> int:
    """Run the model, and have it run requests alone if it mixes rows or cannot be asked. Measures ``run_s``. Returns
    the size of symbolic dimensions that it takes; 0: none of those that were tried."""
    reasons: list[str] = []
    for size in SIZES:
        try:
            if model.spec.batchable:
                _compare_rows(model, size)
            _measure(model, size)
        except FAILURES as error:
            reasons.append(brief(error))
            if not _has_symbols(model):
                break
        else:
            return size
    if model.spec.batchable and model.config.max_batch_size is None:
        model.run_alone(
            "it could not be tried with made-up inputs; set max_batch_size in model.toml if its rows are independent "
            f"({reasons[0]})"
        )
    return 0


def warm_up(model: Model, size: int, thorough: bool = True) -> None:
    """Run batches of every number of rows that is run, the largest first: ONNX Runtime plans each at its first run, and
    touches the memory that it runs in. Measures ``run_bytes``, and by running some sizes once more ``warm_s``. What
    cannot run, or not within a minute, is left out, and told. ``thorough``: else the smallest and the largest once."""
    most = model.spec.max_batch_size if model.spec.batchable else 1
    sizes = list(model.sizes or range(1, most + 1))
    if not thorough:
        sizes = sorted({sizes[0], sizes[-1]})
    ran: set[int] = set()
    start = time.monotonic()
    give_back()
    before = heap_bytes()
    failed: dict[int, str] = {}
    try:
        feeds = sample(model, most, size)
    except FAILURES as error:
        failed[most], sizes = brief(error), []
    while sizes and time.monotonic() - start < _WARM_UP_MAX_S:
        rows = sizes.pop()
        try:
            _run(model, rows, feeds)
            ran.add(rows)
        except FAILURES as error:
            failed[rows] = brief(error)
        model.run_bytes = max(model.run_bytes, heap_bytes() - before)
    if failed or sizes:
        cold = sizes[-1] if sizes else 0
        log.warning(
            "model warmed up in part", extra=fields(model=model.spec.name, cold_up_to_rows=cold, **_tell(failed))
        )
    for rows in (model.sizes or batch_sizes(most)) if thorough else ():
        if rows in ran and time.monotonic() - start < _WARM_UP_MAX_S:
            begin = time.perf_counter()
            try:
                _run(model, rows, feeds)
            except FAILURES:
                continue  # for a want of memory, that was not there before
            model.warm_s[rows] = time.perf_counter() - begin
    give_back()


def replay(model: Model, folder: Path) -> None:
    """Run the requests that are recorded in a directory, each as it is. A version that fails on what it is asked is not
    to serve: raises LoadError naming the file."""
    before = heap_bytes()
    for path, feeds in read_requests(model.spec, folder):
        try:
            _run(model, len(feeds[0]) if model.spec.batchable else 1, feeds)
        except RUN_ERRORS as error:
            raise LoadError(f"the model fails on {path}: {brief(error)}; record it anew, or remove it") from None
        model.run_bytes = max(model.run_bytes, heap_bytes() - before)
    give_back()


def _tell(failed: Mapping[int, str]) -> dict[str, object]:
    """Of batches that could not run, by their rows: how many, and the reason of the smallest."""
    if not failed:
        return {}
    rows = min(failed)
    return {"sizes_failed": len(failed), "rows": rows, "reason": failed[rows]}


def _run(model: Model, rows: int, feeds: Sequence[Array]) -> None:
    """The first so many rows of a sample, where batches of that size run."""
    part = [feed[:rows] for feed in feeds] if model.spec.batchable else feeds
    with model.staging() as staging:
        if staging is None:
            model.run(part)
            return
        places = staging.inputs[rows]
        for place, values in zip(places, part, strict=True):
            place[...] = values
        model.run_in(staging, rows, places)


class _TooLarge(Exception):
    """Made-up inputs would take more memory than trying them is worth."""


# What making up inputs and running a model on them may raise.
FAILURES: Final[tuple[type[Exception], ...]] = (*RUN_ERRORS, _TooLarge)


def _compare_rows(model: Model, size: int) -> None:
    pair = sample(model, 2, size)
    together = model.run(pair)
    for row in range(2):
        alone = model.run([array[row : row + 1] for array in pair])
        for spec, both, single in zip(model.spec.outputs, together, alone, strict=True):
            if both.ndim == 0 or both.shape[0] != 2 or single.shape[:1] != (1,):
                model.run_alone(f"output '{spec.name}' does not have a row for each row of the input")
                return
            if not _same(both[row : row + 1], single, spec.datatype):
                model.run_alone(f"output '{spec.name}' of a row changes with the rows beside it")
                return


def _measure(model: Model, size: int) -> None:
    try:
        feeds = sample(model, model.spec.max_batch_size, size)
    except _TooLarge:
        return
    model.run(feeds)  # the first run of a shape also plans its memory
    start = time.perf_counter()
    model.run(feeds)
    model.run_s = time.perf_counter() - start


def _same(one: Array, other: Array, datatype: str) -> bool:
    if one.shape != other.shape:
        return False
    if datatype == "BF16":
        one, other = from_bf16(one), from_bf16(other)
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    tolerance = _TOLERANCES.get(datatype, _TOLERANCE)
    one, other = one.astype("f8"), other.astype("f8")
    finite = np.isfinite(other)
    scale = float(np.max(np.abs(other[finite]), initial=0.0))
    return bool(np.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def _has_symbols(model: Model) -> bool:
    """Whether another size could make a difference."""
    first = 1 if model.spec.batchable else 0
    return any(not isinstance(dim, int) for dims in model.dims for dim in dims[first:])


def sample(model: Model, rows: int, size: int) -> list[Array]:
    """Made-up inputs: random where any value will do, 0 and 1 where a number may be an index. ``size``: of symbolic
    dimensions other than the rows. Raises one of FAILURES."""
    random = np.random.default_rng(0)
    arrays = []
    for spec, dims in zip(model.spec.inputs, model.dims, strict=True):
        shape = [dim if isinstance(dim, int) and dim >= 0 else size for dim in dims]
        if model.spec.batchable:
            shape[0] = rows
        if element_count(shape) > _MAX_ELEMENTS:
            raise _TooLarge(f"input '{spec.name}' of shape {shape} is too large to try")
        arrays.append(_random(random, spec.datatype, shape))
    return arrays


def _random(random: np.random.Generator, datatype: str, shape: Sequence[int]) -> Array:
    if datatype == "BF16":
        return to_bf16(random.standard_normal(shape))
    if datatype in ("FP16", "FP32", "FP64"):
        return random.standard_normal(shape).astype(DTYPES[datatype])
    bits = np.asarray(random.integers(0, 2, shape))
    if bits.ndim:
        bits[1:2] = 1 - bits[:1]  # two rows that were equal by chance would not show that they are mixed
    return bits.astype("U1").astype(object) if datatype == "BYTES" else bits.astype(DTYPES[datatype])
