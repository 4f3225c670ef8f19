"""Processes that are killed, stopped and flooded while every answer is checked; and the checking itself."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench import chaos
from tests.system.servers import wait_for

SEED = 0


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> chaos.Answers:
    repository = chaos.make_repository(tmp_path_factory.mktemp("models"))
    return chaos.Answers(repository / "heavy" / "1" / "model.onnx")


def right(answers: chaos.Answers, question: chaos.Question) -> Any:
    return answers.outputs[question.which] if question.heavy else question.x * 2 + 1


class Scripted:
    """Answers from a function of how often it was asked, which may raise."""

    def __init__(self, script: Callable[[int, Any], Any], extra: str = "") -> None:
        self._script = script
        self._extra = extra
        self.asked = 0

    def ask(self, model: str, x: Any, timeout_s: float) -> Any:
        self.asked += 1
        return self._script(self.asked, x)

    def extra(self) -> str:
        return self._extra

    def close(self) -> None: ...


def scored(answers: chaos.Answers, script: Callable[[int, Any], Any], extra: str = "", count: int = 3) -> chaos.Score:
    """What a load makes of some answers of the model whose answers are told by the request."""
    asker = Scripted(script, extra)
    with chaos.Load([asker], answers, 0.0, first=9) as load:
        wait_for(lambda: asker.asked >= count, "answers")
    return load.score


def test_a_seed_is_a_schedule() -> None:
    assert chaos.schedule(1, 600) == chaos.schedule(1, 600)
    assert chaos.schedule(1, 600) != chaos.schedule(2, 600)
    for seed in range(20):
        faults = chaos.schedule(seed, 600)
        assert len(faults) >= 100
        assert sum(each.after_s + each.for_s for each in faults) <= 600 - chaos.QUIET_S
        assert {each.role for each in faults} == {"", *chaos.ROLES}
    assert chaos.schedule(1, 3) == []


def test_every_request_has_an_answer_of_its_own(answers: chaos.Answers) -> None:
    questions = [chaos.Question(number) for number in range(1, 200)]
    assert {each.model for each in questions} == {"affine", "heavy"}
    assert any(each.x.nbytes > 100_000 for each in questions if not each.heavy)
    assert {width * 4 for width in chaos.MEDIUM} <= {each.x.nbytes for each in questions if not each.heavy}
    for one, other in itertools.pairwise(questions):
        assert answers.is_right(one, right(answers, one))
        assert not answers.is_right(one, right(answers, other))
        assert not answers.is_right(one, right(answers, one) + 1)
    for at, output in enumerate(answers.outputs):
        assert sum(np.allclose(output, each, rtol=1e-3, atol=1e-4) for each in answers.outputs) == 1, at


def test_right_answers_are_counted(answers: chaos.Answers) -> None:
    known = {x.tobytes(): y for x, y in zip(answers.inputs, answers.outputs, strict=True)}
    score = scored(answers, lambda _, x: known.get(x.tobytes(), x * 2 + 1), count=30)
    assert score.accepted == score.answered >= 29
    assert (score.again, score.wrong, score.lost, score.duplicated) == (0, [], [], [])


def test_wrong_answers_are_found(answers: chaos.Answers) -> None:
    score = scored(answers, lambda _, x: x * 2 + 2)
    assert len(score.wrong) == score.accepted
    assert "request 9 of affine" in score.wrong[0]


def test_what_may_be_asked_again_is_and_what_may_not_is_lost(answers: chaos.Answers) -> None:
    def script(asked: int, x: Any) -> Any:
        if asked < 3:
            raise chaos.Again("closed")
        raise chaos.Given("400 no")

    score = scored(answers, script)
    assert (score.again, score.reasons) == (2, {"closed": 2})
    assert score.lost[0].endswith("request 9 of affine: 400 no")


def test_an_answer_that_nobody_waits_for_is_found(answers: chaos.Answers) -> None:
    score = scored(answers, lambda _, x: x * 2 + 1, extra="HTTP/1.1 200 OK")
    assert len(score.duplicated) >= 3


def test_recovery_is_of_what_was_sent_after_the_fault(answers: chaos.Answers) -> None:
    sent, go_on = threading.Event(), threading.Event()

    def held(asked: int, x: Any) -> Any:
        sent.set()
        go_on.wait(30)
        return x * 2 + 1

    asker = Scripted(held)
    with chaos.Load([asker], answers, 0.0, first=9) as load:
        assert sent.wait(30)
        before = load.happened("before it was answered")
        go_on.set()
        wait_for(lambda: before.last_s < float("inf"), "an answer")
    assert asker.asked >= 2, "the answer to what was sent before does not count"
    assert 0 <= before.first_s == before.last_s


def test_nothing_is_wrong_lost_or_answered_twice() -> None:
    """A short run; bench/chaos.py has long ones."""
    outcome = chaos.run(SEED, 14.0, capacity_s=1.0, undisturbed_s=1.0, quiet_s=1.0)
    said = "\n".join(chaos.tell(outcome))
    assert outcome.kept, said
    assert len(outcome.recoveries) >= 4, said
    assert outcome.score.answered == outcome.score.accepted > 100, said
    assert outcome.jobs.answered == outcome.jobs.accepted > 20, said
    for each in outcome.recoveries[:-1]:
        assert each.first_s < 10, said
