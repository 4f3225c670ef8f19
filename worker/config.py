"""``model.toml``: what a user may say about a model. Nothing has to be said: names, types and shapes are in the
model."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import msgspec.inspect

from penstock.worker.versions import VersionPolicy

_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)")
_LONGEST_S: Final = {"max_queue_delay": 60.0, "latency_target": 60.0, "max_compute": 3600.0}
_SIZES_MAX: Final = 32  # preferred ones
MAX_BATCH_SIZE: Final = 4096  # rows
_FORMS: Final = {"version_policy": '"latest", "all", {latest = 2} or [3, 5]'}  # of keys that have several

CPU: Final = "cpu"  # the device that every worker has; others are cuda:0, cuda:1, ...
_GPU_INSTANCES: Final = 2
Provider = Literal["tensorrt", "cuda", "cpu"]

T = TypeVar("T")


class ConfigError(Exception):
    """A file that cannot be followed; the message names the file, the key and what is expected."""


_Rows = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_SIZE)]


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of a model.toml, with Triton's names. Durations are text with a unit, such as "2ms"."""

    # Which versions are served: "latest", {latest = 2}, "all", or [3, 5].
    version_policy: VersionPolicy = "latest"
    # 0: requests run alone, whatever the model could; None: the largest of the preferred, or DEFAULT_BATCH_SIZE.
    max_batch_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BATCH_SIZE)] | None = None
    max_queue_delay: str = "0ms"
    # Within which requests are done once they are here: batch size and delay are picked for it. None: they are not.
    latency_target: str | None = None
    # Rows that batches are padded to, ascending; none: to none. The last is the most that run together.
    preferred_batch_sizes: Annotated[tuple[_Rows, ...], msgspec.Meta(min_length=1, max_length=_SIZES_MAX)] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0  # the model's share of a worker beside other models
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
        values = read_toml(path)
    except FileNotFoundError:
        return default_config(device)
    if not values.get("cuda_graphs"):
        values.setdefault("instances", default_config(device).instances)
    config = convert(values, ModelConfig, str(path))
    for key, most_s in _LONGEST_S.items():
        text = getattr(config, key)
        try:
            if text is not None and parse_duration(text) > most_s:
                raise ValueError(f"{text!r} is longer than {most_s:.0f}s")
        except ValueError as error:
            raise ConfigError(f"{path}: key '{key}': {error}") from None
    if config.max_compute is not None and not config.max_compute_s:
        raise ConfigError(f"{path}: key 'max_compute': it is more than nothing; without the key, 30s or more")
    problem = _contradiction_of_batches(config) or _contradiction(config)
    if problem:
        raise ConfigError(f"{path}: {problem}")
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


def _contradiction_of_batches(config: ModelConfig) -> str:
    """What cannot be followed of what a configuration says of batches, or ""."""
    if config.latency_target is not None:
        if config.latency_target_s == 0:
            return "key 'latency_target': it is more than nothing; without the key, nothing is waited for"
        if config.max_queue_delay_s > 0:
            return (
                f"keys 'latency_target' and 'max_queue_delay': with a target the delay is picked, so leave out "
                f"max_queue_delay = {config.max_queue_delay!r}"
            )
    sizes = config.preferred_batch_sizes
    if sizes is None:
        return ""
    if list(sizes) != sorted(set(sizes)):
        return f"key 'preferred_batch_sizes': they ascend, each once, not {list(sizes)}"
    if sizes[-1] != config.rows_max:
        return (
            f"keys 'preferred_batch_sizes' and 'max_batch_size': the largest preferred size, {sizes[-1]}, is the most "
            f"rows that can run, and {config.rows_max} are allowed; make them the same, or leave out max_batch_size"
        )
    return ""


def _contradiction(config: ModelConfig) -> str:
    """What cannot be followed in a configuration of a GPU, or ""."""
    providers = ("cuda", "cpu") if config.providers is None else config.providers
    if not providers or len(set(providers)) < len(providers):
        return f"key 'providers': name each once, and one at least, not {list(providers)}"
    if "cpu" in providers[:-1]:
        return f"key 'providers': cpu runs everything, so what comes after it is never asked: {list(providers)}"
    if config.fp16 and "tensorrt" not in providers:
        return "key 'fp16': only TensorRT computes in FP16 what is FP32; add 'tensorrt' to providers, or export in FP16"
    if config.cuda_graphs and (providers[0] != "cuda" or config.instances != 1):
        return "key 'cuda_graphs': they take 'cuda' as the first of the providers, and one instance"
    return ""


def read_toml(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, and ConfigError for what is not TOML or cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ConfigError(f"{path}: {error}") from None


def convert(values: dict[str, Any], kind: type[T], where: str) -> T:
    """``values`` as a dataclass or Struct. Raises ConfigError naming ``where``, the key and what is expected."""
    known = [each.name for each in msgspec.inspect.type_info(kind).fields]  # type: ignore[attr-defined]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).replace(" - at `key` in `$.", " - at `$.").partition(" - at `$.")
        path = path.rstrip("`")
        forms = _FORMS.get(re.split(r"[.\[]", path)[0])
        raise ConfigError(f"{where}: key '{path}': {what}{f'; write {forms}' if forms else ''}") from None
