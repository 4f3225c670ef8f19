"""MLServer with ONNX Runtime: mlserver start DIRECTORY, whose model-settings.json names this runtime.

It has no runtime for ONNX; this is a custom one as its documentation describes it. Batches are MLServer's.
"""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peer_servers.session import open_session


class Model(MLModel):
    async def load(self) -> bool:
        self._session = open_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        [y] = self._session.run(None, {"x": x})
        outputs = [NumpyCodec.encode_output("y", y)]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
