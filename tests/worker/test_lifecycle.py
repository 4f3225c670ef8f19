"""Which versions a worker has in memory, as conversations: what is on disk, what the broker says, what follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from penstock.wire.messages import EXPLICIT, NONE, WATCH
from penstock.wire.models import IDLE, LOADING, READY, UNAVAILABLE, ModelSpec, ModelState, Route
from penstock.worker.config import ModelConfig
from penstock.worker.events import Followed, Rested, Routed, Unwanted
from penstock.worker.lifecycle import STILL_S, Declare, Lifecycle, Word
from penstock.worker.repository import Found, Look, ModelFile

LONG_AGO = 1
NOW_NS = 10**18


def file_of(version: int, content: int = 1, name: str = "m", at_ns: int = LONG_AGO, problem: str = "") -> ModelFile:
    """A version whose files are another when ``content`` is."""
    fingerprint = ((f"{version}/model.onnx", 1, content, 100, at_ns, at_ns),)
    return ModelFile(name, str(version), Path(f"/r/{name}/{version}/model.onnx"), ModelConfig(), problem, "model.toml",
                     fingerprint=fingerprint)  # fmt: skip


def found_of(*wanted: ModelFile, others: Sequence[ModelFile] = (), name: str = "m", config: int = 1) -> Found:
    stamp = (("model.toml", 1, config, 1, config, config),)
    route = Route(name, tuple([each.version for each in wanted]))
    return Found(name, route, wanted, tuple(others), config=stamp)


def spec_of(file: ModelFile) -> ModelSpec:
    return ModelSpec(file.name, file.version, "onnxruntime_onnx", (), (), False, 1)


class Talk:
    """A conversation with a lifecycle. ``states``, ``routes``: as they have been told. ``memory``: what is loaded."""

    def __init__(self, control: str = WATCH, nbytes_max: int = 0) -> None:
        self.lifecycle = Lifecycle(control, nbytes_max)
        self.used: dict[tuple[str, str], float] = {}
        self.now = 1.0
        self.states: dict[tuple[str, str], ModelState] = {}
        self.routes: dict[str, Route] = {}
        self.memory: dict[tuple[str, str], ModelFile] = {}
        self.loaded: list[str] = []  # versions, in the order of their loading
        self.bad: set[tuple[object, ...]] = set()  # of what cannot be loaded

    def hear(self, words: list[Word], file: ModelFile | None = None) -> list[Word]:
        self.lifecycle.validate()
        for word in words:
            match word:
                case Declare(state, fresh):
                    self.states[state.name, state.version] = state
                    if fresh:
                        assert file is not None
                        self.memory[state.name, state.version] = file
                case Unwanted(name, version):
                    del self.states[name, version]
                    self.memory.pop((name, version), None)
                case Rested(name, version):
                    del self.memory[name, version]
                case Routed(route):
                    self.routes[route.name] = route
        ready = {key for key, state in self.states.items() if state.state == READY}
        resting = {key for key in self.memory if self.states[key].state == IDLE}
        assert ready | resting == self.memory.keys()
        return words

    def look(
        self,
        *found: Found,
        after: float = 0.0,
        names: frozenset[str] | None = None,
        placed: Sequence[tuple[str, str]] = (),
        ticket: tuple[int, int] | None = None,
        problem: str = "",
        at_ns: int = NOW_NS,
    ) -> list[Word]:
        self.now += after
        look = Look({each.name: each for each in found}, names, problem, at_ns)
        return self.hear(self.lifecycle.looked(look, self.now, placed, ticket))

    def load(self, most: int = 100) -> list[Word]:
        """All that can be loaded now."""
        words: list[Word] = []
        while most:
            words += self.hear(self.lifecycle.make_room(self.now, lambda key: self.used.get(key, 0.0)))
            files = self.lifecycle.next(self.now)
            if not files:
                break
            most -= 1
            words += self.finish(files[0])
        return words

    def finish(self, file: ModelFile) -> list[Word]:
        if not self.lifecycle.begins(file):
            return []
        self.loaded.append(file.version)
        if file.problem or file.fingerprint in self.bad:
            reason = file.problem or f"{file.path} is garbage"
            state = ModelState(file.name, file.version, UNAVAILABLE, reason, None)
        else:
            state = ModelState(file.name, file.version, READY, "", spec_of(file))
        return self.hear(self.lifecycle.loaded(file, state), file)

    def unload(self, *versions: int, name: str = "m") -> list[Word]:
        return self.hear(self.lifecycle.unload([(name, str(version)) for version in versions]))

    def state(self, version: int, name: str = "m") -> tuple[str, str]:
        state = self.states[name, str(version)]
        return state.state, state.reason


@pytest.fixture
def talk() -> Talk:
    """Version 1 serves."""
    talk = Talk()
    talk.look(found_of(file_of(1)))
    talk.load()
    assert talk.loaded == ["1"]
    return talk


# --- the beginning ---


def test_what_is_there_at_first_is_taken_as_it_is_and_the_newest_comes_first() -> None:
    talk = Talk()
    talk.look(found_of(file_of(3), file_of(2)), found_of(file_of(1, name="n"), name="n"))
    assert {state.state for state in talk.states.values()} == {LOADING}
    assert talk.routes == {"m": Route("m", ("3", "2")), "n": Route("n", ("1",))}
    talk.load()
    assert talk.loaded == ["3", "1", "2"], "models that serve nothing come first"
    assert talk.lifecycle.settled
    assert talk.lifecycle.due() == float("inf")


def test_what_was_written_just_before_has_to_be_still() -> None:
    talk = Talk()
    fresh = file_of(1, at_ns=NOW_NS - 10_000_000)
    talk.look(found_of(fresh))
    assert talk.load() == []
    assert talk.lifecycle.due() == talk.now + STILL_S
    talk.look(found_of(fresh), after=STILL_S, names=talk.lifecycle.restless(talk.now + STILL_S))
    talk.load()
    assert talk.state(1) == (READY, "")


# --- a new version ---


def test_a_new_version_is_loaded_beside_the_old_one_once_it_is_still(talk: Talk) -> None:
    talk.look(found_of(file_of(2), others=[file_of(1)]), after=1.0)
    assert talk.states["m", "2"].state == LOADING
    assert talk.load() == []
    talk.look(found_of(file_of(2, content=2), others=[file_of(1)]), after=STILL_S)  # it is being copied
    assert talk.load() == []
    assert talk.lifecycle.restless(talk.now + STILL_S) == {"m"}
    talk.look(found_of(file_of(2, content=2), others=[file_of(1)]), after=STILL_S)
    talk.load()
    assert talk.memory.keys() == {("m", "1"), ("m", "2")}
    assert talk.routes["m"].versions == ("2",)
    assert talk.unload(1) == [Unwanted("m", "1")]
    assert talk.memory.keys() == {("m", "2")}


def test_files_that_change_all_the_time_are_a_sentence_and_are_loaded_now_and_then(talk: Talk) -> None:
    content = 1
    for _ in range(30):
        content += 1
        talk.look(found_of(file_of(1, content)), after=STILL_S - 0.1)
        assert talk.load() == []
    assert talk.state(1) == (
        READY,
        "its files change all the time, and are loaded once they have been still for 0.5 s",
    )
    talk.look(found_of(file_of(2, content), others=[file_of(1, content)]))
    assert talk.state(2) == (LOADING, "")
    talk.look(found_of(file_of(1, content)), after=STILL_S)
    assert talk.state(1) == (READY, "")
    [file] = talk.lifecycle.next(talk.now)
    assert talk.lifecycle.begins(file)
    began = talk.now
    ready = ModelState("m", "1", READY, "", spec_of(file))
    talk.hear(talk.lifecycle.loaded(file, ready, now=began, took=2.0), file)
    talk.look(found_of(file_of(1, content + 1)), after=STILL_S)
    talk.look(found_of(file_of(1, content + 1)), after=STILL_S)
    assert talk.lifecycle.next(talk.now) == [], "loading it took long"
    assert talk.lifecycle.due() == began + 8.0
    talk.look(found_of(file_of(1, content + 1)), after=8.0)
    assert len(talk.lifecycle.next(talk.now)) == 1


def test_what_waits_for_room_is_not_looked_at_again_and_again() -> None:
    talk = Talk(nbytes_max=100)
    talk.look(*several("a"))
    talk.load()
    for _ in range(2):
        talk.look(*several("ab"), after=STILL_S)
    talk.load()
    talk.look(*several("ab"))
    assert kinds(talk) == {"a": IDLE, "b": LOADING}, "the broker has not heard"
    assert talk.lifecycle.due() == float("inf")


def test_what_is_renamed_into_place_is_taken_at_once(talk: Talk) -> None:
    for version, placed in ((2, ("m", "2")), (3, ("m", ""))):
        talk.look(found_of(file_of(version), others=[file_of(1)]), placed=[placed])
        talk.load()
        assert talk.state(version) == (READY, "")


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_not_tried_again_before_it_changes(
    talk: Talk,
) -> None:
    two = file_of(2)
    talk.bad.add(two.fingerprint)
    talk.look(found_of(two, others=[file_of(1)]), placed=[("m", "2")])
    talk.load()
    assert talk.state(1) == (READY, "it stands in for version 2, which cannot be served")
    assert talk.state(2) == (UNAVAILABLE, "/r/m/2/model.onnx is garbage")
    talk.look(found_of(two, others=[file_of(1)]), after=100.0)
    assert talk.load() == []
    mended = file_of(2, content=2)
    talk.look(found_of(mended, others=[file_of(1)]), after=1.0)
    assert talk.states["m", "2"].state == LOADING
    talk.look(found_of(mended, others=[file_of(1)]), after=STILL_S)
    talk.load()
    assert (talk.state(1), talk.state(2)) == ((READY, ""), (READY, ""))


def test_a_version_that_is_wanted_by_now_is_not_unloaded_and_told_again(talk: Talk) -> None:
    assert talk.unload(1) == [Declare(talk.states["m", "1"]), Routed(Route("m", ("1",)))]
    assert talk.memory.keys() == {("m", "1")}
    assert talk.unload(7) == []
    assert talk.unload(7, name="unknown") == []


def test_a_version_that_was_never_loaded_and_is_not_wanted_any_more_is_gone(talk: Talk) -> None:
    talk.look(found_of(file_of(2), others=[file_of(1)]), after=1.0)
    words = talk.look(found_of(file_of(1)), after=0.1)
    assert words == [Routed(Route("m", ("1",))), Unwanted("m", "2")]
    assert talk.load() == []


def test_what_was_chosen_to_be_loaded_and_is_not_wanted_any_more_is_not(talk: Talk) -> None:
    talk.look(found_of(file_of(2), others=[file_of(1)]), placed=[("m", "2")])
    [two] = talk.lifecycle.next(talk.now)
    assert talk.lifecycle.next(talk.now) == []
    talk.look(found_of(file_of(1)))
    assert not talk.lifecycle.begins(two)
    assert talk.memory.keys() == {("m", "1")}


def test_what_was_loaded_and_is_not_wanted_any_more_does_not_serve(talk: Talk) -> None:
    talk.look(found_of(file_of(2), others=[file_of(1)]), placed=[("m", "2")])
    [two] = talk.lifecycle.next(talk.now)
    assert talk.lifecycle.begins(two)
    talk.look(found_of(file_of(1)))
    assert talk.hear(talk.lifecycle.loaded(two, ModelState("m", "2", READY, "", spec_of(two)))) == []


# --- a version that changes ---


def test_a_version_whose_files_change_is_loaded_anew_in_its_place(talk: Talk) -> None:
    for content, placed in ((2, True), (3, False)):
        talk.look(found_of(file_of(1, content)), placed=[("m", "1")] if placed else (), after=1.0)
        if not placed:
            assert talk.load() == []
            talk.look(found_of(file_of(1, content)), after=STILL_S)
        [word] = talk.load()
        assert word == Declare(talk.states["m", "1"], True)
        assert talk.memory["m", "1"].mark == file_of(1, content).mark


def test_a_version_that_changes_for_the_worse_serves_as_it_was(talk: Talk) -> None:
    talk.bad.add(file_of(1, 2).fingerprint)
    talk.look(found_of(file_of(1, 2)), placed=[("m", "1")])
    talk.load()
    reason = (
        "version 1 as it is on disk now cannot be served: /r/m/1/model.onnx is garbage; the one loaded before serves on"
    )
    assert talk.state(1) == (READY, reason)
    assert talk.memory["m", "1"].mark == file_of(1).mark
    talk.look(found_of(file_of(1)), placed=[("m", "1")])
    assert talk.state(1) == (READY, "")
    assert talk.load() == [], "it is what it was"


def test_a_configuration_that_changes_loads_anew_and_where_requests_go_does_not(talk: Talk) -> None:
    one = replace(file_of(1), config=ModelConfig(labels={"stable": 1}))
    talk.look(found_of(one, config=2), placed=[("m", "model.toml")])
    assert talk.load() == []
    one = replace(file_of(1), config=ModelConfig(max_batch_size=2))
    talk.look(found_of(one, config=3), placed=[("m", "model.toml")])
    talk.look(found_of(one, config=3), after=STILL_S)
    assert talk.load() == [Declare(talk.states["m", "1"], True)]


def test_half_of_a_configuration_is_not_followed(talk: Talk) -> None:
    talk.look(found_of(file_of(1), file_of(0), config=2), after=1.0)
    assert talk.routes["m"] == Route("m", ("1",))
    talk.look(found_of(file_of(0), config=3), after=0.3)
    assert talk.routes["m"] == Route("m", ("1",))
    assert talk.lifecycle.due() == talk.now + STILL_S
    talk.look(found_of(file_of(0), config=3), after=STILL_S)
    assert talk.routes["m"] == Route("m", ("0",))


def test_a_configuration_that_cannot_be_followed_is_a_sentence(talk: Talk) -> None:
    talk.look(replace(found_of(file_of(1), config=2), problem="model.toml: wrong"), placed=[("m", "model.toml")])
    assert talk.state(1) == (READY, "model.toml: wrong; the configuration before it stays in force")
    talk.look(found_of(file_of(1), config=3), placed=[("m", "model.toml")])
    assert talk.state(1) == (READY, "")


# --- standing in ---


def test_where_nothing_that_is_wanted_can_be_loaded_the_newest_older_one_stands_in() -> None:
    talk = Talk()
    talk.bad |= {file_of(5).fingerprint, file_of(4).fingerprint}
    found = found_of(file_of(5), others=[file_of(9), file_of(4), file_of(3), file_of(2)])
    talk.look(found)
    talk.load()
    assert talk.loaded == ["5", "4", "3"]
    assert talk.state(3) == (READY, "it stands in for version 5, which cannot be served")
    assert ("m", "4") not in talk.states
    assert talk.routes["m"].wanted == {"5"}
    assert talk.unload(3) == [Unwanted("m", "3")], "others serve what is wanted"
    talk.look(found, after=10.0)
    talk.load()
    assert talk.loaded == ["5", "4", "3", "2"]


# --- what vanishes ---


def test_a_repository_that_is_away_keeps_all_as_it_is(talk: Talk) -> None:
    talk.look(problem="/r holds no models")
    assert talk.state(1) == (READY, "/r holds no models; what was loaded before serves on")
    talk.look(found_of(file_of(1)))
    assert talk.state(1) == (READY, "")
    assert talk.load() == []


def test_a_model_without_a_version_keeps_what_it_serves(talk: Talk) -> None:
    problem = "/r/m has no version directory"
    hollow = Found("m", Route("m", ("1",)), (replace(file_of(1), problem=problem),), hollow=True)
    talk.look(replace(hollow, config=found_of(file_of(1)).config))
    assert talk.state(1) == (READY, f"{problem}; what was loaded before serves on")
    assert talk.load() == []
    assert talk.routes["m"] == Route("m", ("1",))


def test_a_model_that_is_removed_serves_until_the_broker_says_otherwise(talk: Talk) -> None:
    other = found_of(file_of(1, name="n"), name="n")
    words = talk.look(other)
    assert Routed(Route("m")) in words
    assert ("m", "1") in talk.memory
    assert talk.unload(1) == [Unwanted("m", "1")]
    talk.look(other, found_of(file_of(1)), placed=[("m", "")])
    assert talk.routes["m"] == Route("m", ("1",))
    talk.load()
    assert ("m", "1") in talk.memory


def test_one_look_at_a_model_leaves_others(talk: Talk) -> None:
    talk.look(found_of(file_of(1, name="n"), name="n"), names=frozenset({"n"}), placed=[("n", "")])
    talk.load()
    assert talk.memory.keys() == {("m", "1"), ("n", "1")}


def test_strays_are_told_and_go(talk: Talk) -> None:
    stray = ModelFile("m", "latest", Path("/r/m/latest/model.onnx"), problem="it is no version")
    talk.look(replace(found_of(file_of(1)), strays=(stray,)))
    assert talk.states["m", "latest"] == ModelState("m", "latest", UNAVAILABLE, "it is no version", None)
    assert talk.look(found_of(file_of(1))) == [Unwanted("m", "latest")]


# --- orders ---


def test_what_no_message_could_carry_is_said_as_it_can_be(talk: Talk) -> None:
    stray = ModelFile("m", "?", Path("/r/m/x"), problem="/r/m/\udcff\n\x1b[31m is no version")
    talk.look(replace(found_of(file_of(1)), strays=(stray,)))
    assert talk.states["m", "?"].reason == "/r/m/???[31m is no version"


def test_an_order_is_followed_once_all_is_loaded_or_cannot_be() -> None:
    talk = Talk(EXPLICIT)
    talk.look()
    assert talk.lifecycle.settled
    bad = file_of(2, name="n", at_ns=NOW_NS)
    talk.bad.add(bad.fingerprint)
    words = talk.look(found_of(file_of(1, at_ns=NOW_NS)), found_of(bad, name="n"), ticket=(7, 3))
    assert Followed(7, 3) not in words
    *_, last = talk.load()
    assert last == Followed(7, 3)
    assert talk.state(1)[0] == READY
    assert talk.look(found_of(file_of(1, at_ns=NOW_NS)), ticket=(7, 4))[-1] == Followed(7, 4)
    assert talk.routes["n"] == Route("n")


def test_what_failed_is_tried_again_when_it_is_ordered() -> None:
    talk = Talk(EXPLICIT)
    one = file_of(1)
    talk.bad.add(one.fingerprint)
    talk.look(found_of(one), ticket=(7, 1))
    talk.load()
    talk.bad.clear()
    talk.look(found_of(one), ticket=(7, 2))
    talk.load()
    assert talk.state(1) == (READY, "")


def test_an_order_where_the_repository_says_it_is_a_look(talk: Talk) -> None:
    assert talk.look(found_of(file_of(1)), ticket=(7, 1)) == [Followed(7, 1)]


def test_nothing_has_to_be_still_where_nothing_is_watched() -> None:
    talk = Talk(NONE)
    talk.look(found_of(file_of(1, at_ns=NOW_NS)))
    talk.load()
    assert talk.state(1) == (READY, "")


# --- whatever happens ---


class Machine(RuleBasedStateMachine):
    """Plays a repository of two models, a broker, and time."""

    nbytes_max = 0

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk(nbytes_max=self.nbytes_max)
        self.disk: dict[str, dict[int, int]] = {"m": {1: 1}, "n": {1: 1}}
        self.named: dict[str, int] = {}  # the version that a configuration names
        self.content = 1
        self.unwanted_for: dict[tuple[str, str], int] = {}
        self.away = False
        self.begun: list[ModelFile] = []
        self.look()

    def found(self, name: str) -> Found:
        there = sorted(self.disk[name], reverse=True)
        if not there:
            problem = f"{name} has no version"
            file = ModelFile(name, "1", Path(f"/r/{name}"), problem=problem)
            return Found(name, Route(name, ("1",)), (file,), hollow=True, config=((name, 1, 1, 1, 1, 1),))
        wanted = self.named.get(name, there[0])
        files = {version: file_of(version, content, name) for version, content in self.disk[name].items()}
        missing = ModelFile(name, str(wanted), Path(f"/r/{name}/{wanted}"), problem="it does not exist")
        others = [files[version] for version in there if version != wanted]
        return found_of(files.get(wanted, missing), others=others, name=name, config=self.named.get(name, 0))

    @rule(after=st.sampled_from([0.0, 0.1, STILL_S, 3.0]))
    def look(self, after: float = 0.0) -> None:
        if self.away or not self.disk:
            self.talk.look(after=after, problem="the repository is away")
        else:
            self.talk.look(*[self.found(name) for name in self.disk], after=after)

    @rule(name=st.sampled_from("mn"), version=st.integers(1, 4), bad=st.booleans(), placed=st.booleans())
    def put(self, name: str, version: int, bad: bool, placed: bool) -> None:
        self.content += 1
        self.disk.setdefault(name, {})[version] = self.content
        if bad:
            self.talk.bad.add(file_of(version, self.content, name).fingerprint)
        if placed and not self.away:
            self.talk.look(self.found(name), names=frozenset({name}), placed=[(name, str(version))])

    @rule(name=st.sampled_from("mn"), version=st.integers(1, 4))
    def remove(self, name: str, version: int) -> None:
        self.disk.get(name, {}).pop(version, None)

    @rule(name=st.sampled_from("mn"))
    def remove_model(self, name: str) -> None:
        self.disk.pop(name, None)

    @rule(name=st.sampled_from("mn"), version=st.integers(0, 4))
    def configure(self, name: str, version: int) -> None:
        if version:
            self.named[name] = version
        else:
            self.named.pop(name, None)

    @rule()
    def come_and_go(self) -> None:
        self.away = not self.away

    @rule(most=st.integers(1, 3))
    def choose(self, most: int) -> None:
        self.begun += self.talk.lifecycle.next(self.talk.now, most)

    @precondition(lambda self: self.begun)
    @rule()
    def load(self) -> None:
        self.talk.finish(self.begun.pop(0))

    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        """The broker unloads what no worker wants, and what is not the only one that serves a model that is wanted."""
        for (name, version), _ in sorted(self.talk.memory.items()):
            route = self.talk.routes[name]
            spared = not route.versions or any(("m" if name == "m" else "n", each) in self.talk.memory
                                               for each in route.wanted)  # fmt: skip
            if version not in route.wanted and spared and data.draw(st.booleans()):
                self.talk.unload(int(version), name=name)
                assert (name, version) not in self.talk.memory
                return

    @invariant()
    def what_serves_serves_on(self) -> None:
        """Nothing leaves memory but what the broker unloads, which ``hear`` and ``unload`` see to; here: it is told."""
        for name, version in self.talk.memory:
            assert self.talk.states[name, version].state in (READY, IDLE)

    def teardown(self) -> None:
        """Once all is quiet, every version that is wanted is loaded as it is on disk, or has failed as it is."""
        self.away = False
        if not self.disk:
            return
        for _ in range(3):
            self.look(STILL_S)
            while self.begun:
                self.load()
            self.talk.load()
        assert self.talk.lifecycle.settled
        assert self.talk.lifecycle.due() == float("inf")
        for name in self.disk:
            found = self.found(name)
            serves = any(each == name for each, _ in self.talk.memory)
            if found.hollow and serves:
                continue
            assert self.talk.routes[name] == found.route
            for file in found.files:
                state = self.talk.states[name, file.version]
                if file.problem or file.fingerprint in self.talk.bad:
                    assert state.state == UNAVAILABLE or "as it is on disk now" in state.reason
                else:
                    assert self.talk.memory[name, file.version].mark == file.mark
            newest = int(found.files[0].version)
            good = [
                each for each in found.others if each.fingerprint not in self.talk.bad and int(each.version) < newest
            ]
            assert serves or not good, "something could stand in"


def test_whatever_happens_something_serves_and_what_is_wanted_is_loaded() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))


# --- room ---


def several(names: str) -> list[Found]:
    """Models of a hundred bytes each."""
    return [found_of(file_of(1, name=name), name=name) for name in names]


def fill(talk: Talk) -> None:
    """Load all there is, with a broker that hears at once what is IDLE."""
    for _ in range(100):
        talk.load()
        resting = [name for (name, version), state in talk.states.items() if state.state == IDLE]
        resting = [name for name in resting if (name, "1") in talk.memory]
        if not resting:
            return
        for name in resting:
            talk.unload(1, name=name)
    raise AssertionError("it does not end")


def add(talk: Talk, names: str) -> None:
    """From now on there are these, which come as a whole."""
    talk.look(*several(names), placed=[(name, "") for name in names])
    fill(talk)


def kinds(talk: Talk) -> dict[str, str]:
    return {name: state.state for (name, _), state in sorted(talk.states.items())}


def test_what_does_not_fit_is_loaded_once_and_then_idle() -> None:
    talk = Talk(nbytes_max=300)
    talk.look(*several("abcde"))
    fill(talk)
    assert talk.lifecycle.settled
    assert sorted(talk.states) == [(name, "1") for name in "abcde"]
    assert kinds(talk) == {"a": IDLE, "b": IDLE, "c": READY, "d": READY, "e": READY}
    assert talk.state(1, "a") == (IDLE, "not in memory: it is loaded when it is asked for")
    assert talk.states["a", "1"].spec is not None


def test_what_is_asked_for_takes_the_place_of_what_was_used_least_recently() -> None:
    talk = Talk(nbytes_max=300)
    add(talk, "abc")
    add(talk, "abcd")
    assert kinds(talk) == {"a": IDLE, "b": READY, "c": READY, "d": READY}
    talk.used |= {("b", "1"): 7.0, ("c", "1"): 5.0, ("d", "1"): 6.0}
    talk.hear(talk.lifecycle.wake("a", "1"))
    talk.load()
    assert kinds(talk) == {"a": IDLE, "b": READY, "c": IDLE, "d": READY}, "it is IDLE until it serves"
    assert ("c", "1") in talk.memory, "until the broker has heard"
    talk.unload(1, name="c")
    talk.load()
    assert kinds(talk) == {"a": READY, "b": READY, "c": IDLE, "d": READY}
    assert talk.lifecycle.settled


def test_what_is_asked_for_while_it_is_on_its_way_out_goes_and_comes_again() -> None:
    """The broker says that it may go for each time that it was told IDLE: were it READY and IDLE again meanwhile, one
    word of the broker could stand for two, or be missing, and what waits for the room would wait for ever."""
    talk = Talk(nbytes_max=200)
    add(talk, "ab")
    add(talk, "abc")
    talk.used |= {("b", "1"): 1.0, ("c", "1"): 2.0}
    talk.hear(talk.lifecycle.wake("a", "1"))
    talk.load()
    assert kinds(talk) == {"a": IDLE, "b": IDLE, "c": READY}
    assert talk.hear(talk.lifecycle.wake("b", "1")) == []
    assert talk.unload(1, name="b") == [Rested("b", "1")]
    fill(talk)
    assert sorted(talk.loaded[-2:]) == ["1", "1"]
    assert talk.lifecycle.settled
    assert Counter(kinds(talk).values()) == {READY: 2, IDLE: 1}


def test_the_broker_may_say_twice_that_what_is_idle_can_go() -> None:
    talk = Talk(nbytes_max=100)
    talk.look(*several("ab"))
    fill(talk)
    assert talk.unload(1, name="a") == []
    assert talk.hear(talk.lifecycle.wake("b", "1")) == [], "it serves"
    assert talk.hear(talk.lifecycle.wake("x", "1")) == []


def test_what_is_larger_than_all_the_room_is_loaded_all_the_same() -> None:
    talk = Talk(nbytes_max=50)
    talk.look(*several("ab"))
    fill(talk)
    assert kinds(talk) == {"a": IDLE, "b": READY}


def test_an_idle_version_that_changes_is_loaded_to_see_whether_it_can_be() -> None:
    talk = Talk(nbytes_max=100)
    talk.look(*several("ab"))
    fill(talk)
    changed = found_of(file_of(1, content=2, name="a"), name="a")
    talk.bad.add(changed.files[0].fingerprint)
    talk.look(changed, names=frozenset("a"), placed=[("a", "1")])
    fill(talk)
    assert talk.state(1, "a")[0] == UNAVAILABLE
    assert kinds(talk)["b"] == IDLE, "it has made room"


def test_an_idle_model_that_is_removed_goes() -> None:
    talk = Talk(nbytes_max=100)
    talk.look(*several("ab"))
    fill(talk)
    talk.look(*several("b"))
    assert kinds(talk) == {"b": READY}
    add(talk, "bc")
    assert kinds(talk) == {"b": IDLE, "c": READY}
    talk.hear(talk.lifecycle.wake("b", "1"))
    talk.load()
    assert kinds(talk) == {"b": IDLE, "c": IDLE}, "c is on its way out"
    talk.look(*several("b"))
    talk.unload(1, name="c")
    fill(talk)
    assert kinds(talk) == {"b": READY}


def test_what_changes_while_it_is_on_its_way_out_is_not_dropped_once_it_is_loaded() -> None:
    talk = Talk(nbytes_max=200)
    add(talk, "ab")
    add(talk, "abc")
    talk.used |= {("b", "1"): 1.0, ("c", "1"): 2.0}
    talk.hear(talk.lifecycle.wake("a", "1"))
    talk.hear(talk.lifecycle.make_room(talk.now, lambda key: talk.used.get(key, 0.0)))
    assert kinds(talk) == {"a": IDLE, "b": IDLE, "c": READY}
    changed = found_of(file_of(1, content=2, name="b"), name="b")
    talk.look(changed, names=frozenset("b"), placed=[("b", "")])
    talk.load()
    talk.unload(1, name="b")  # as the broker said when it had heard that b was IDLE
    fill(talk)
    assert [name for name, _ in sorted(talk.memory)] == [name for name, kind in kinds(talk).items() if kind == READY]
    assert len(talk.memory) == 2


class RoomMachine(Machine):
    """The same where there is room for two versions."""

    nbytes_max = 200

    @rule(most=st.integers(1, 3))
    def choose(self, most: int) -> None:
        self.make_room()
        super().choose(most)

    @rule()
    def make_room(self) -> None:
        self.talk.hear(self.talk.lifecycle.make_room(self.talk.now, lambda key: self.talk.used.get(key, 0.0)))

    @rule(name=st.sampled_from("mn"), version=st.integers(1, 4), at=st.floats(0, 10))
    def use(self, name: str, version: int, at: float) -> None:
        self.talk.used[name, str(version)] = at

    @rule(name=st.sampled_from("mn"), version=st.integers(1, 4))
    def wake(self, name: str, version: int) -> None:
        self.talk.hear(self.talk.lifecycle.wake(name, str(version)))

    @rule(name=st.sampled_from("mn"), version=st.integers(1, 4))
    def hear_of_idle(self, name: str, version: int) -> None:
        """The broker has heard that it is IDLE, or says so twice."""
        state = self.talk.states.get((name, str(version)))
        if state is not None and state.state == IDLE:
            self.talk.unload(version, name=name)
            assert (name, str(version)) not in self.talk.memory

    def teardown(self) -> None:
        """Once all is quiet, every version that is wanted is served, as it is on disk, or has failed as it is."""
        self.away = False
        if not self.disk:
            return
        for _ in range(3):
            self.look(STILL_S)
            while self.begun:
                self.load()
            for _ in range(20):
                self.talk.load()
                for name in "mn":
                    for version in range(1, 5):
                        self.hear_of_idle(name, version)
        assert self.talk.lifecycle.settled
        assert self.talk.lifecycle.due() == float("inf")
        for name in self.disk:
            found = self.found(name)
            if found.hollow:
                continue
            for file in found.files:
                state = self.talk.states[name, file.version]
                if file.problem or file.fingerprint in self.talk.bad:
                    assert state.state == UNAVAILABLE or "as it is on disk now" in state.reason
                else:
                    assert state.state in (READY, IDLE)
                    assert state.state == IDLE or self.talk.memory[name, file.version].mark == file.mark


def test_whatever_happens_what_is_wanted_is_served_where_room_is_scarce() -> None:
    run_state_machine_as_test(RoomMachine, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))


def replaced_while_idle(bad: bool = False) -> Talk:
    """``a`` is IDLE while a newer version of it comes."""
    talk = Talk(nbytes_max=100)
    talk.look(*several("ab"))
    fill(talk)
    newer, old = file_of(2, name="a"), file_of(1, name="a")
    if bad:
        talk.bad.add(newer.fingerprint)
    talk.look(found_of(newer, others=[old], name="a"), names=frozenset("a"), placed=[("a", "2")])
    assert talk.state(1, "a")[0] == IDLE, "it can be asked until the newer one serves"
    fill(talk)
    return talk


def test_what_is_idle_and_not_wanted_any_more_stays_until_the_broker_says_otherwise() -> None:
    talk = replaced_while_idle()
    assert (talk.state(1, "a")[0], talk.state(2, "a")[0], kinds(talk)["b"]) == (IDLE, READY, IDLE)
    talk.unload(1, name="a")
    assert ("a", "1") not in talk.states


def test_what_is_idle_stands_in_for_what_fails() -> None:
    talk = replaced_while_idle(bad=True)
    assert (talk.state(1, "a")[0], talk.state(2, "a")[0]) == (IDLE, UNAVAILABLE)
    talk.hear(talk.lifecycle.wake("a", "1"))
    fill(talk)
    assert talk.state(1, "a")[0] == READY
    talk.hear(talk.lifecycle.wake("b", "1"))
    talk.load()
    talk.unload(1, name="a")  # as it is IDLE
    talk.load()
    assert (talk.state(1, "a")[0], kinds(talk)["b"]) == (IDLE, READY), "it makes room as any other"
    talk.hear(talk.lifecycle.wake("a", "1"))
    talk.look(found_of(file_of(2, name="a"), name="a"), names=frozenset("a"))
    assert ("a", "1") not in talk.states, "its files are gone"
    assert talk.lifecycle.settled


@pytest.mark.parametrize("bad", [False, True])
def test_what_changes_on_its_way_out_and_is_loaded_meanwhile_stays(bad: bool) -> None:
    talk = Talk(nbytes_max=300)
    talk.look(*several("abc"))
    fill(talk)
    talk.used["a", "1"] = -1.0
    talk.look(*several("abcd"), placed=[("d", "")])
    talk.load()
    assert kinds(talk) == {"a": IDLE, "b": READY, "c": READY, "d": LOADING}
    talk.look(*several("ab"))  # there is room after all
    talk.unload(1, name="c")
    changed = found_of(file_of(1, content=2, name="a"), name="a")
    if bad:
        talk.bad.add(changed.files[0].fingerprint)
    talk.look(changed, names=frozenset("a"), placed=[("a", "1")])
    talk.load()
    assert talk.state(1, "a")[0] == READY
    assert ("as it is on disk now" in talk.state(1, "a")[1]) == bad
    talk.unload(1, name="a")  # as it was IDLE
    assert kinds(talk) == {"a": READY, "b": READY}
