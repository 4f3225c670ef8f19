"""The bundled model and its example are what the README says, and training makes such a model again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = REPOSITORY / "examples" / "digits"
BUNDLED = REPOSITORY / "bin" / "models" / "digits" / "1" / "model.onnx"

# After 15 of the usual 60 epochs seeds reach 98.9 to 99.6 %: more than the 97 % that are asked for.
FEW_EPOCHS = ["--epochs", "15"]


def load(script: Path) -> ModuleType:
    """The module in a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train = load(DIGITS / "train.py")


def scores(model: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(["scores"], {"image": images})[0]
    return result


def check_contract(path: Path) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [image], [output] = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["N", 1, 8, 8])
    assert (output.name, output.type, output.shape) == ("scores", "tensor(float)", ["N", 10])
    model = onnx.load(path)
    assert model.ir_version == 9
    assert [opset.version for opset in model.opset_import] == [17]
    assert 20_000 <= path.stat().st_size <= 60_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an example that a short training wrote."""
    folder = tmp_path_factory.mktemp("digits")
    out, example = folder / "models" / "model.onnx", folder / "seven.json"
    assert train.main([*FEW_EPOCHS, "--out", str(out), "--example", str(example)]) == 0
    return folder


def test_bundled_model_keeps_its_contract() -> None:
    check_contract(BUNDLED)


def test_bundled_model_reads_held_out_images() -> None:
    split = train.load_split()
    result = scores(BUNDLED, split.held_out_images)
    assert result.dtype == np.float32
    assert train.accuracy(result, split.held_out_labels) > 0.97


def test_bundled_model_gives_two_images_what_each_gets_alone() -> None:
    images = train.load_split().held_out_images[:2]
    singles = np.concatenate([scores(BUNDLED, images[:1]), scores(BUNDLED, images[1:])])
    np.testing.assert_allclose(scores(BUNDLED, images), singles, atol=1e-5)


def test_split_holds_out_every_digit() -> None:
    split = train.load_split()
    assert (len(split.train_images), len(split.held_out_images)) == (1347, 450)
    assert np.bincount(split.held_out_labels).min() >= 43
    known = {image.tobytes() for image in split.train_images}
    assert not any(image.tobytes() in known for image in split.held_out_images)


def test_example_request_is_the_example_array() -> None:
    [image] = json.loads((DIGITS / "seven.json").read_text())["inputs"]
    array = np.load(DIGITS / "seven.npy")
    assert (image["name"], image["datatype"], image["shape"]) == ("image", "FP32", [1, 1, 8, 8])
    assert (array.dtype, array.shape) == (np.float32, (1, 1, 8, 8))
    assert image["data"] == array.ravel().tolist()


def test_example_is_a_held_out_seven_and_read_as_one() -> None:
    array, split = np.load(DIGITS / "seven.npy"), train.load_split()
    [index] = np.flatnonzero((split.held_out_images == array).all(axis=(1, 2, 3)))
    assert split.held_out_labels[index] == 7
    assert scores(BUNDLED, array).argmax() == 7


def test_training_writes_a_model_that_keeps_the_contract(trained: Path) -> None:
    check_contract(trained / "models" / "model.onnx")


def test_training_writes_an_example_beside_the_model(trained: Path) -> None:
    [image] = json.loads((trained / "seven.json").read_text())["inputs"]
    array = np.load(trained / "seven.npy")
    assert image["data"] == array.ravel().tolist()
    assert scores(trained / "models" / "model.onnx", array).argmax() == 7


def test_training_reports_what_it_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*FEW_EPOCHS, "--out", str(tmp_path / "model.onnx")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch  1 of 15: loss ")
    assert lines[-1].startswith("accuracy on 450 held-out images: 9")


def test_unfit_model_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.onnx"
    assert train.main(["--epochs", "0", "--out", str(out)]) == 1
    assert "and must be above 97 %" in capsys.readouterr().err
    assert not out.exists()


def test_a_seed_gives_the_same_file_every_time() -> None:
    split = train.load_split()
    first, again, other = (train.to_onnx(train.train(split, 1, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("stride", [1, 2])
def test_col2im_is_the_transpose_of_im2col(stride: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 8, 8, 3), np.float32)
    columns = train.im2col(images, stride)
    weights = rng.standard_normal(columns.shape, np.float32)
    # <im2col(a), b> = <a, col2im(b)> for every a and b is what makes one the transpose of the other.
    there, back = (columns * weights).sum(), (images * train.col2im(weights, images.shape, stride)).sum()
    assert there == pytest.approx(back, rel=1e-4)
