"""The benchmarks' models are what their table says: shapes, costs, and rows that do not mix."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "models.py"

ROWS = {"tiny": (16,), "wide": (1000,), "mlp": (1024,), "image": (3, 224, 224), "heavy": (64,)}
OUTPUTS = {"tiny": 4, "wide": 4, "mlp": 1024, "image": 1000, "heavy": 8}


def load(script: Path) -> ModuleType:
    """The module in a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load(SCRIPT)


def session(model: bytes | Path) -> onnxruntime.InferenceSession:
    content = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def test_there_are_four_models() -> None:
    assert set(models.MODELS) == set(ROWS)


@pytest.mark.parametrize("name", models.MODELS)
def test_model_keeps_its_contract(name: str) -> None:
    loaded = session(models.build(name))
    [x], [y] = loaded.get_inputs(), loaded.get_outputs()
    assert (x.name, x.type, x.shape) == ("x", "tensor(float)", ["N", *ROWS[name]])
    assert (y.name, y.type, y.shape) == ("y", "tensor(float)", ["N", OUTPUTS[name]])


@pytest.mark.parametrize("name", models.MODELS)
def test_two_rows_get_what_each_gets_alone(name: str) -> None:
    loaded, x = session(models.build(name)), models.sample(name, rows=2)["x"]
    [both] = loaded.run(["y"], {"x": x})
    singles = [loaded.run(["y"], {"x": x[row : row + 1]})[0] for row in range(2)]
    np.testing.assert_allclose(both, np.concatenate(singles), rtol=1e-4, atol=1e-4)
    assert not np.allclose(both[0], both[1], atol=1e-2), "mixed rows would not show"


@pytest.mark.parametrize("name", models.MODELS)
def test_outputs_are_around_one(name: str) -> None:
    [y] = session(models.build(name)).run(["y"], models.sample(name, rows=8))
    assert np.isfinite(y).all()
    assert 0.1 < y.std() < 10


def test_image_costs_63_million_multiply_adds() -> None:
    assert 60e6 < models.multiply_adds(models.build("image")) < 66e6


def test_multiply_adds_of_dense_layers_are_their_weights() -> None:
    assert models.multiply_adds(models.build("tiny")) == 16 * 8 + 8 * 4
    assert models.multiply_adds(models.build("mlp")) == 3 * 1024 * 1024


@pytest.mark.parametrize("name", models.MODELS)
def test_sample_depends_on_its_seed_alone(name: str) -> None:
    x = models.sample(name, rows=2)["x"]
    assert (x.shape, x.dtype) == ((2, *ROWS[name]), np.float32)
    np.testing.assert_array_equal(x, models.sample(name, rows=2, seed=0)["x"])
    assert not np.array_equal(x, models.sample(name, rows=2, seed=1)["x"])


def test_a_name_stands_for_the_same_bytes_every_time() -> None:
    assert models.build("tiny") == models.build("tiny")


def test_repository_has_a_model_and_its_configuration(tmp_path: Path) -> None:
    directory = models.make_repository(tmp_path / "models", ["tiny", "mlp"], max_batch_size=8)
    assert directory == tmp_path / "models"
    assert sorted(path.name for path in directory.iterdir()) == ["mlp", "tiny"]
    assert (directory / "tiny" / "model.toml").read_text() == "max_batch_size = 8\n"
    [y] = session(directory / "tiny" / "1" / "model.onnx").run(["y"], models.sample("tiny", rows=3))
    assert y.shape == (3, 4)


def test_command_makes_the_models_it_is_asked_for(tmp_path: Path) -> None:
    assert models.main([str(tmp_path), "tiny"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert (tmp_path / "tiny" / "model.toml").read_text() == "max_batch_size = 32\n"


def test_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        models.main([str(tmp_path), "huge"])
    assert stopped.value.code == 2
    assert "no benchmark model 'huge', only tiny, wide, mlp, image, heavy" in capsys.readouterr().err
