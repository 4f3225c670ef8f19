"""One process per GPU, or per CPU slice: holds models, forms batches, runs them, publishes results."""

import os

# ONNX Runtime 1.29 and newer report every session to Microsoft, on Linux too, unless this is set before the library is
# loaded; and keep a data base of it open in the user's home. Nobody who serves a model has agreed to that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
