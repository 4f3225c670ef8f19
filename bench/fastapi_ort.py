"""What one writes by hand instead of a server: FastAPI on uvicorn, ONNX Runtime in the same process, raw bytes.

    python bench/fastapi_ort.py REPOSITORY PORT

It answers ``POST /v2/models/NAME/infer``, whose body is one row of float32, with the bytes of the output; nothing is
parsed, checked or batched. bench/http.py runs it beside Penstock; it needs the extra ``bench``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see penstock.worker
if __name__ == "__main__":  # this folder comes first then, and has a module http of its own
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request, Response


def main() -> None:
    repository, port = Path(sys.argv[1]), int(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {}
    for path in repository.glob("*/1/model.onnx"):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        sessions[path.parts[-3]] = session, [1, *session.get_inputs()[0].shape[1:]]
    app = FastAPI()

    # Not a plain function: FastAPI would hand it to a thread, which costs more than it gains on few cores.
    @app.post("/v2/models/{name}/infer")
    async def infer(name: str, request: Request) -> Response:
        session, shape = sessions[name]
        x = np.frombuffer(await request.body(), np.float32).reshape(shape)
        return Response(session.run(None, {"x": x})[0].tobytes(), media_type="application/octet-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
