"""``model.toml``: what a user may say about a model. Nothing has to be said: names, types and shapes are in the
model."""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec
import msgspec.inspect

from penstock.worker.classlabels import problem_of_file
from penstock.worker.tomllines import KeyPath, find_line
from penstock.worker.versions import NAMED_MAX, VersionNumber, VersionPolicy, is_version

_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)")
_LONGEST_S: Final = {
    "max_queue_delay": 60.0,
    "latency_target": 60.0,
    "max_compute": 3600.0,
    "max_sequence_idle": 86400.0,
}
_SIZES_MAX: Final = 32  # preferred ones
MAX_BATCH_SIZE: Final = 4096  # rows
_FORMS: Final = {"version_policy": '"latest", "all", {latest = 2} or [3, 5]'}  # of keys that have several
FILE_BYTES_MAX: Final = 1 << 20

CPU: Final = "cpu"  # the device that every worker has; others are cuda:0, cuda:1, ...
_GPU_INSTANCES: Final = 2
Provider = Literal["tensorrt", "cuda", "cpu"]

_LABEL_MAX: Final = 64  # characters
_DEVICES_MAX: Final = 64  # named in one file
_DEVICE: Final = re.compile(r"cpu|cuda(:\d{1,4})?", re.ASCII)
_KEY_SHOWN_MAX: Final = 80  # characters
_SYNTAX: Final = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)  # as tomllib says it
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")  # as msgspec says where something is

T = TypeVar("T")


class ConfigError(Exception):
    """A file that cannot be followed; the message names the file, the line, the key and what is expected."""


_Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
_Rows = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_SIZE)]


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of a model.toml, with Triton's names. Durations are text with a unit, such as "2ms"."""

    # Which versions are served: "latest", {latest = 2}, "all", or [3, 5].
    version_policy: VersionPolicy = "latest"
    # Names for versions, each served beside what the policy asks for: {stable = 3, canary = 4}.
    labels: Annotated[dict[str, VersionNumber], msgspec.Meta(max_length=NAMED_MAX)] = {}
    # Where requests that name no version go, in percent: labels, or numbers of versions. Nothing: to the newest version
    # that the policy asks for.
    traffic: Annotated[dict[str, _Percent], msgspec.Meta(max_length=NAMED_MAX)] = {}
    # What the classes of an output are called, for classification: {output = "labels.txt"}, a file in the model's
    # directory with a label in each line.
    class_labels: Annotated[dict[str, str], msgspec.Meta(max_length=NAMED_MAX)] = {}
    # Workers that load it: "cpu", "cuda:0", or "cuda" for those on any GPU. None: all.
    devices: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=_DEVICES_MAX)] | None = None
    # 0: requests run alone, whatever the model could; None: the largest of the preferred, or DEFAULT_BATCH_SIZE.
    max_batch_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BATCH_SIZE)] | None = None
    max_queue_delay: str = "0ms"
    # Within which requests are done once they are here: batch size and delay are picked for it. None: they are not.
    latency_target: str | None = None
    # Rows that batches are padded to, ascending; none: to none. The last is the most that run together.
    preferred_batch_sizes: Annotated[tuple[_Rows, ...], msgspec.Meta(min_length=1, max_length=_SIZES_MAX)] | None = None
    response_cache: bool = False  # gateways keep answers, and give them again to requests of the same inputs
    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0  # the model's share of a worker beside other models
    max_sequence_idle: str = "1s"  # when nothing of a sequence has come for so long, it is over
    # Batches of this model that run at once; on a GPU 2, unless it is said.
    instances: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    intra_op_threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    intra_op_spinning: bool = False  # look for the next batch in a loop before they sleep
    # A batch that computes for longer never ends, and the worker is started anew. None: see [worker] max_compute_s.
    max_compute: str | None = None

    # Of workers on a GPU. The first of the providers must be there, the others run what it cannot; None: cuda, cpu.
    providers: tuple[Provider, ...] | None = None
    gpu_memory_limit: Annotated[int, msgspec.Meta(ge=1)] | None = None  # bytes, of what its runs take
    gpu_arena: Literal["same_as_requested", "next_power_of_two"] = "same_as_requested"  # how that grows
    cudnn_search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"  # for the fastest convolution
    tf32: bool = True  # multiply FP32 with 10 bits of mantissa, where the GPU can, as ONNX Runtime does by itself
    fp16: bool = False  # TensorRT may compute FP32 models in FP16
    cuda_graphs: bool = False  # record what a batch launches, once for each power of two of rows, and replay it

    @property
    def max_queue_delay_s(self) -> float:
        return parse_duration(self.max_queue_delay)

    @property
    def max_sequence_idle_s(self) -> float:
        return parse_duration(self.max_sequence_idle)

    @property
    def latency_target_s(self) -> float:
        """0: there is none."""
        return 0.0 if self.latency_target is None else parse_duration(self.latency_target)

    @property
    def max_compute_s(self) -> float:
        """0: it is not said."""
        return 0.0 if self.max_compute is None else parse_duration(self.max_compute)

    @property
    def rows_max(self) -> int:
        """That a batch, or a request, has."""
        if self.max_batch_size is not None:
            return max(self.max_batch_size, 1)
        sizes = self.preferred_batch_sizes
        return sizes[-1] if sizes else DEFAULT_BATCH_SIZE

    @property
    def batch_keys(self) -> list[str]:
        """Those that are set and say something of batches of several requests alone."""
        said = {
            "max_batch_size": (self.max_batch_size or 1) > 1,
            "max_queue_delay": self.max_queue_delay_s > 0,
            "latency_target": self.latency_target is not None,
            "preferred_batch_sizes": self.preferred_batch_sizes is not None,
        }
        return [key for key, is_said in said.items() if is_said]

    def loaded_on(self, device: str) -> bool:
        """Whether workers on this device, such as "cuda:0", load the model."""
        return self.devices is None or device in self.devices or ("cuda" in self.devices and device != CPU)

    @property
    def weight_thousandths(self) -> int:
        return round(self.weight * 1000)


DEFAULT_BATCH_SIZE: Final = 32
_TRITON_FIELDS: Final = {"max_queue_delay": "dynamic_batching.max_queue_delay_microseconds"}


def parse_duration(text: str) -> float:
    """ "2ms" -> 0.002 seconds. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and a unit, such as '500us', '2ms' or '1s'")
    return float(match[1]) * _UNITS_S[match[2]]


def default_config(device: str = CPU) -> ModelConfig:
    """Of a model of which nothing is said. On a GPU two batches run at once, so that one is copied while the other
    computes."""
    return ModelConfig(instances=1 if device == CPU else _GPU_INSTANCES)


def load_config(path: Path, device: str = CPU) -> ModelConfig:
    """The configuration in a file, or the defaults where there is none, for a device. Raises ConfigError."""
    try:
        toml = read_toml(path)
    except FileNotFoundError:
        return default_config(device)
    if not toml.values.get("cuda_graphs"):
        toml.values.setdefault("instances", default_config(device).instances)
    return _check(toml)


def check_config(values: dict[str, Any], where: str) -> ModelConfig:
    """The same of values that no file has; ``where`` is said in its place. Raises ConfigError."""
    return _check(Toml(where, "", values))


def _check(toml: Toml) -> ModelConfig:
    config = convert(toml, "", ModelConfig)
    for at, problem in _problems(config):
        raise toml.error(at, problem)
    return config


def without_effect(config: ModelConfig, why_alone: str, file_name: str = "model.toml") -> str:
    """That keys of a configuration change nothing, why, and the way out, as a sentence; or "". ``why_alone``: why the
    model's requests run alone; "": they need not. Only the loaded model tells, so it is no ConfigError. ``file_name``:
    what the configuration was read from."""
    keys = [_TRITON_FIELDS.get(key, key) if file_name != "model.toml" else key for key in config.batch_keys]
    if not keys or not why_alone:
        return ""
    named = ", ".join(f"'{key}'" for key in keys)
    several = len(keys) > 1
    otherwise = "export the model with independent rows along a symbolic first dimension"
    if config.max_batch_size == 0:
        otherwise = "make max_batch_size 1 or more"
    return (
        f"{'keys' if several else 'key'} {named} in {file_name} {'have' if several else 'has'} no effect: requests of "
        f"this model run alone, since {why_alone}; leave {'them' if several else 'it'} out, or {otherwise}"
    )


def _problems(config: ModelConfig) -> Iterator[tuple[KeyPath, str]]:
    """What cannot be followed although each key has the right type: the first key that it is about, and a sentence."""
    for key, most_s in _LONGEST_S.items():
        text = getattr(config, key)
        try:
            if text is not None and parse_duration(text) > most_s:
                raise ValueError(f"{text!r} is longer than {most_s:.0f}s")
        except ValueError as error:
            yield (key,), f"key '{key}': {error}"
    if not config.max_sequence_idle_s:
        yield ("max_sequence_idle",), "key 'max_sequence_idle': it is more than nothing, such as '1s'"
    if config.max_compute is not None and not config.max_compute_s:
        yield ("max_compute",), "key 'max_compute': it is more than nothing; without the key, 30s or more"
    yield from _problems_of_versions(config)
    yield from _problems_of_devices(config)
    yield from _problems_of_batches(config)
    yield from _problems_of_providers(config)


def _problems_of_versions(config: ModelConfig) -> Iterator[tuple[KeyPath, str]]:
    for label in config.labels:
        if problem := problem_of_label(label):
            yield ("labels", label), f"key 'labels.{_shown(label)}': {problem}"
    for target in config.traffic:
        if target not in config.labels and not is_version(target):
            what = "it is neither a label of this file nor a version's number"
            hint = _hint(target, list(config.labels), "labels are") if config.labels else "there are no labels"
            yield ("traffic", target), f"key 'traffic.{_shown(target)}': {what}; {hint}"
    for output, file in config.class_labels.items():
        if problem := problem_of_file(file):
            yield ("class_labels", output), f"key 'class_labels.{_shown(output)}': {problem}"
    total = sum(config.traffic.values())
    if config.traffic and total != 100:
        yield ("traffic",), f"key 'traffic': it adds up to {total}; make it 100"


def problem_of_label(label: str) -> str:
    """Why a version cannot be called so, or ""."""
    if not 0 < len(label) <= _LABEL_MAX:
        return f"a label has 1 to {_LABEL_MAX} characters, not {len(label)}"
    if not label.isprintable() or "/" in label:
        return "a label is of characters that can be printed, without '/'"
    if label.isdecimal():
        return f"a whole number looks like a version; call it 'v{label}'"
    return ""


def _problems_of_devices(config: ModelConfig) -> Iterator[tuple[KeyPath, str]]:
    for index, name in enumerate(config.devices or ()):
        if _DEVICE.fullmatch(name) is None:
            forms = 'write "cpu", "cuda:0" and so on, or "cuda" for any GPU'
            yield ("devices", index), f"key 'devices[{index}]': {_shown(name)!r} is no device; {forms}"


def _problems_of_batches(config: ModelConfig) -> Iterator[tuple[KeyPath, str]]:
    if config.latency_target is not None:
        if config.latency_target_s == 0:
            yield (
                ("latency_target",),
                "key 'latency_target': it is more than nothing; without the key, nothing is waited for",
            )
        if config.max_queue_delay_s > 0:
            yield (
                ("latency_target",),
                "keys 'latency_target' and 'max_queue_delay': with a target the delay is picked, so leave out "
                f"max_queue_delay = {config.max_queue_delay!r}",
            )
    sizes = config.preferred_batch_sizes
    if sizes is None:
        return
    at: KeyPath = ("preferred_batch_sizes",)
    if list(sizes) != sorted(set(sizes)):
        yield at, f"key 'preferred_batch_sizes': they ascend, each once, not {list(sizes)}"
    if sizes[-1] != config.rows_max:
        yield (
            at,
            f"keys 'preferred_batch_sizes' and 'max_batch_size': the largest preferred size, {sizes[-1]}, is the most "
            f"rows that can run, and {config.rows_max} are allowed; make them the same, or leave out max_batch_size",
        )


def _problems_of_providers(config: ModelConfig) -> Iterator[tuple[KeyPath, str]]:
    providers = ("cuda", "cpu") if config.providers is None else config.providers
    at: KeyPath = ("providers",)
    if not providers or len(set(providers)) < len(providers):
        yield at, f"key 'providers': name each once, and one at least, not {list(providers)}"
    if "cpu" in providers[:-1]:
        yield at, f"key 'providers': cpu runs everything, so what comes after it is never asked: {list(providers)}"
    if config.fp16 and "tensorrt" not in providers:
        yield (
            ("fp16",),
            "key 'fp16': only TensorRT computes in FP16 what is FP32; add 'tensorrt' to providers, or export in FP16",
        )
    if config.cuda_graphs and (providers[0] != "cuda" or config.instances != 1):
        yield (
            ("cuda_graphs",),
            "key 'cuda_graphs': they take 'cuda' as the first of the providers, and one instance",
        )


# --- TOML, and where things are in it ---


class Toml(NamedTuple):
    """A text that tomllib has read. ``where``: its file, for messages."""

    where: str
    text: str
    values: dict[str, Any]

    def error(self, at: KeyPath, sentence: str) -> ConfigError:
        """FILE:LINE: and the sentence: editors jump there. ``at``: the key that it is about."""
        line = find_line(self.text, at)
        return ConfigError(f"{self.where}{'' if line is None else f':{line}'}: {sentence}")


def read_toml(path: Path) -> Toml:
    """Raises FileNotFoundError, and ConfigError for what is not TOML or cannot be read."""
    return parse_toml(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """All that a configuration says. Raises FileNotFoundError, and ConfigError for what cannot be one."""
    try:
        # What is no file, such as a pipe, must not make us wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: it is no file, so it is no configuration; replace it")
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: it has more than {FILE_BYTES_MAX} bytes, so it is no configuration; replace it")
    return content


def parse_toml(content: bytes, where: str) -> Toml:
    """Raises ConfigError for what is not TOML."""
    try:
        text = content.decode("utf-8")
        return Toml(where, text, tomllib.loads(text))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}:{line}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX.fullmatch(str(error))
        if match is not None:
            raise ConfigError(f"{where}:{match[2]}: {match[1]} (column {match[3]})") from None
        lines = max(1, text.count("\n") + (not text.endswith("\n")))  # it is said of the end alone
        raise ConfigError(f"{where}:{lines}: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, arrays that are too deep
        raise ConfigError(f"{where}: {error}") from None


def convert(toml: Toml, section: str, kind: type[T]) -> T:
    """A section of a file, or with "" all of it, as a dataclass or Struct. Raises ConfigError naming the line, the key
    and what is expected."""
    values = toml.values.get(section, {}) if section else toml.values
    at: KeyPath = (section,) if section else ()
    place = f"[{section}]: " if section else ""
    known = [each.name for each in msgspec.inspect.type_info(kind).fields]  # type: ignore[attr-defined]
    for key in values:
        if key not in known:
            hint = _hint(key, known, "known keys are")
            raise toml.error((*at, key), f"{place}key '{_shown(key)}': unknown; {hint}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).replace(" - at `key` in `$.", " - at `$.").partition(" - at `$")
        steps = tuple(int(step[2]) if step[2] else step[1] for step in _STEP.finditer(path.partition("[...]")[0]))
        if "[...]" in path:
            steps = (*steps, *_culprit(values, steps, kind, str(error)))
        forms = _FORMS.get(str(steps[0]) if steps else "")
        sentence = f"{place}key '{_name(steps)}': {what}{f'; write {forms}' if forms else ''}"
        raise toml.error((*at, *steps), sentence) from None


def _culprit(values: dict[str, Any], path: KeyPath, kind: type, said: str) -> KeyPath:
    """Of the keys of the table at a path, whose names msgspec does not tell, the first that alone makes it say the
    same."""
    table = values.get(str(path[0])) if len(path) == 1 else None  # there are none deeper
    for key, value in table.items() if isinstance(table, dict) else ():
        try:
            msgspec.convert(values | {str(path[0]): {key: value}}, kind)
        except msgspec.ValidationError as error:
            if str(error) == said:
                return (key,)
    return ()


def _name(path: KeyPath) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in path).removeprefix(".")


def _hint(key: str, known: Sequence[str], these: str) -> str:
    """Which one was meant, or all there are."""
    near = difflib.get_close_matches(key[:_KEY_SHOWN_MAX], known, 1)
    return f"did you mean '{near[0]}'?" if near else f"{these} {', '.join(known)}"


def _shown(key: str) -> str:
    """A key or value as a line of a log can have it."""
    shown = "".join(each if each.isprintable() else "?" for each in key[: _KEY_SHOWN_MAX + 1])
    return f"{shown[:_KEY_SHOWN_MAX]}..." if len(shown) > _KEY_SHOWN_MAX else shown
