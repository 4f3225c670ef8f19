"""A server that the commands of a module ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.system.models import dense, identity, two_inputs, write
from tests.system.servers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    write(models, "dense", dense(), "3")
    write(models, "sums", two_inputs())
    write(models, "strings", identity(TensorProto.STRING))
    write(models, "brain", identity(TensorProto.BFLOAT16))
    write(models, "square", identity(TensorProto.FLOAT, [2, 2]))
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    server = Server(tmp_path_factory.mktemp("server") / "run", str(models))
    yield server
    server.check_clean_end()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A runtime directory in which nobody is."""
    return tmp_path / "nowhere"
