"""model.py of Triton's Python backend with ONNX Runtime, for the tritonserver that PyTriton's package brings.

Triton hands over what requests it has; that these run as one batch is up to the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as utils

from bench.peer_servers.session import open_session


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._session = open_session()

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        [y] = self._session.run(None, {"x": np.concatenate(inputs)})
        answers, begin = [], 0
        for each in inputs:
            end = begin + len(each)
            answers.append(utils.InferenceResponse([utils.Tensor("y", y[begin:end])]))
            begin = end
        return answers
