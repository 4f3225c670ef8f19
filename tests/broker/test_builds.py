"""Under which token callers may keep answers of a version."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.builds import Builds
from penstock.wire.messages import Models, WorkerModels
from penstock.wire.models import IDLE, LOADING, READY, ModelState
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

KEY = ("m", "1")


def built(digest: str, state: str = READY) -> ModelState:
    """A model as a worker declares it that has loaded this content."""
    told = model(state=state)
    assert told.spec is not None
    return told._replace(spec=told.spec._replace(build=digest))


def token(caller: CallerTalk) -> str:
    [state] = caller.take(Models)[-1].models
    assert state.spec is not None
    return state.spec.build


def test_there_is_one_while_all_that_serve_say_the_same() -> None:
    builds = Builds(7)
    assert builds.token(KEY) == ""
    builds.saw(KEY, {"a"})
    first = builds.token(KEY)
    assert first
    builds.saw(KEY, {"a", "b"})
    assert builds.token(KEY) == ""
    builds.saw(KEY, {"b"})
    assert builds.token(KEY) not in ("", first)


@pytest.mark.parametrize("meanwhile", [[{""}], [set()], [{"", "a"}, {""}]])
def test_it_comes_back_where_no_other_content_was_seen(meanwhile: list[set[str]]) -> None:
    builds = Builds(7)
    builds.saw(KEY, {"a"})
    first = builds.token(KEY)
    for each in meanwhile:
        builds.saw(KEY, each)
        assert builds.token(KEY) == ""
    builds.saw(KEY, {"a"})
    assert builds.token(KEY) == first


@pytest.mark.parametrize("meanwhile", [{"b"}, {"a", "b"}, {"", "b"}])
def test_what_comes_back_after_other_content_has_another(meanwhile: set[str]) -> None:
    builds = Builds(7)
    builds.saw(KEY, {"a"})
    first = builds.token(KEY)
    builds.saw(KEY, meanwhile)
    builds.saw(KEY, {"a"})
    assert builds.token(KEY) not in ("", first)


@given(st.lists(st.tuples(st.sampled_from([KEY, ("m", "2")]), st.sets(st.sampled_from(["", "a", "b"])))))
def test_a_token_stands_for_one_content_of_one_version(seen: list[tuple[tuple[str, str], Collection[str]]]) -> None:
    builds = Builds(7)
    meant: dict[str, tuple[tuple[str, str], str]] = {}
    left: set[str] = set()  # after which other content was seen
    for key, digests in seen:
        before = builds.token(key)
        builds.withdrawn = False
        builds.saw(key, digests)
        after = builds.token(key)
        assert builds.withdrawn == (before not in ("", after))
        assert bool(after) == (len(digests) == 1 and digests != {""})
        for token, (of, digest) in meant.items():
            if of == key and set(digests) - {"", digest}:
                left.add(token)
        assert after not in left
        if after:
            [digest] = digests
            assert meant.setdefault(after, (key, digest)) == (key, digest)


def test_tokens_of_two_brokers_differ() -> None:
    tokens: set[str] = set()
    for epoch in (7, 8):
        builds = Builds(epoch)
        builds.saw(KEY, {"a"})
        tokens.add(builds.token(KEY))
    assert len(tokens) == 2


# --- in the broker ---


def replaced(talk: Conversation, worker: WorkerTalk, digest: str) -> None:
    worker.say(WorkerModels(EPOCH, [built(digest)]))
    talk.tick()


def test_callers_are_told_none_while_workers_differ() -> None:
    talk = Conversation()
    caller = talk.caller()
    one, two = (talk.worker(built("a"), hears=[caller], name=name) for name in "ab")
    talk.tick()
    first = token(caller)
    assert first
    replaced(talk, one, "b")
    assert token(caller) == ""
    replaced(talk, two, "b")
    assert token(caller) not in ("", first)


def test_callers_are_told_none_while_one_is_replaced_and_the_same_if_it_was_not() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(built("a"), hears=[caller])
    talk.tick()
    first = token(caller)
    replaced(talk, worker, "")
    assert token(caller) == ""
    replaced(talk, worker, "a")
    assert token(caller) == first


def test_a_worker_that_goes_takes_it_along_and_brings_it_back() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(built("a"), hears=[caller], name="w")
    talk.tick()
    first = token(caller)
    worker.vanish()
    talk.tick()
    assert token(caller) == ""
    talk.worker(built("a"), hears=[caller], name="w")
    talk.tick()
    assert token(caller) == first


def test_it_stays_while_the_model_is_out_of_memory_and_not_while_it_is_loaded_at_first() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(built("a"), hears=[caller])
    talk.tick()
    first = token(caller)
    worker.say(WorkerModels(EPOCH, [built("a", IDLE)]))
    talk.tick()
    assert token(caller) == first
    worker.say(WorkerModels(EPOCH, [built("a", LOADING)]))
    talk.tick()
    assert token(caller) == ""


def test_that_it_is_none_is_told_at_once_where_changes_are_gathered() -> None:
    talk = Conversation()
    caller = talk.caller()
    many = [model(f"other{each}") for each in range(40)]
    worker = talk.worker(built("a"), *many, hears=[caller])
    talk.tick(1)
    worker.say(WorkerModels(EPOCH, [model("other1", reason="noted")]))
    talk.tick()
    caller.take(Models)
    replaced(talk, worker, "")
    state = next(each for each in caller.take(Models)[-1].models if each.name == "m")
    assert state.spec is not None
    assert state.spec.build == ""
