"""mosec with ONNX Runtime: python -m bench.peer_servers.mosec_ort --port PORT

One stage with one worker process. The body is left to the user: ``deserialize`` and ``serialize`` are those of the
documentation for raw bytes. mosec waits for a batch to fill for 10 ms unless told otherwise, and for 1 ms at least.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mosec import Server, Worker

from bench.peer_servers.session import ROWS_MAX, open_session, row_shape

Array = npt.NDArray[np.float32]

WAIT_MS = 1


class Model(Worker):
    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._session = open_session()
        self._shape = row_shape(self._session)

    def deserialize(self, data: bytes) -> Array:
        return np.frombuffer(data, np.float32).reshape(self._shape)

    def serialize(self, data: Array) -> bytes:
        return data.tobytes()

    def forward(self, data: list[Array]) -> list[Array]:
        return list(self._session.run(None, {"x": np.stack(data)})[0])


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=ROWS_MAX, max_wait_time=WAIT_MS)
    server.run()
