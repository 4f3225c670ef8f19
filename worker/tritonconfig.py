"""Triton's ``config.pbtxt``, where there is no model.toml: what it says in terms of a model.toml, and a sentence for
each thing that it asks for and does not get.

Every field that is set is either taken (by a function here), named in a sentence (``UNHEEDED`` in tritonfields.py), or
one that asks for what is so anyway (``AGREED``); a test holds that each field of the schema is one of these. A field
that has Triton's default asks for nothing. What nobody could be served right without ends in a ConfigError: then that
is why the model is unavailable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import msgspec

from penstock.wire.models import ModelSpec, TensorSpec
from penstock.worker.classlabels import problem_of_file
from penstock.worker.config import CPU, MAX_BATCH_SIZE, ConfigError, ModelConfig, Provider, default_config
from penstock.worker.textformat import find_line, read_text
from penstock.worker.tritonfields import (
    ACCOUNTED,
    CUDA_OPTIONS,
    PARAMETERS,
    PARAMETERS_AGREED,
    REFUSED,
    UNHEEDED,
)
from penstock.worker.tritonschema import TRITON
from penstock.worker.versions import NAMED_MAX, VersionPolicy

FILE_NAME: Final = "config.pbtxt"
MODEL_FILE_NAME: Final = "model.onnx"
TRITON_KEYS: Final = frozenset(each.partition(":")[0] for each in re.split(r"[ |]", TRITON.messages["ModelConfig"]))
_DELAY_US_MAX: Final = 60_000_000
_IDLE_US_MAX: Final = 86_400_000_000
_INSTANCES_MAX: Final = 64
_THREADS_MAX: Final = 1024
_NUMBER: Final = re.compile(r"\d{1,20}", re.ASCII)
_TRUE: Final = ("1", "true", "True")
_NEWER: Final = "if it is of a newer Triton, leave it out, or write a model.toml, which is then read instead"
_INSTEAD: Final = "write a model.toml, which is then read instead"


class Declared(NamedTuple):
    """An input or output as a configuration declares it. ``path``: of the field; ``shape``: None where it does
    not tell the model's."""

    path: str
    kind: str
    name: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """``file_name``: of the model, in the directory of its version. ``unheeded``: a sentence for each thing that the
    file asks for and does not get."""

    config: ModelConfig
    file_name: str = MODEL_FILE_NAME
    unheeded: tuple[str, ...] = ()
    declared: tuple[Declared, ...] = ()


def load_triton(path: Path, name: str, device: str = CPU) -> TritonConfig:
    """What a file says of the model in the directory ``name``, for workers on a device. Raises FileNotFoundError and
    ConfigError."""
    return read_triton(read_text(path), str(path), name, device)


def read_triton(text: str, where: str, name: str, device: str = CPU) -> TritonConfig:
    """The same of a text; ``where`` is its file's name, for messages. Raises ConfigError."""
    return _read(_Reader(where, text, TRITON.parse("ModelConfig", text, where, _NEWER), device), name)


def read_triton_json(text: str, where: str, name: str, device: str = CPU) -> TritonConfig:
    """The same of JSON, as Triton's repository API takes it."""
    return _read(_Reader(where, "", TRITON.parse_json("ModelConfig", text, where, _NEWER), device), name)


def _read(reader: _Reader, name: str) -> TritonConfig:
    reader.refuse(name)
    return TritonConfig(reader.config(), reader.file_name(), tuple(reader.unheeded), tuple(reader.declared()))


def contradictions(declared: Sequence[Declared], spec: ModelSpec) -> list[str]:
    """Where the inputs and outputs that a configuration declares are not those of the model, a sentence each. Requests
    are held against the model alone."""
    tensors = {("input", each.name): each for each in spec.inputs} | {
        ("output", each.name): each for each in spec.outputs
    }
    return [
        f"{FILE_NAME}: {each.path}: {problem}; the model is followed"
        for each in declared
        if (problem := _contradiction(each, tensors.get((each.kind, each.name))))
    ]


def _contradiction(said: Declared, there: TensorSpec | None) -> str:
    if there is None:
        return f"the model has no {said.kind} '{said.name}'"
    if said.datatype not in ("INVALID", there.datatype):
        return f"'{said.name}' is declared as {said.datatype}, and in the model it is {there.datatype}"
    unknown = said.kind == "output" and not there.shape  # the file need not declare it
    if said.shape is not None and not unknown and not _fits(said.shape, there.shape):
        return f"'{said.name}' is declared with shape {list(said.shape)}, and in the model it has {list(there.shape)}"
    return ""


def _fits(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(-1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


@dataclass(slots=True)
class _Reader:
    """One file. What is found not to be followed is added to ``unheeded``."""

    where: str
    text: str
    message: Any
    device: str
    unheeded: list[str] = field(default_factory=list)

    def refuse(self, name: str) -> None:
        """Raises ConfigError for what nobody can be served without."""
        message = self.message
        if message.name not in ("", name):
            raise self._error(
                "name", f"it is {message.name[:80]!r}, and the directory's is {name!r}; make them the same"
            )
        for key, served in (("platform", "onnxruntime_onnx"), ("backend", "onnxruntime")):
            said = getattr(message, key)
            if key == "platform" and said == "ensemble":
                raise self._error("platform", f"'ensemble': {REFUSED['ensemble_scheduling']}")
            if said not in ("", served):
                raise self._error(
                    key, f"only ONNX models are served ('{served}'), not {said[:80]!r}; export it to ONNX"
                )
        for path, generic, _value in _fields(message):
            if generic in REFUSED:
                raise self._error(path, REFUSED[generic])

    def config(self) -> ModelConfig:
        for path, generic, _value in _fields(self.message):
            if generic not in ACCOUNTED:  # of the schema, and forgotten here: it is said all the same
                self._say(path, "nothing here follows it")
            elif generic in UNHEEDED:
                self._say(path, UNHEEDED[generic])
        values: dict[str, Any] = {"version_policy": self._version_policy()}
        values["class_labels"] = self._class_labels()
        idle_us = self.message.sequence_batching.max_sequence_idle_microseconds
        if idle_us:
            path = "sequence_batching.max_sequence_idle_microseconds"
            values["max_sequence_idle"] = f"{self._within(path, idle_us, 1, _IDLE_US_MAX)}us"
        values |= self._batches() | self._instances() | self._accelerators() | self._optimization()
        values |= self._parameters({key: each.string_value for key, each in self.message.parameters.items()})
        values["response_cache"] = self.message.response_cache.enable
        if values.get("cuda_graphs"):
            self._settle_graphs(values)
        return msgspec.structs.replace(default_config(self.device), **values)

    def file_name(self) -> str:
        name: str = self.message.default_model_filename or MODEL_FILE_NAME
        parts = PurePosixPath(name).parts
        if not name.isprintable() or name.startswith("/") or ".." in parts or not parts or len(name) > 255:
            raise self._error("default_model_filename", f"{name[:80]!r} is no file in the version's directory")
        return name

    def declared(self) -> Iterator[Declared]:
        message = self.message
        rows = (-1,) if message.max_batch_size > 0 else ()
        filled_in = not rows and not (
            message.input and message.output
        )  # then it does not tell whether rows are in dims
        for kind in ("input", "output"):
            for index, each in enumerate(getattr(message, kind)):
                datatype = _name_of(each, "data_type").removeprefix("TYPE_").replace("STRING", "BYTES")
                shape = None if filled_in or each.HasField("reshape") else (*rows, *each.dims)
                yield Declared(f"{kind}[{index}]", kind, each.name[:80], datatype, shape)

    def _version_policy(self) -> VersionPolicy:
        policy = self.message.version_policy
        if policy.HasField("all"):
            return "all"
        if policy.HasField("specific"):
            path, versions = "version_policy.specific.versions", list(policy.specific.versions)
            if not 1 <= len(versions) <= NAMED_MAX:
                raise self._error(path, f"name 1 to {NAMED_MAX} versions, not {len(versions)}")
            return tuple(self._within(path, each, 0, 10**18 - 1) for each in versions)
        if policy.latest.HasField("num_versions"):
            path = "version_policy.latest.num_versions"
            return {"latest": self._within(path, policy.latest.num_versions, 1, NAMED_MAX)}
        return "latest"

    def _class_labels(self) -> dict[str, str]:
        files: dict[str, str] = {}
        for index, each in enumerate(self.message.output):
            if not each.label_filename:
                continue
            path = f"output[{index}].label_filename"
            if problem := problem_of_file(each.label_filename):
                raise self._error(path, problem)
            files[each.name] = each.label_filename
        return files

    def _batches(self) -> dict[str, Any]:
        message, batching = self.message, self.message.dynamic_batching
        most = self._within("max_batch_size", message.max_batch_size, 0, MAX_BATCH_SIZE)
        if not most:
            # Triton fills it in for a model that does not declare both, and then it batches, as is done here unasked.
            return {"max_batch_size": 0} if message.input and message.output else {}
        path = "dynamic_batching.max_queue_delay_microseconds"
        delay_us = self._within(path, batching.max_queue_delay_microseconds, 0, _DELAY_US_MAX)
        preferred = list(batching.preferred_batch_size)
        if preferred and preferred != [most]:
            self._say(
                "dynamic_batching.preferred_batch_size",
                f"a batch is closed when it is full ({most} rows), an instance is idle or the delay is over; where an "
                f"engine wants fixed sizes {_INSTEAD}, with preferred_batch_sizes: batches are padded to those",
            )
        return {"max_batch_size": most, "max_queue_delay": f"{delay_us}us"}

    def _instances(self) -> dict[str, Any]:
        """Those of the groups that are for this device; where none is, of all."""
        groups = [each for each in enumerate(self.message.instance_group) if not each[1].passive]
        if not groups:
            return {}
        counts = {
            index: self._within(f"instance_group[{index}].count", group.count, 0, _INSTANCES_MAX) or 1
            for index, group in groups
        }
        kinds = {index: _name_of(group, "kind") for index, group in groups}
        for index, group in groups:
            if kinds[index] == "KIND_AUTO" and group.gpus:
                kinds[index] = "KIND_GPU"
        on_gpu = self.device != CPU
        elsewhere = "KIND_CPU" if on_gpu else "KIND_GPU"
        here = [index for index in kinds if kinds[index] != elsewhere]
        values: dict[str, Any] = {}
        if on_gpu and not here:
            values["providers"] = (CPU,)  # the worker's GPU is for other models then
        for index, group in groups:
            path = f"instance_group[{index}]"
            if kinds[index] == "KIND_GPU" and not on_gpu:
                self._say(
                    f"{path}.kind", "a worker on the CPU serves the model too; start workers with --device cuda:0"
                )
            elif kinds[index] == "KIND_CPU" and on_gpu and here:
                self._say(f"{path}.kind", "a worker on a GPU runs all instances there; start others with --device cpu")
            elif on_gpu and group.gpus and self.device not in [f"cuda:{each}" for each in group.gpus]:
                self._say(
                    f"{path}.gpus", f"every worker serves every model, so also that on {self.device}; see --device"
                )
        total = sum(counts[index] for index in here or kinds)
        return values | {"instances": self._within("instance_group.count", total, 1, _INSTANCES_MAX)}

    def _accelerators(self) -> dict[str, Any]:
        top = "optimization.execution_accelerators.gpu_execution_accelerator"
        values: dict[str, Any] = {}
        for index, each in enumerate(self.message.optimization.execution_accelerators.gpu_execution_accelerator):
            path = f"{top}[{index}]"
            if each.name == "tensorrt":
                wanted: tuple[Provider, ...] = ("tensorrt", "cuda", "cpu")
                values |= {"providers": wanted} | self._tensorrt(f"{path}.parameters", each.parameters)
            elif each.name == "cuda":
                for key, value in sorted(each.parameters.items()):
                    values |= self._cuda(f"{path}.parameters[{key!r}]", key, value)
            else:
                self._say(f"{path}.name", f"{each.name!r} is not one of 'tensorrt' and 'cuda'; leave it out")
        if values and self._instances_on_cpu_alone():
            self._say(top, "all instances are of KIND_CPU; leave it out")
            return {}
        return values

    def _instances_on_cpu_alone(self) -> bool:
        groups = self.message.instance_group
        return bool(groups) and all(_name_of(each, "kind") == "KIND_CPU" for each in groups)

    def _tensorrt(self, path: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in sorted(parameters.items()):
            agreed = key in ("trt_engine_cache_enable", "trt_timing_cache_enable") and value in _TRUE
            if key == "precision_mode" and value in ("FP16", "FP32"):
                values["fp16"] = value == "FP16"
            elif not agreed:
                self._say(
                    f"{path}[{key!r}]", f"TensorRT's engines are kept in the store, and {value[:40]!r} is not set"
                )
        return values

    def _cuda(self, path: str, key: str, value: str) -> dict[str, Any]:
        """One option of ONNX Runtime's CUDA provider."""
        if key == "gpu_mem_limit" and _NUMBER.fullmatch(value):
            nbytes = int(value)
            return {"gpu_memory_limit": nbytes} if 0 < nbytes < 1 << 62 else {}  # more is no limit, as in Triton
        name, known = CUDA_OPTIONS.get(key, ("", {}))
        if value in known:
            return {name: known[value]}
        self._say(path, f"{value[:40]!r} is not set; options that are: gpu_mem_limit, {', '.join(CUDA_OPTIONS)}")
        return {}

    def _optimization(self) -> dict[str, Any]:
        wanted = self.message.optimization
        if wanted.graph.level not in (0, 1):
            self._say("optimization.graph.level", "models are optimized as far as ONNX Runtime can; leave it out")
        for key in ("input_pinned_memory", "output_pinned_memory"):
            memory = getattr(wanted, key)
            if memory.HasField("enable") and not memory.enable:
                self._say(f"optimization.{key}.enable", "batches for a GPU go through pinned memory; leave it out")
        return {"cuda_graphs": True} if wanted.cuda.graphs else {}

    def _parameters(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in sorted(parameters.items()):
            path = f"parameters[{key[:80]!r}]"
            if key == "intra_op_thread_count" and _NUMBER.fullmatch(value):
                if int(value):
                    values["intra_op_threads"] = self._within(path, int(value), 1, _THREADS_MAX)
                else:
                    self._say(path, f"0 would be a thread for each core; a batch has one, or say so many: {_INSTEAD}")
            elif key in ("gpu_mem_limit", "cudnn_conv_algo_search", "arena_extend_strategy"):
                values |= self._cuda(path, key, value)
            elif (key, value) not in PARAMETERS_AGREED and key != "inter_op_thread_count":
                self._say(path, PARAMETERS.get(key, "nothing here reads it"))
        return values

    def _settle_graphs(self, values: dict[str, Any]) -> None:
        """They take CUDA first and one instance: as many as are not said."""
        if values.get("providers", ("cuda",))[0] == "cuda" and values.setdefault("instances", 1) == 1:
            return
        values["cuda_graphs"] = False
        self._say("optimization.cuda.graphs", "CUDA graphs take CUDA's own provider and one instance; ask for these")

    def _within(self, path: str, value: int, least: int, most: int) -> int:
        if least <= value <= most:
            return value
        raise self._error(path, f"{value} is not from {least} to {most}; change it, or {_INSTEAD}")

    def _say(self, path: str, why: str) -> None:
        sentence = f"{FILE_NAME}: {path} is not followed: {why}"
        if sentence not in self.unheeded:
            self.unheeded.append(sentence)

    def _error(self, path: str, why: str) -> ConfigError:
        line = find_line(self.text, path)
        return ConfigError(f"{self.where}{'' if line is None else f':{line}'}: {path}: {why}")


def _name_of(message: Any, key: str) -> str:
    """An enumeration's value in a message."""
    field_of = message.DESCRIPTOR.fields_by_name[key]
    return str(field_of.enum_type.values_by_number[getattr(message, key)].name)


def _fields(message: Any, path: str = "", generic: str = "") -> Iterator[tuple[str, str, Any]]:
    """The fields that ask for something, and stand in one of the tables or are no message: their paths as a user finds
    them, and without indices."""
    for descriptor, value in message.ListFields():
        where, kind = f"{path}{descriptor.name}", f"{generic}{descriptor.name}"
        if kind in ACCOUNTED or descriptor.message_type is None:
            repeated = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
            if repeated or descriptor.message_type is not None or value != descriptor.default_value:
                yield where, kind, value
        elif hasattr(value, "ListFields"):
            yield from _fields(value, f"{where}.", f"{kind}.")
        elif descriptor.message_type.GetOptions().map_entry:
            yield where, kind, value
        else:
            for index, each in enumerate(value):
                yield from _fields(each, f"{where}[{index}].", f"{kind}.")
