"""What the application's own routes are."""

from __future__ import annotations

from typing import Final

from penstock.gateway.about import (
    INFERENCE,
    INFERENCE_ERRORS,
    MODELS,
    SERVER,
    STRING,
    STRINGS,
    About,
    an_object,
    json,
)
from penstock.gateway.schemas import ANY_ANSWER, ANY_REQUEST, v2
from penstock.gateway.schemas import METADATA as MODEL_METADATA

METADATA: Final = About(
    "What the server is and what it can",
    SERVER,
    json(an_object({"name": STRING, "version": STRING, "extensions": STRINGS}, ("name", "version", "extensions"))),
)
LIVE: Final = About("Whether this gateway is live", SERVER)
READY: Final = About("Whether every model is ready", SERVER, errors=(503,))
METRICS: Final = About(
    "Metrics of the whole server, for Prometheus",
    SERVER,
    {"text/plain": STRING, "application/openmetrics-text": STRING},
)
DASHBOARD: Final = About("The dashboard", SERVER, {"text/html": STRING})
EVENTS: Final = About("What the dashboard shows, once a second", SERVER, {"text/event-stream": STRING}, errors=(503,))
MODEL: Final = About("Its inputs and outputs", MODELS, json(MODEL_METADATA), errors=(404, 503))
MODEL_READY: Final = About("Whether it is ready", MODELS, errors=(400,))
INFER: Final = About(
    "Ask a model",
    INFERENCE,
    ANY_ANSWER,
    ANY_REQUEST,
    errors=INFERENCE_ERRORS,
    inference=True,
    of_model=v2,
)
