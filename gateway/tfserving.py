"""TensorFlow Serving's REST API, on the same port and for the same models.

Source: https://github.com/tensorflow/serving/blob/master/tensorflow_serving/g3doc/api_rest.md. What a request's JSON
says is in ``tfjson.py``; it is placed, expanded and answered as those of v2 are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from penstock.gateway.about import INFERENCE_ERRORS, OBJECT, TENSORFLOW, About, a_list, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.changes import Style
from penstock.gateway.connection import Exchange
from penstock.gateway.inference import Reading
from penstock.gateway.parse import Parse
from penstock.gateway.routes import Route, RouteError
from penstock.gateway.schemas import ANY_INSTANCES, ANY_PREDICTION, EXAMPLES, RESULTS, tensorflow
from penstock.gateway.target import Handler, Target
from penstock.gateway.tfjson import SIGNATURE, TYPES, Question, read_classify, read_predict, read_regress
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, UNAVAILABLE, PenstockError
from penstock.wire.messages import Payload
from penstock.wire.models import IDLE, LOADING, READY, ModelSpec, ModelState, TensorSpec
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE
from penstock.wire.tensors import Buffer

_LATEST: Final = "Latest"
_SPECIFIC: Final = "Specific"
_LABEL: Final = "Label"

_BASES: Final = {
    _LATEST: "/v1/models/{model}",
    _SPECIFIC: "/v1/models/{model}/versions/{version}",
    _LABEL: "/v1/models/{model}/labels/{version}",
}
_STATES: Final = {READY: "AVAILABLE", IDLE: "AVAILABLE", LOADING: "LOADING", UNAVAILABLE_STATE: "END"}
_JSON: Final = Style(False)

_Read: TypeAlias = "Callable[[ModelSpec, Buffer], Question]"

_VERBS: Final[dict[str, _Read]] = {"predict": read_predict, "classify": read_classify, "regress": read_regress}


def read_question(read: _Read, spec: ModelSpec, body: Buffer) -> tuple[Reading, Payload]:
    """Raises PenstockError."""
    layout, payload, write = read(spec, body)
    return Reading(layout, _JSON, write=write), payload


_ABOUTS: Final = {
    "predict": About(
        "Predict, in rows or columns",
        TENSORFLOW,
        ANY_PREDICTION,
        ANY_INSTANCES,
        errors=INFERENCE_ERRORS,
        inference=True,
        of_model=tensorflow,
    ),
    "classify": About("Classes of examples", TENSORFLOW, RESULTS, EXAMPLES, errors=INFERENCE_ERRORS, inference=True),
    "regress": About("Numbers for examples", TENSORFLOW, RESULTS, EXAMPLES, errors=INFERENCE_ERRORS, inference=True),
}
_STATUS: Final = About(
    "The states of its versions",
    TENSORFLOW,
    json(an_object({"model_version_status": a_list(OBJECT)}, ("model_version_status",))),
    errors=(400, 404, 503),
)
_MALFORMED: Final = About("Nothing: a model is asked with :predict, :classify or :regress", TENSORFLOW, errors=(400,))
_METADATA: Final = About(
    "Its signature",
    TENSORFLOW,
    json(an_object({"model_spec": OBJECT, "metadata": OBJECT}, ("model_spec", "metadata"))),
    errors=(400, 404, 503),
)


class TensorFlowServing:
    """``routes``: for the application to answer."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._caller = application.caller
        self.routes: list[Route[Handler]] = []
        for by, base in _BASES.items():
            self.routes += [
                Route("POST", f"{base}:{verb}", partial(self._infer, self._parse(by, read)), True, _ABOUTS[verb])
                for verb, read in _VERBS.items()
            ]
            self.routes += [
                Route("GET", base, partial(self._status, by), True, _STATUS),
                Route("POST", base, self._malformed, True, _MALFORMED),
                Route("GET", base + "/metadata", partial(self._metadata, by), True, _METADATA),
            ]

    def _infer(self, parse: Parse, exchange: Exchange, target: Target) -> None:
        self._application.infer(exchange, target, parse)

    def _parse(self, by: str, read: _Read) -> Parse:
        return Parse(partial(self._find, by), partial(read_question, read))

    def _malformed(self, exchange: Exchange, target: Target) -> None:
        url = exchange.head.url.decode("latin-1")
        known = ", ".join(f":{verb}" for verb in _VERBS)
        raise RouteError(400, f"Malformed request: POST {url}; a model is asked by {known} at the end")

    # --- which version ---

    def _version(self, by: str, target: Target) -> str:
        """The version that is named, "" where none is. Raises PenstockError for a label that the model has not."""
        if by != _LABEL or target.model not in (self._caller.models or {}):
            return target.version
        route = self._caller.routes.get(target.model)
        version = dict(route.labels).get(target.version) if route is not None else None
        if version is None:
            raise PenstockError(BAD_INPUT, f"Unrecognized servable version label: {target.version}")
        return version

    def _find(self, by: str, target: Target) -> ModelSpec:
        version = self._version(by, target)
        try:
            return self._caller.find(target.model, version, target.sticky)
        except PenstockError as error:
            if error.code != NOT_FOUND:
                raise
            asked = f"Specific({target.model}, {version})" if by == _SPECIFIC else f"Latest({target.model})"
            raise PenstockError(NOT_FOUND, f"Servable not found for request: {asked}") from None

    # --- what there is ---

    def _status(self, by: str, exchange: Exchange, target: Target) -> None:
        models = self._caller.models
        if models is None:
            raise PenstockError(UNAVAILABLE, "no broker answers yet; try again shortly", 1.0)
        version = self._version(by, target)
        states = [state for state in models.get(target.model, {}).values() if by == _LATEST or state.version == version]
        if not states:
            which = f"any versions of model {target.model}"
            if by == _SPECIFIC:
                which = f"version {version} of model {target.model}"
            raise PenstockError(NOT_FOUND, f"Could not find {which}")
        states.sort(key=_place, reverse=True)
        self._application.answer_json(exchange, {"model_version_status": [_row(state) for state in states]})

    def _metadata(self, by: str, exchange: Exchange, target: Target) -> None:
        spec = self._find(by, target)
        signature = {
            "inputs": _signature(spec.inputs),
            "outputs": _signature(spec.outputs),
            "method_name": "tensorflow/serving/predict",
        }
        self._application.answer_json(
            exchange,
            {
                "model_spec": {"name": spec.name, "signature_name": "", "version": spec.version},
                "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
            },
        )


def _row(state: ModelState) -> dict[str, Any]:
    failed = state.state == UNAVAILABLE_STATE and state.reason
    status = {"error_code": "UNAVAILABLE" if failed else "OK", "error_message": state.reason if failed else ""}
    return {"version": state.version, "state": _STATES[state.state], "status": status}


def _place(state: ModelState) -> tuple[bool, int, str]:
    """What is a number goes by it, behind what is none."""
    is_number = state.version.isdecimal()
    return is_number, int(state.version) if is_number else 0, state.version


def _signature(tensors: Sequence[TensorSpec]) -> dict[str, Any]:
    return {
        each.name: {
            "dtype": TYPES[each.datatype],
            "tensor_shape": {
                "dim": [{"size": str(size), "name": ""} for size in each.shape],
                "unknown_rank": False,
            },
            "name": each.name,
        }
        for each in tensors
    }
