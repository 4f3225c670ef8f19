"""Which models there are, which workers serve them, and which one a name and version mean."""

from __future__ import annotations

import pytest

from penstock.broker import registry
from penstock.broker.peers import WorkerPeer
from penstock.broker.registry import Registry
from penstock.wire.errors import PenstockError
from penstock.wire.models import LOADING, READY, UNAVAILABLE, ModelState
from tests.broker.conversation import model
from tests.broker.parts import make_worker


class Hall:
    """A registry and the workers in it; it is validated after every step."""

    def __init__(self, models_max: int = 100, young_until: float = 0.0) -> None:
        self.registry = Registry(models_max, young_until=young_until)
        self.workers: list[WorkerPeer] = []

    def join(self, *models: ModelState, name: str = "w") -> WorkerPeer:
        self.workers.append(make_worker(len(self.workers), models, name=name))
        self.declare(self.workers[-1])
        return self.workers[-1]

    def declare(self, worker: WorkerPeer, *models: ModelState, now: float = 0.0) -> list[tuple[str, str]]:
        """Returns the keys of the models that ended with it."""
        if models:
            worker.set_models(models)
        ended = self.registry.declare(worker, now)
        self.registry.validate(self.workers)
        return [queue.key for queue in ended]

    def leave(self, worker: WorkerPeer, now: float = 0.0) -> None:
        self.workers.remove(worker)
        self.registry.withdraw(worker, now)
        self.registry.validate(self.workers)

    def known(self) -> list[tuple[str, str, str]]:
        return [(state.name, state.version, state.state) for state in self.registry.states()]


def refusal(registry: Registry, name: str, version: str = "", now: float = 0.0) -> tuple[str, str]:
    with pytest.raises(PenstockError) as caught:
        registry.find(name, version, now)
    return caught.value.code, caught.value.message


def test_what_a_worker_declares_can_be_found() -> None:
    hall = Hall()
    worker = hall.join(model("m", "1"), model("m", "2"), model("n", "7", LOADING, batch=0))
    assert hall.known() == [("m", "1", READY), ("m", "2", READY), ("n", "7", LOADING)]
    queue = hall.registry.find("m", "2", 0.0)
    assert (queue.key, list(queue.workers), queue.spec) == (("m", "2"), [worker], model("m", "2").spec)


def test_no_version_means_the_newest_that_is_served_else_the_newest() -> None:
    hall = Hall()
    worker = hall.join(model("m", "1"), model("m", "2"), model("m", "10", LOADING, batch=0))
    assert hall.registry.find("m", "", 0.0).key == ("m", "2")
    hall.declare(worker, model("m", "1"), model("m", "2"), model("m", "10"))
    assert hall.registry.find("m", "", 0.0).key == ("m", "10")
    hall.leave(worker)
    assert hall.registry.find("m", "", 0.0).key == ("m", "10")


def test_what_is_not_there_is_refused_in_the_words_that_clients_know() -> None:
    hall = Hall()
    assert refusal(hall.registry, "m") == (
        "unavailable",
        "no worker has joined this server yet; try again shortly",
    )
    hall.join(model("m", "1"))
    assert refusal(hall.registry, "x") == ("not_found", "Request for unknown model: 'x' is not found")
    assert refusal(hall.registry, "m", "9") == (
        "not_found",
        "Request for unknown model: 'm' version 9 is not found",
    )


def test_a_worker_with_no_models_still_makes_a_server() -> None:
    hall = Hall()
    hall.join()
    assert refusal(hall.registry, "m")[0] == "not_found"


def test_models_stay_known_when_their_worker_goes() -> None:
    hall = Hall()
    worker = hall.join(model("m"))
    hall.leave(worker, now=5.0)
    assert hall.known() == [("m", "1", UNAVAILABLE)]
    assert hall.registry.states()[0].reason == "no worker serves it at present"
    queue = hall.registry.find("m", "", 0.0)
    assert (list(queue.workers), queue.unserved_since, queue.spec) == ([], 5.0, model("m").spec)


def test_models_go_when_a_worker_of_that_name_declares_others() -> None:
    hall = Hall()
    hall.leave(hall.join(model("m"), model("n"), name="gpu0"))
    hall.join(model("n"), name="gpu1")
    assert hall.known() == [("m", "1", UNAVAILABLE), ("n", "1", READY)]
    hall.join(model("n"), name="gpu0")
    assert hall.known() == [("n", "1", READY)]
    assert refusal(hall.registry, "m")[0] == "not_found"


def test_of_very_many_workers_that_have_gone_the_first_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_AWAY_MAX", 2)
    hall = Hall()
    for name in "abc":
        hall.leave(hall.join(model(name), name=name))
    stays = hall.join(model("s"), name="s")
    hall.leave(hall.join(model("b", "2"), name="b"))
    assert [name for name, _, _ in hall.known()] == ["b", "c", "s"]
    assert hall.declare(stays, model("s")) == []
    hall.leave(hall.join(model("d"), name="d"))
    assert hall.declare(stays, model("s")) == [("c", "1")]


def test_a_model_ends_when_the_last_that_declared_it_takes_it_back() -> None:
    hall = Hall()
    first, second = hall.join(model("m"), model("n"), name="a"), hall.join(model("m"), name="b")
    assert hall.declare(first, model("n")) == []
    assert hall.declare(second, model("n")) == [("m", "1")]
    assert hall.known() == [("n", "1", READY)]


def test_a_worker_that_is_leaving_serves_nothing_and_takes_nothing_back() -> None:
    hall = Hall()
    worker = hall.join(model("m"))
    worker.leaving = True
    assert hall.declare(worker, now=3.0) == []
    assert hall.registry.find("m", "", 0.0).unserved_since == 3.0
    # What it told still stands: it is READY there, and nobody else has it.
    assert hall.known() == [("m", "1", UNAVAILABLE)]


@pytest.mark.parametrize(("old", "new"), [("cpu-0", "cpu-0-1"), ("cpu-0-1", "cpu-0")])
def test_what_only_the_old_worker_had_goes_when_it_leaves_its_successor(old: str, new: str) -> None:
    """Two that wish for one name are a worker and its successor, which was started beside it."""
    hall = Hall()
    before = hall.join(model("m", "1"), model("n"), name=old)
    hall.join(model("m", "2"), name=new)
    before.leaving = True
    assert hall.declare(before) == [("m", "1"), ("n", "1")]
    hall.leave(before)
    assert hall.known() == [("m", "2", READY)]


@pytest.mark.parametrize("other", ["cpu-1", "cpu-0-", "cpu-0-x", "cpu", "other"])
def test_what_only_a_worker_had_stays_known_when_it_leaves_others(other: str) -> None:
    hall = Hall()
    worker = hall.join(model("m", "1"), name="cpu-0")
    hall.join(model("m", "2"), name=other)
    worker.leaving = True
    assert hall.declare(worker) == []
    hall.leave(worker)
    assert hall.known() == [("m", "1", UNAVAILABLE), ("m", "2", READY)]


def test_a_successor_that_has_gone_itself_is_none() -> None:
    hall = Hall()
    worker, other = hall.join(model("m", "1"), name="cpu-0"), hall.join(model("m", "1"), name="cpu-0-1")
    hall.leave(other)
    worker.leaving = True
    assert hall.declare(worker) == []
    hall.leave(worker)
    assert hall.known() == [("m", "1", UNAVAILABLE)]


def test_a_model_fares_as_well_as_where_it_fares_best() -> None:
    hall = Hall()
    hall.join(model(state=UNAVAILABLE, reason="bad file", batch=0), name="a")
    assert hall.registry.states()[0][2:4] == (UNAVAILABLE, "bad file")
    loading = hall.join(model(state=LOADING, reason="reading", batch=0), name="b")
    assert hall.registry.states()[0][2:4] == (LOADING, "reading")
    hall.declare(loading, model(reason="rows see each other"))
    assert hall.registry.states()[0][2:4] == (READY, "rows see each other")


def test_the_newest_spec_is_kept_when_a_model_is_loaded_again() -> None:
    hall = Hall()
    worker = hall.join(model(batch=4))
    hall.declare(worker, model(batch=8))
    hall.declare(worker, model(state=LOADING, batch=0))
    assert hall.registry.find("m", "", 0.0).spec == model(batch=8).spec


def test_workers_of_a_model_keep_their_turns_when_they_declare_again() -> None:
    hall = Hall()
    workers = [hall.join(model(), name=name) for name in "abc"]
    hall.declare(workers[0], model(), model("n"))
    assert list(hall.registry.find("m", "", 0.0).workers) == workers


def test_a_young_broker_waits_for_models_that_nobody_has_declared() -> None:
    """They are shown to nobody, and one that comes is the one that was waited for."""
    hall = Hall(young_until=10.0)
    queue, other = hall.registry.find("m", "1", 1.0), hall.registry.find("n", "1", 1.0)
    assert hall.registry.find("m", "1", 2.0) is queue
    assert (queue.spec, queue.unserved_since, hall.known()) == (None, 1.0, [])
    worker = hall.join(model("m", "1"))
    assert (list(queue.workers), queue.spec) == ([worker], model("m", "1").spec)
    assert hall.known() == [("m", "1", READY)]
    hall.registry.forget_unheard(9.9)
    assert hall.registry.find("n", "1", 9.9) is other
    hall.registry.forget_unheard(10.0)
    hall.registry.validate(hall.workers)
    assert refusal(hall.registry, "n", "1", 10.0)[0] == "not_found"


def test_a_young_broker_does_not_guess_at_versions() -> None:
    hall = Hall(young_until=10.0)
    assert refusal(hall.registry, "m", "")[0] == "unavailable"
    hall.registry.find("m", "9", 0.0)
    hall.join(model("m", "1"))
    assert hall.registry.find("m", "", 0.0).key == ("m", "1")


def test_models_that_nobody_has_declared_count_among_those_that_may_be_known() -> None:
    hall = Hall(models_max=1, young_until=10.0)
    hall.registry.find("m", "1", 0.0)
    assert refusal(hall.registry, "m", "2")[0] == "unavailable"


def test_models_beyond_the_limit_are_not_known() -> None:
    hall = Hall(models_max=2)
    worker = hall.join(model("a"), model("b"), model("c"))
    assert [name for name, _, _ in hall.known()] == ["a", "b"]
    assert refusal(hall.registry, "c")[0] == "not_found"
    assert hall.declare(worker, model("b"), model("c")) == [("a", "1")]
    hall.declare(worker, model("b"), model("c"))
    assert [name for name, _, _ in hall.known()] == ["b", "c"]
