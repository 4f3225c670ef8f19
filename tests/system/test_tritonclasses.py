"""Triton's classification extension, as ``tritonclient.http`` asks for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from tests.system.models import identity, write
from tests.system.servers import StartServer, wait_for

ROWS = np.array([[0.25, 1.5, -2], [9, 8, 7]], np.float32)


def test_classes_with_labels_binary_and_in_json(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models, "three", identity(TensorProto.FLOAT, ["N", 3]))
    write(models, "wide", identity(TensorProto.FLOAT, ["N", 50_000]))
    write(models, "strings", identity(TensorProto.STRING))
    (models / "three" / "config.pbtxt").write_text(
        'max_batch_size: 8 output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }'
    )
    (models / "three" / "labels.txt").write_text("ant\nbee\ncat\n")
    server = start_server(str(models))
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:

        def ask(model: str, array: np.ndarray, count: int, binary: bool, kind: str = "FP32") -> list[list[str]]:
            given = triton.InferInput("x", list(array.shape), kind)
            given.set_data_from_numpy(array)
            wanted = [triton.InferRequestedOutput("y", binary_data=binary, class_count=count)]
            found = client.infer(model, [given], outputs=wanted, response_compression_algorithm=None)
            return [[each if isinstance(each, str) else each.decode() for each in row] for row in found.as_numpy("y")]

        for binary in (True, False):
            assert ask("three", ROWS, 2, binary) == [
                ["1.500000:1:bee", "0.250000:0:ant"],
                ["9.000000:0:ant", "8.000000:1:bee"],
            ]
            assert len(ask("three", ROWS, 7, binary)[0]) == 3
        wide = np.arange(100_000, dtype=np.float32).reshape(2, -1)  # on a thread
        assert ask("wide", wide, 1, True) == [["49999.000000:49999"], ["99999.000000:49999"]]
        for count in (-1, 1 << 40):
            with pytest.raises(InferenceServerException, match="'classification' is how many classes to tell"):
                ask("three", ROWS, count, True)
        with pytest.raises(InferenceServerException, match="due to unsupported type 'BYTES'"):
            ask("strings", np.array([["a", "b"]], object), 1, True, "BYTES")
        (models / "three" / "labels.txt").write_text("ape\nbat\ncow\n")
        wait_for(lambda: ask("three", ROWS, 1, True)[0] == ["1.500000:1:bat"], "the labels to be read anew")
