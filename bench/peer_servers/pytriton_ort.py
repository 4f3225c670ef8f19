"""PyTriton with ONNX Runtime: python -m bench.peer_servers.pytriton_ort NAME HTTP_PORT GRPC_PORT METRICS_PORT

A function bound to a Triton that PyTriton starts, as its documentation shows it.
"""

from __future__ import annotations

import signal
import sys

import numpy as np
import numpy.typing as npt
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from bench.peer_servers.session import ROWS_MAX, open_session, row_shape

Array = npt.NDArray[np.float32]


def main() -> None:
    name, (http_port, grpc_port, metrics_port) = sys.argv[1], map(int, sys.argv[2:])
    session = open_session()
    outputs = session.get_outputs()[0].shape[1:]

    @batch
    def infer(x: Array) -> dict[str, Array]:
        return {"y": session.run(None, {"x": x})[0]}

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http_port,
        grpc_address="127.0.0.1",
        grpc_port=grpc_port,
        metrics_port=metrics_port,
    )
    # It ends on Ctrl-C, and leaves tritonserver's shared memory behind on anything else.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=name,
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=tuple(row_shape(session)))],
            outputs=[Tensor(name="y", dtype=np.float32, shape=tuple(outputs))],
            config=ModelConfig(max_batch_size=ROWS_MAX),
        )
        triton.serve()


if __name__ == "__main__":
    main()
