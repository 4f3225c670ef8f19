"""What all servers of this folder run: the model that the environment names, on one thread of ONNX Runtime.

bench/peers.py starts each of them in an environment of its own, where nothing of Penstock is installed: this folder
imports nothing else of it.
"""

from __future__ import annotations

import os
from typing import Final

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see penstock.worker

import onnxruntime

MODEL: Final = "PENSTOCK_BENCH_MODEL"  # the path of an ONNX file with one input, x, and one output, y
ROWS_MAX: Final = 32  # of a batch


def open_session(path: str | None = None) -> onnxruntime.InferenceSession:
    """Without a path: the model that the environment names."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path or os.environ[MODEL], options, providers=["CPUExecutionProvider"])


def row_shape(session: onnxruntime.InferenceSession) -> list[int]:
    """Without the first dimension, the batch."""
    return list(session.get_inputs()[0].shape[1:])
