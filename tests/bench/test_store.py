"""The models by which the store is measured, in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.bench.test_models import load

store = load(Path(__file__).resolve().parents[2] / "bench" / "store.py")


@pytest.mark.parametrize(("name", "row"), [("dense", (4096,)), ("conv", (1024, 2, 2)), ("int8", (4096,))])
def test_model_gives_what_is_worth_comparing(name: str, row: tuple[int, ...]) -> None:
    session = onnxruntime.InferenceSession(
        store.MODELS[name](1).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((2, *row), np.float32)
    [y] = session.run(["y"], {"x": x})
    assert y.shape == x.shape
    assert 0.1 < np.abs(y).max() < 100
    assert not np.array_equal(y[0], y[1])
