"""What one writes by hand instead of a server: FastAPI on uvicorn, ONNX Runtime in the same process, raw bytes.

    python -m bench.peer_servers.fastapi_ort REPOSITORY PORT

It answers ``POST /v2/models/NAME/infer``, whose body is one row of float32, with the bytes of the output; nothing is
parsed, checked or batched. bench/peers.py runs it, and bench/http.py beside Penstock; that needs the extra ``bench``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

from bench.peer_servers.session import open_session, row_shape


def main() -> None:
    repository, port = Path(sys.argv[1]), int(sys.argv[2])
    sessions = {}
    for path in repository.glob("*/1/model.onnx"):
        session = open_session(str(path))
        sessions[path.parts[-3]] = session, [1, *row_shape(session)]
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
