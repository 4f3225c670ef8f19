"""LitServe with ONNX Runtime: python -m bench.peer_servers.litserve_ort PORT

One worker process behind one process for HTTP, with the queue that its documentation recommends for many requests.
What the body is, LitServe leaves to FastAPI by way of an annotation; here it is bytes. Without a wait for batches to
fill, its default, it looks for requests again and again, which takes a whole core from the rest of it.
"""

# No "from __future__ import annotations": LitServe hands the annotation of decode_request to FastAPI as it is.
import sys
from typing import Annotated

import litserve
import numpy as np
import numpy.typing as npt
from fastapi import Body, Response

from bench.peer_servers.session import ROWS_MAX, open_session, row_shape

BINARY = "application/octet-stream"
WAIT_S = 0.001

Array = npt.NDArray[np.float32]


class Model(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._session = open_session()
        self._shape = row_shape(self._session)

    def decode_request(self, request: Annotated[bytes, Body(media_type=BINARY)]) -> Array:
        return np.frombuffer(request, np.float32).reshape(self._shape)

    def predict(self, x: Array) -> Array:
        y: Array = self._session.run(None, {"x": x})[0]
        return y

    def encode_response(self, output: Array) -> Response:
        return Response(output.tobytes(), media_type=BINARY)


if __name__ == "__main__":
    server = litserve.LitServer(
        Model(max_batch_size=ROWS_MAX, batch_timeout=WAIT_S), accelerator="cpu", workers_per_device=1, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
