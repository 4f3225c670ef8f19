"""Triton's model configuration extension: what of a version's configuration callers know, in the form of Triton's
config.pbtxt as JSON.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_configuration.md has the
shape, common/protobuf/model_config.proto the names. Left out is what only workers know: instances, the policy by which
versions are chosen, and how long a batch waits.
"""

from __future__ import annotations

from typing import Any, Final

from penstock.gateway.about import MODELS, NUMBER, STRING, About, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.connection import Exchange
from penstock.gateway.routes import Route
from penstock.gateway.target import Handler, Target
from penstock.wire.models import ModelSpec, TensorSpec

EXTENSION: Final = "model_configuration"
_BACKEND: Final = "onnxruntime"
_STRING: Final = "TYPE_STRING"  # what Triton calls BYTES here
_ABOUT: Final = About(
    "Its configuration, as Triton writes it",
    MODELS,
    json(an_object({"name": STRING, "max_batch_size": NUMBER}, ("name", "max_batch_size", "input", "output"))),
    errors=(404, 503),
)


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """Of a version. ``dims`` are without the rows where rows of several requests run together."""
    config: dict[str, Any] = {
        "name": spec.name,
        "platform": spec.platform,
        "backend": _BACKEND,
        "max_batch_size": spec.max_batch_size if spec.batchable else 0,
        "input": [_tensor(each, spec.batchable) for each in spec.inputs],
        "output": [_tensor(each, spec.batchable) for each in spec.outputs],
        "model_transaction_policy": {"decoupled": False},
    }
    if spec.build:
        config["response_cache"] = {"enable": True}
    return config | {"dynamic_batching": {}} if spec.batchable else config


def _tensor(tensor: TensorSpec, batchable: bool) -> dict[str, Any]:
    datatype = _STRING if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
    return {"name": tensor.name, "data_type": datatype, "dims": tensor.shape[1:] if batchable else tensor.shape}


class ModelConfig:
    """``routes``: for the application to answer."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self.routes: list[Route[Handler]] = [
            Route("GET", f"/v2/models/{{model}}{version}/config", self._config, about=_ABOUT)
            for version in ("", "/versions/{version}")
        ]

    def _config(self, exchange: Exchange, target: Target) -> None:
        self._application.answer_json(exchange, model_config(self._application.current(target)))
