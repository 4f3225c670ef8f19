"""The servers that bench/peers.py compares: what is installed, how each is started, what is asked of it.

Each is started as its own documentation says, with one process for inference, ONNX Runtime on one thread and batches
of up to 32 rows, and asked in the form that costs it least of those that its documentation offers. Where a batch may
wait to be filled, it waits as long as suits the server best: none at all, or its smallest step.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bench import http as bench_http
from bench import models as bench_models
from bench.peer_servers.session import MODEL, ROWS_MAX

ROOT: Final = Path(__file__).parents[1]
PORTS: Final = 3  # of each server: some want one for gRPC and one for metrics, too
RAW: Final = "raw bytes"
V2_BINARY: Final = "v2 binary"
V2_JSON: Final = "v2 JSON"
JSON: Final = "JSON"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where a server runs. ``environment``: the virtual one of Python; ``directory``: its own, empty."""

    environment: Path
    directory: Path
    repository: Path
    model: str
    ports: tuple[int, ...]

    @property
    def model_path(self) -> Path:
        return self.repository / self.model / "1" / "model.onnx"

    @property
    def python(self) -> str:
        return str(self.environment / "bin" / "python")


class Request(NamedTuple):
    path: str
    body: bytes
    headers: Mapping[str, str]


class Start(NamedTuple):
    command: list[str]
    variables: dict[str, str] = {}


@dataclass(frozen=True)
class Peer:
    """``title``: VERSION in it is replaced. ``packages``: as pip takes them, the first is the server; ONNX Runtime is
    added, in the version that Penstock runs here. ``waits``: for a batch to fill. ``leaves_out``: what of Penstock's
    work it does not do, or what of its own is not seen here."""

    title: str
    packages: tuple[str, ...]
    protocol: str
    path: str  # MODEL in it is replaced
    waits: str
    leaves_out: str
    start: Callable[[Place], Start]

    @property
    def name(self) -> str:
        """With the version."""
        return self.title.replace("VERSION", self.packages[0].partition("==")[2])


# --- how each is started


def _module(place: Place, name: str, *arguments: object) -> Start:
    return Start([place.python, "-m", f"bench.peer_servers.{name}", *map(str, arguments)])


def _start_fastapi(place: Place) -> Start:
    return _module(place, "fastapi_ort", place.repository, place.ports[0])


def _start_mosec(place: Place) -> Start:
    # Its front gives a request 3 s by default, less than a full line of images may take on a slow machine.
    address = ["--address=127.0.0.1", f"--port={place.ports[0]}", "--timeout=30000", "--log-level=warning"]
    return _module(place, "mosec_ort", *address, f"--path={place.directory / 'ipc'}")


def _start_litserve(place: Place) -> Start:
    return _module(place, "litserve_ort", place.ports[0])


def _start_bentoml(place: Place) -> Start:
    command = [str(place.environment / "bin" / "bentoml"), "serve", "bench.peer_servers.bentoml_ort:Model"]
    variables = {"BENTOML_HOME": str(place.directory / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    return Start([*command, "--host=127.0.0.1", f"--port={place.ports[0]}"], variables)


def _start_mlserver(place: Place) -> Start:
    http_port, grpc_port, metrics_port = place.ports
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "metrics_dir": str(place.directory),
        "parallel_workers": 0,  # the model runs in the process for HTTP: one process less, and cheaper
    }
    model = {
        "name": place.model,
        "implementation": "bench.peer_servers.mlserver_ort.Model",
        "max_batch_size": ROWS_MAX,
        "max_batch_time": 0.001,
    }
    (place.directory / "settings.json").write_text(json.dumps(settings))
    (place.directory / "model-settings.json").write_text(json.dumps(model))
    return Start([str(place.environment / "bin" / "mlserver"), "start", str(place.directory)])


def _start_triton(place: Place) -> Start:
    [packages] = place.environment.glob("lib/python3*/site-packages")
    triton = packages / "pytriton" / "tritonserver"
    model = place.directory / "models" / place.model
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(triton_config(place.model))
    (model / "1" / "model.py").symlink_to(Path(__file__).parent / "peer_servers" / "triton_ort.py")
    (model / "1" / "bench").symlink_to(Path(__file__).parent)  # it does not look where PYTHONPATH says
    # The package has a program that runs models for each version of Python; it belongs beside the backend, where
    # PyTriton, too, only puts it when it starts.
    backend = place.directory / "backends" / "python"
    backend.mkdir(parents=True)
    version = packages.parent.name.removeprefix("python")
    for file in (*(triton / "backends" / "python").glob("*.*"), *(triton / "python_backend_stubs" / version).iterdir()):
        (backend / file.name).symlink_to(file)
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={model.parent}",
        f"--backend-directory={backend.parent}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), place.ports, strict=True)),
    ]
    variables = {
        "LD_LIBRARY_PATH": f"{_library_directory()}:{packages / 'nvidia_pytriton.libs'}",
        "PATH": f"{place.environment / 'bin'}:{os.environ['PATH']}",  # the stub is the Python that comes first there
    }
    return Start(command, variables)


def triton_config(model: str) -> str:
    plan = bench_models.plan_of(model)
    outputs = plan.dense[-1]
    return (
        f'name: "{model}"\nbackend: "python"\nmax_batch_size: {ROWS_MAX}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: {list(plan.row)} }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: [{outputs}] }}\n'
        "instance_group { count: 1 kind: KIND_CPU }\ndynamic_batching { }\n"
    )


def _start_pytriton(place: Place) -> Start:
    started = _module(place, "pytriton_ort", place.model, *place.ports)
    variables = {"PYTRITON_HOME": str(place.directory), "LD_LIBRARY_PATH": _library_directory()}
    return started._replace(variables=variables)


def _library_directory() -> str:
    """Where libpython is that belongs to this Python; another one of the same minor version may come first."""
    return str(sysconfig.get_config_var("LIBDIR"))


# --- who there is

PEERS: Final[Mapping[str, Peer]] = {
    "fastapi": Peer(
        title="FastAPI VERSION + ONNX Runtime",
        packages=("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
        protocol=RAW,
        path="/v2/models/MODEL/infer",
        waits="no batches",
        leaves_out="no protocol, no checks, no batches, no limits; the model blocks the only process",
        start=_start_fastapi,
    ),
    "mosec": Peer(
        title="mosec VERSION",
        packages=("mosec==0.9.8",),
        protocol=RAW,
        path="/inference",
        waits="1 ms",
        leaves_out="no protocol and no checks: the bytes of one row of one model in, those of a row out",
        start=_start_mosec,
    ),
    "triton": Peer(
        title="tritonserver of PyTriton VERSION, Python backend",
        packages=("nvidia-pytriton==0.7.0",),
        protocol=V2_BINARY,
        path="/v2/models/MODEL/infer",
        waits="none",
        leaves_out="not its ONNX Runtime backend in C++, which no package on PyPI has",
        start=_start_triton,
    ),
    "pytriton": Peer(
        title="PyTriton VERSION",
        packages=("nvidia-pytriton==0.7.0",),
        protocol=V2_BINARY,
        path="/v2/models/MODEL/infer",
        waits="none",
        leaves_out="the same tritonserver, which hands each batch on to the process that started it",
        start=_start_pytriton,
    ),
    "mlserver": Peer(
        title="MLServer VERSION",
        # Later versions of uvloop make no loop where it asks for one.
        packages=("mlserver==1.7.1", "uvloop==0.21.0"),
        protocol=V2_JSON,
        path="/v2/models/MODEL/infer",
        waits="1 ms",
        leaves_out="JSON, for over HTTP it knows no binary tensors; gRPC, where it does, is not measured",
        start=_start_mlserver,
    ),
    "litserve": Peer(
        title="LitServe VERSION",
        packages=("litserve==0.2.19",),
        protocol=RAW,
        path="/predict",
        waits="1 ms",
        leaves_out="no protocol and no checks; its answer to more load is more HTTP processes, here it has one",
        start=_start_litserve,
    ),
    "bentoml": Peer(
        title="BentoML VERSION",
        # 1.4.40 asks for a certifi that came a day later than any that there was when this was written.
        packages=("bentoml==1.4.39",),
        protocol=JSON,
        path="/infer",
        waits="as it finds best",
        leaves_out="JSON, the only form of arrays that it takes from outside; its answer to more load is more workers",
        start=_start_bentoml,
    ),
}


# --- what is asked, and what has to come


def request_of(protocol: str, path: str, model: str) -> Request:
    """One row of a model."""
    path = path.replace("MODEL", model)
    [x] = bench_models.sample(model, 1).values()
    if protocol == RAW:
        return Request(path, x.tobytes(), {"Content-Type": "application/octet-stream"})
    if protocol == JSON:
        rows = {"x": [_six_digits(x[0])]}
        return Request(path, json.dumps(rows, separators=(",", ":")).encode(), {"Content-Type": "application/json"})
    body, head = bench_http.request_body(model, "binary" if protocol == V2_BINARY else "json")
    if head:
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(head)}
        return Request(path, body, headers)
    return Request(path, body, {"Content-Type": "application/json"})


def _six_digits(values: Any) -> Any:
    """Nested lists, as short as the values of v2 JSON."""
    return [_six_digits(each) for each in values] if values.ndim else float(f"{values:.6g}")


def read_answer(protocol: str, headers: Mapping[str, str], body: bytes) -> Array:
    """The values of y, flat. Raises ValueError or KeyError for what is no such answer."""
    if protocol == RAW:
        return np.frombuffer(body, np.float32)
    if protocol == JSON:
        return np.array(json.loads(body), np.float32).ravel()
    head = int(headers.get("Inference-Header-Content-Length") or len(body))
    [output] = json.loads(body[:head])["outputs"]
    if "data" in output:
        return np.array(output["data"], np.float32).ravel()
    return np.frombuffer(body[head:], np.float32)


def variables_of(place: Place) -> dict[str, str]:
    """What the environment of every server has."""
    return {MODEL: str(place.model_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
