"""What to change about a model so that it serves better: facts in, sentences out. Each rule says what it saw, why it
matters and what to do; one that has nothing to say says nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.wire.models import ModelSpec
from penstock.worker.config import MAX_BATCH_SIZE, ModelConfig
from penstock.worker.onnxfile import OnnxFile
from penstock.worker.trial import Measured, Operators, Optimized, Step
from penstock.worker.tuning import batch_time

_ENOUGH: Final = 0.95  # of the highest throughput is as good as it
_SLOWER: Final = 1.25  # times as long for a row is slower
_GROWS: Final = 1.2  # times the throughput of the step before is growth
_RATE_ENOUGH: Final = 50_000  # rows a second: beyond it not the model is what a request costs
_BATCH_S: Final = 100e-6  # what a batch costs a worker beside its model
_OPSET_OLD: Final = 13  # before it, exporters of today do not go
_MOVERS: Final = frozenset({"Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze", "Identity", "Expand"})
_MOVERS_SHARE: Final = 0.3
_MOVERS_MIN: Final = 5
_WEIGHTS_LARGE: Final = 256 << 20
_FILE_LARGE: Final = 1 << 30  # protobuf ends at 2 GiB
_NAMES_MAX: Final = 4  # in a sentence


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a model. ``why_alone``: why its requests run one by one, or "". ``cores``: that this process
    may use."""

    spec: ModelSpec
    why_alone: str
    config: ModelConfig
    file: OnnxFile
    optimized: Optimized
    measured: Measured
    cores: int


def advise(facts: Facts) -> list[str]:
    """A sentence for each thing that could be better, the heaviest first."""
    return [sentence for rule in _RULES for sentence in rule(facts)]


# --- batches ---


def _fixed_rows(facts: Facts) -> Iterator[str]:
    fixed = [
        (kind, each)
        for kind, tensors in (("input", facts.spec.inputs), ("output", facts.spec.outputs))
        for each in tensors
        if not facts.spec.batchable and each.shape and each.shape[0] >= 0
    ]
    # One without inputs, or with a scalar, would still run alone.
    if fixed and facts.spec.inputs and all(each.shape for each in facts.spec.inputs):
        kind, each = fixed[0]
        names = _listed([tensor.name for _, tensor in fixed])
        yield (
            f"the first dimension of {kind} '{each.name}' is fixed at {each.shape[0]}, so every request runs by "
            f"itself. If it counts rows, export it as a symbolic one for {names}: dynamic_shapes with "
            f"torch.onnx.export and dynamo=True, else dynamic_axes={{'{each.name}': {{0: 'N'}}}}"
        )


def _mixed_rows(facts: Facts) -> Iterator[str]:
    if "changes with the rows beside it" in facts.why_alone:
        yield (
            f"{facts.why_alone}, so every request runs by itself. If that is not meant, look for a softmax, mean, "
            "normalisation or sort over the first axis; models exported in training mode have such"
        )


def _sizes_beside_rows(facts: Facts) -> Iterator[str]:
    dynamic = [each.name for each in facts.spec.inputs if facts.spec.batchable and -1 in each.shape[1:]]
    if dynamic:
        yield (
            f"beside its rows, {_listed(dynamic)} has dimensions of any size, and only requests of the same sizes "
            "share a batch: have callers pad to a few sizes"
        )


def _batch_size(facts: Facts) -> Iterator[str]:
    steps = facts.measured.steps
    picked = facts.config.latency_target is not None or facts.config.preferred_batch_sizes is not None
    if not facts.spec.batchable or picked or len(steps) < 2:
        return
    best, last = max(steps, key=_rate), steps[-1]
    enough = next(step for step in steps if _rate(step) >= _ENOUGH * _rate(best))
    if last.row_s > _SLOWER * best.row_s:
        yield (
            f"a row takes {last.row_s / best.row_s:.1f} times as long in batches of {last.rows} as of {best.rows}: "
            f"max_batch_size = {enough.rows} in model.toml"
        )
    elif enough.rows < last.rows:
        yield (
            f"rows/s do not grow beyond batches of {enough.rows}, and larger ones make all in them wait longer: "
            f"max_batch_size = {enough.rows} in model.toml"
        )
    elif (
        last.rows == facts.spec.max_batch_size < MAX_BATCH_SIZE
        and _rate(last) >= _GROWS * _rate(steps[-2])
        and _rate(last) < _RATE_ENOUGH
    ):
        yield (
            f"rows/s still grow at batches of {last.rows}, which is as many as may run together: try "
            f"max_batch_size = {min(2 * last.rows, MAX_BATCH_SIZE)} in model.toml"
        )


def _latency_target(facts: Facts) -> Iterator[str]:
    target_s, steps = facts.config.latency_target_s, facts.measured.steps
    if facts.spec.batchable and target_s and steps and steps[0].seconds > batch_time(target_s):
        yield (
            f"latency_target = '{facts.config.latency_target}' cannot be kept: a batch of "
            f"{counted(steps[0].rows, 'row')} takes {steps[0].seconds * 1e3:.3g} ms, and a request that misses one "
            "waits for two; raise it"
        )


def _rate(step: Step) -> float:
    """Rows a second of a worker."""
    return step.rows / (step.seconds + _BATCH_S)


# --- tensors and graph ---


def _doubles_of_floats(facts: Facts) -> Iterator[str]:
    names = [each.name for each in (*facts.spec.inputs, *facts.spec.outputs) if each.datatype == "FP64"]
    if names:
        yield (
            f"{_listed(names)} is float64, which takes twice the memory and time of float32: export it as float32 "
            "unless the digits matter"
        )


def _strings(facts: Facts) -> Iterator[str]:
    names = [each.name for each in (*facts.spec.inputs, *facts.spec.outputs) if each.datatype == "BYTES"]
    if names:
        yield (
            f"{_listed(names)} holds strings, which are packed and copied one by one and never lie in shared memory: "
            "numbers cost less, where callers can look them up"
        )


def _movers(facts: Facts) -> Iterator[str]:
    after = facts.optimized.operators
    found = Counter({kind: count for (domain, kind), count in after.items() if kind in _MOVERS and not domain})
    if found.total() >= max(_MOVERS_MIN, _MOVERS_SHARE * sum(after.values())):
        said = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
        yield (
            f"{found.total()} of {sum(after.values())} nodes only move or convert data once the optimizer is done "
            f"({said}): a newer exporter, one type of numbers throughout or onnxsim may be rid of them"
        )


def _old_opset(facts: Facts) -> Iterator[str]:
    opset = facts.file.opsets.get("", _OPSET_OLD)
    if opset < _OPSET_OLD:
        yield (
            f"opset {opset} is old: ONNX Runtime fuses less of what is written in it; export again with 17 or newer, "
            "or use onnx.version_converter"
        )


def _inputs_with_values(facts: Facts) -> Iterator[str]:
    given = [each.name for each in facts.file.inputs if each.name in facts.file.initializers]
    if given and facts.file.ir_version >= 4:
        yield (
            f"{_listed(given)}: weights that are listed as inputs as well, so the optimizer may not count on them; "
            "python -m onnxruntime.tools.remove_initializer_from_input mends the file"
        )


# --- memory and threads ---


def _large_weights(facts: Facts) -> Iterator[str]:
    file = facts.file
    if file.weight_bytes >= _WEIGHTS_LARGE:
        yield (
            f"it has {amount(file.weight_bytes)} of weights, which workers share once they are prepared: "
            "'penstock models prepare' does that before the first start"
        )
    if file.inline_bytes >= _FILE_LARGE:
        yield (
            f"{amount(file.inline_bytes)} of weights are in the file itself, which cannot hold more than 2 GiB and is "
            "copied when it is loaded: save them outside (onnx.save with save_as_external_data=True)"
        )


def _threads(facts: Facts) -> Iterator[str]:
    threads = facts.config.intra_op_threads
    if threads * facts.config.instances > facts.cores:
        yield (
            f"{facts.config.instances} instances of {threads} threads each are more than the {facts.cores} cores there "
            "are: they would take turns; lower intra_op_threads or instances in model.toml"
        )


_RULES: Final[tuple[Callable[[Facts], Iterator[str]], ...]] = (
    _fixed_rows,
    _mixed_rows,
    _batch_size,
    _latency_target,
    _sizes_beside_rows,
    _inputs_with_values,
    _movers,
    _old_opset,
    _doubles_of_floats,
    _strings,
    _large_weights,
    _threads,
)


# --- what the optimizer did ---


def changes(before: Operators, after: Operators) -> list[str]:
    """In words: how many nodes there were and are, which kinds have come, and which have gone."""
    lines = [f"of {counted(sum(before.values()), 'node')} it makes {sum(after.values())}"]
    come = {key: count - before.get(key, 0) for key, count in after.items() if count > before.get(key, 0)}
    gone = {key: count - after.get(key, 0) for key, count in before.items() if count > after.get(key, 0)}
    if come:
        lines.append(f"new: {operators(come)}")
    if gone:
        lines.append(f"gone: {operators(gone)}")
    return lines


def operators(counts: Operators) -> str:
    """ "4 Conv, 2 Relu", the most frequent first; those that are not ONNX's own with their domain."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {f'{domain}.' if domain else ''}{kind}" for (domain, kind), count in ordered)


def amount(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"


def counted(count: int, what: str) -> str:
    """ "1 node", "2 nodes"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    shown = [f"'{name}'" for name in names[:_NAMES_MAX]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
