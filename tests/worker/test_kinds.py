"""What loading and probing make of a model of every kind: which requests may share a batch, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock.wire.models import TensorSpec
from penstock.worker.config import ModelConfig
from penstock.worker.model import LoadError, Model, load
from penstock.worker.probe import probe
from tests.system import kinds

if TYPE_CHECKING:
    from tests.worker.conftest import Workshop

ALONE = {
    "where": "output 'y' does not have a row for each row of the input",
    "scalar": "input 'x' has no dimensions",
    "scale": "input 'factor' has no dimensions",
    "sum": "output 'y' has no dimensions",
    "fixed": "the first dimension of input 'x' is fixed at 0",
    "constant": "it has no inputs",
    "reshape": "output 'y' has no dimensions",
}


def make(workshop: Workshop, name: str) -> Model:
    model = workshop.load(kinds.served()[name].SerializeToString(), name)
    probe(model)
    return model


@pytest.mark.parametrize("name", kinds.served())
def test_requests_share_batches_where_rows_are_apart(workshop: Workshop, name: str) -> None:
    model = make(workshop, name)
    assert (model.spec.batchable, model.why_alone) == (name not in ALONE, ALONE.get(name, ""))
    assert model.run_s < 1


@pytest.mark.parametrize("name", kinds.refused())
def test_what_cannot_be_served_is_one_sentence_that_names_the_file(workshop: Workshop, name: str) -> None:
    content, reason = kinds.refused()[name]
    path = workshop.save(content.SerializeToString())
    with pytest.raises(LoadError) as raised:
        load(path, name, "1", ModelConfig())
    said = str(raised.value)
    assert said.startswith(f"{path} cannot be ")
    assert reason in said
    assert "\n" not in said


def test_an_input_without_a_shape_is_told_from_a_scalar(workshop: Workshop) -> None:
    """ONNX Runtime says [] of both; a shape of no dimensions is a scalar's."""
    assert make(workshop, "scalar").spec.inputs == (TensorSpec("x", "FP32", ()),)
    path = workshop.save(kinds.refused()["any-rank"][0].SerializeToString())
    with pytest.raises(LoadError, match="input 'x' is declared without a shape"):
        load(path, "any-rank", "1", ModelConfig())


@pytest.mark.parametrize("name", ["old", "overridable"])
def test_inputs_that_have_a_value_are_not_asked_for(workshop: Workshop, name: str) -> None:
    assert [each.name for each in make(workshop, name).spec.inputs] == ["x"]
