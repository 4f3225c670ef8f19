"""BentoML with ONNX Runtime: bentoml serve bench.peer_servers.bentoml_ort:Model --port PORT

One worker, and no line of log for each request, which it writes unless told otherwise. Tensors are what its
documentation of batching shows, numpy arrays as JSON; its binary form is for its own services among each other, and
refused from outside. How long a batch waits it finds by itself.
"""

from __future__ import annotations

import bentoml
import numpy as np

from bench.peer_servers.session import ROWS_MAX, open_session


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Model:
    def __init__(self) -> None:
        self._session = open_session()

    @bentoml.api(batchable=True, max_batch_size=ROWS_MAX)
    def infer(self, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = self._session.run(None, {"x": x.astype(np.float32, copy=False)})[0]
        return y
