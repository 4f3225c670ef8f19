"""Which versions of which models a worker has in memory: looks at the repository and the broker's word in, what to load
and what to tell out. Pure: no file, clock or thread.

A version that is wanted is loaded beside what serves, once its files have been still for a moment. What serves goes on
until the broker says that nobody will ask for it any more, or until what has been loaded anew takes its place; so
whatever fails here, something serves. Nothing that failed is tried again before it has changed.

Where memory has a limit, what was used least recently becomes IDLE to make room for what is to be loaded, and is loaded
again when it is asked for. It goes when the broker has heard: until then it may send requests for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from penstock.wire.messages import MAX_SENTENCE, WATCH
from penstock.wire.models import IDLE, LOADING, READY, UNAVAILABLE, ModelState, Route
from penstock.worker.events import Followed, Rested, Routed, Unwanted
from penstock.worker.repository import CONFIG_NAMES, Found, Look, ModelFile

STILL_S: Final = 0.5  # that files have not changed before they are taken
_REST_TIMES: Final = 4  # of what loading took: for so long files that change again and again are not loaded again
_RESTLESS_S: Final = 10.0  # that files change without a word
_SPARE: Final = 8  # at the beginning, one part of so many is made free at a time: to ask the broker takes a while
_NS: Final = 1_000_000_000
_IDLE: Final = "not in memory: it is loaded when it is asked for"
_UNSTILL: Final = f"its files change all the time, and are loaded once they have been still for {STILL_S:g} s"

Mark: TypeAlias = tuple[object, ...]
Ticket: TypeAlias = tuple[int, int]  # the epoch and the serial of an order
# A model, and what has been renamed into place in its directory: a version, or its configuration; "": all of it.
Placed: TypeAlias = Collection[tuple[str, str]]


@dataclass(slots=True)
class Declare:
    """How a version fares. ``fresh``: what has just been loaded serves from now on."""

    state: ModelState
    fresh: bool = False


Word: TypeAlias = Declare | Routed | Unwanted | Rested | Followed
Used: TypeAlias = Callable[[tuple[str, str]], float]  # when a version was used last, or loaded


@dataclass(slots=True)
class _Version:
    """``file``: what it would be loaded from, None when it is not there any more; ``mark``: of that, since when.
    ``settled``: it is taken as it is. ``loaded``, ``failed``, ``loading``: the marks of what is in memory, of what
    could not be loaded, and of what is being loaded. ``state``: of what is in memory, or was. ``dismissed``: the broker
    has said that nobody will ask for it. ``idle``: the mark of what is loaded when it is ``asked`` for; ``rests``: it
    is in memory still, until the broker has heard of it. ``nbytes``: that it takes, or is expected to."""

    file: ModelFile | None = None
    mark: Mark = ()
    since: float = 0.0
    settled: bool = False
    loaded: Mark | None = None
    state: ModelState | None = None
    note: str = ""  # of what is in memory
    failed: Mark | None = None
    failure: str = ""
    loading: Mark | None = None
    dismissed: bool = False
    idle: Mark | None = None
    asked: bool = False
    rests: bool = False
    nbytes: int = 0
    at: float = 0.0  # when it was loaded, or could not be
    took: float = 0.0
    unstill_at: float | None = None  # when its files began to change, since it was loaded
    unstill: bool = False  # for long

    @property
    def pending(self) -> bool:
        if self.file is None or self.mark in (self.loaded, self.failed):
            return False
        return self.mark != self.idle or self.asked

    @property
    def can_serve(self) -> bool:
        """At once, or when it is asked for."""
        return self.loaded is not None or (self.idle is not None and self.file is not None)

    def still_at(self) -> float:
        return 0.0 if self.settled else max(self.since + STILL_S, self.at + _REST_TIMES * self.took)


@dataclass(slots=True)
class _Model:
    """``wanted``: what its route speaks of, the newest first; ``others``: what may stand in for those. ``route``,
    ``told``: what has been told of it. ``config_at``: when a configuration that has changed will have been still."""

    name: str
    route: Route
    found: Found | None = None
    versions: dict[str, _Version] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    told_route: Route | None = None
    told: dict[str, ModelState] = field(default_factory=dict)
    note: str = ""
    config: object = None  # the one that is to be taken, once it is still
    config_at: float = float("inf")

    @property
    def serves(self) -> bool:
        return any(each.can_serve for each in self.versions.values())

    def stand_ins(self) -> Iterator[_Version]:
        """What may be loaded since nothing that is wanted can be served."""
        if self.serves or not self.wanted or any(self.versions[each].pending for each in self.wanted):
            return
        for version in self.others:
            each = self.versions[version]
            if int(version) < int(self.wanted[0]) and each.pending and not each.dismissed:
                yield each

    def due(self) -> Iterator[_Version]:
        """What is to be loaded, once it is still."""
        for version in self.wanted:
            if self.versions[version].pending:
                yield self.versions[version]
        for version, each in self.versions.items():
            if each.asked and each.pending and version not in self.wanted:
                yield each
        yield from list(self.stand_ins())[:1]


class Lifecycle:
    """One for each worker. Times are seconds of the caller's monotonic clock. What is returned is to be told."""

    def __init__(self, control: str = WATCH, nbytes_max: int = 0) -> None:
        """``nbytes_max``: of what is in memory; 0: no limit."""
        self.control = control
        self._nbytes_max = nbytes_max
        self._began = False  # all that was there at first is loaded
        self._models: dict[str, _Model] = {}
        self._todo: dict[str, None] = {}  # models of which something is to be loaded
        self._restless: dict[str, float] = {}  # models that are to be looked at again, and when
        self._looked = False
        self._problem = ""  # of the whole repository
        self._ticket: Ticket | None = None
        self._awaited: set[tuple[str, str]] = set()  # what has to be loaded, or to fail, until that is followed

    # --- what is on disk ---

    def looked(self, look: Look, now: float, placed: Placed = (), ticket: Ticket | None = None) -> list[Word]:
        """``placed``: what need not be still. ``ticket``: of the order because of which it was looked."""
        words: list[Word] = []
        first, self._looked = not self._looked, True
        touched: list[str] = []
        if look.problem != self._problem or ticket is not None:
            # What could not be read while the repository was not there may be all right; and who orders something
            # to be loaded wants it to be tried again.
            self._problem = look.problem
            touched += self._models
            self._try_again()
        if not look.problem:
            if look.names is None:
                gone = self._models.keys() - look.models.keys()
            else:
                gone = (self._models.keys() & look.names) - look.models.keys()
            for name in gone:
                self._remove(self._models[name])
            touched += gone
            for found in look.models.values():
                self._take(found, look, now, placed, first)
            touched += look.models
        for name in dict.fromkeys(touched):
            words += self._tell(self._models[name])
        if ticket is not None:
            self._ticket = ticket
            self._awaited = {
                (model.name, version)
                for model in self._models.values()
                for version in model.wanted
                if model.versions[version].pending
            }
        return words + self._follow()

    def due(self) -> float:
        """When to look again at what had changed, to see whether it still does."""
        return min(self._restless.values(), default=float("inf"))

    def restless(self, now: float) -> frozenset[str]:
        """What to look at by then."""
        return frozenset([name for name, at in self._restless.items() if at <= now])

    def _take(self, found: Found, look: Look, now: float, placed: Placed, first: bool) -> None:
        model = self._models.get(found.name)
        if model is None:
            model = self._models[found.name] = _Model(found.name, Route(found.name))
        if not self._config_is_still(model, found, now, placed):
            return
        model.found = found
        if found.hollow and model.serves:
            model.note = f"{found.files[0].problem}; what was loaded before serves on" if found.files else ""
            return
        model.note = f"{found.problem}; the configuration before it stays in force" if found.problem else ""
        model.route = found.route
        model.wanted = tuple([file.version for file in found.files])
        model.others = tuple([file.version for file in found.others])
        there = {file.version: file for file in (*found.others, *found.files)}
        for version in there.keys() | model.versions.keys():
            each = model.versions.setdefault(version, _Version())
            file = there.get(version)
            each.file = file
            if file is None:
                continue
            mark = file.mark
            if mark != each.mark:
                each.mark, each.since, each.dismissed = mark, now, False
                each.nbytes = each.nbytes or file.nbytes
                each.settled = self.control != WATCH or (first and _is_old(file, look.at_ns))
                each.unstill_at = now if each.unstill_at is None else each.unstill_at
                each.unstill = now > each.unstill_at + _RESTLESS_S
            elif now >= each.still_at():
                each.settled, each.unstill_at, each.unstill = True, None, False
            if (model.name, version) in placed or (model.name, "") in placed:
                each.settled = True

    def _config_is_still(self, model: _Model, found: Found, now: float, placed: Placed) -> bool:
        """Whether a configuration is the one in force, or has been still. An editor may write a file bit by bit, and
        half of one may be in order, and mean something else."""
        if model.found is None or found.config == model.found.config or self.control != WATCH:
            model.config, model.config_at = None, float("inf")
            return True
        if any((model.name, each) in placed for each in (*CONFIG_NAMES, "")):
            model.config, model.config_at = None, float("inf")
            return True
        if found.config != model.config:
            model.config, model.config_at = found.config, now + STILL_S
        if now < model.config_at:
            return False
        model.config, model.config_at = None, float("inf")
        return True

    def _remove(self, model: _Model) -> None:
        """It is not there any more. What is in memory serves until the broker says otherwise."""
        model.found, model.note, model.config_at = None, "", float("inf")
        model.route, model.wanted, model.others = Route(model.name), (), ()
        for each in model.versions.values():
            each.file, each.mark = None, ()

    def _try_again(self) -> None:
        for model in self._models.values():
            for each in model.versions.values():
                each.failed = None

    # --- loading ---

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be loaded, or waited for."""
        return not self._todo

    def next(self, now: float, most: int = 1) -> list[ModelFile]:
        """What to load now: first of models that serve nothing, and of a model the newest. ``begins`` is asked, and
        ``loaded`` told, of each."""
        self._began = self._began or not self._todo
        chosen = self._choose(now, 1 if self._nbytes_max else most)
        if self._nbytes_max:
            chosen = [each for each in chosen if self._has_room(each)]
        files = []
        for each in chosen:
            assert each.file is not None
            each.loading = each.mark
            files.append(each.file)
        return files

    def _choose(self, now: float, most: int) -> list[_Version]:
        """What to load now, or what room is to be made for."""
        chosen: list[_Version] = []
        later: list[_Version] = []
        for name in self._todo:
            if len(chosen) == most:
                break
            model = self._models[name]
            for each in model.due():
                if each.loading is None and each.still_at() <= now:
                    (chosen if each.asked or not model.serves else later).append(each)
                    break
        return chosen + later[: most - len(chosen)]

    def begins(self, file: ModelFile) -> bool:
        """Whether what ``next`` gave is to be loaded still; else it is forgotten."""
        each = self._models[file.name].versions[file.version]
        if any(each is due and each.loading == each.mark for due in self._models[file.name].due()):
            return True
        each.loading = None
        self._rest(self._models[file.name])
        return False

    def loaded(
        self, file: ModelFile, state: ModelState, nbytes: int = 0, now: float = 0.0, took: float = 0.0
    ) -> list[Word]:
        """What has come of it: it is READY, or UNAVAILABLE for a reason. Where the first word is a Declare that is
        ``fresh``, what was loaded serves; else it is not wanted any more. ``nbytes``: that it takes; ``took``:
        seconds."""
        model = self._models[file.name]
        each = model.versions[file.version]
        mark, each.loading = each.loading, None
        each.nbytes, each.at, each.took = nbytes or each.nbytes, now, took
        asked, each.asked = each.asked, False
        each.idle, each.rests = None, False  # what is in memory still, since the broker has not heard, serves on
        assert mark is not None, f"{file.name} {file.version} was not to be loaded"
        fresh = False
        if state.state != READY:
            each.failed, each.failure = mark, state.reason
        elif file.version in model.wanted or asked or (file.version in model.others and not model.serves):
            each.loaded, each.state, each.note = mark, state, file.note
            each.failed, each.failure = None, ""
            fresh = True
        words = self._tell(model)
        if fresh:
            shown = self._state(model, file.version, each)
            words = [Declare(shown, True), *[word for word in words if word != Declare(shown)]]
        return words + self._follow()

    # --- room ---

    def make_room(self, now: float, used: Used) -> list[Word]:
        """Have what was used least recently make room for what is to be loaded next, if it has to."""
        if not self._nbytes_max or not (chosen := self._choose(now, 1)):
            return []
        [first] = chosen
        assert first.file is not None
        first.settled = True  # it has been still; to wait for room it need not be looked at again
        self._rest(self._models[first.file.name])
        over = self._taken() + first.nbytes - self._nbytes_max
        if over > 0 and not self._began:
            over += self._nbytes_max // _SPARE
        over -= sum([each.nbytes for _, _, each in self._in_memory() if each.rests])
        words: list[Word] = []
        others = [
            (max(used((model.name, version)), each.at), number, model, each)
            for number, (model, version, each) in enumerate(self._in_memory())
            if model.name != first.file.name and not each.rests and each.file is not None and each.mark == each.loaded
        ]
        for _, _, model, each in sorted(others, key=lambda other: other[:2]):
            if over <= 0:
                break
            over -= each.nbytes
            each.rests, each.idle = True, each.mark
            words += self._tell(model)
        return words

    def _in_memory(self) -> Iterator[tuple[_Model, str, _Version]]:
        for model in self._models.values():
            for version, each in model.versions.items():
                if each.loaded is not None or each.loading is not None:
                    yield model, version, each

    def _taken(self) -> int:
        return sum([each.nbytes for _, _, each in self._in_memory()])

    def _has_room(self, wanted: _Version) -> bool:
        """What is larger than all the room there is is loaded all the same, once nothing else can go."""
        if self._taken() + wanted.nbytes <= self._nbytes_max:
            return True
        return not any(each.rests or each.loading is not None for _, _, each in self._in_memory())

    def wake(self, name: str, version: str) -> list[Word]:
        """Requests wait for a version that is IDLE."""
        model = self._models.get(name)
        each = model.versions.get(version) if model is not None else None
        if model is None or each is None or each.idle is None:
            return []
        # What is in memory still goes first: for each time that it is told IDLE the broker says once that it can.
        each.asked = True
        return self._tell(model)

    # --- the broker ---

    def unload(self, versions: Sequence[tuple[str, str]]) -> list[Word]:
        """Nobody will ask for these any more. What is wanted by now is told again: the broker did not know."""
        words: list[Word] = []
        for name, version in versions:
            model = self._models.get(name)
            each = model.versions.get(version) if model is not None else None
            if model is None or each is None:
                continue
            if each.rests:
                each.rests, each.loaded = False, None
                words += [Rested(name, version), *self._tell(model)]
                continue
            if version in model.wanted and each.idle is not None:
                continue
            if version in model.wanted or (model.told_route is not None and version in model.told_route.wanted):
                words += [Declare(model.told[version])] if version in model.told else []
                words.append(Routed(model.route))
                continue
            each.loaded = each.idle = each.state = None
            each.asked, each.dismissed = False, True
            words += self._tell(model)
        return words + self._follow()

    # --- telling ---

    def _tell(self, model: _Model) -> list[Word]:
        """What has changed of a model."""
        states: dict[str, ModelState] = {}
        for version, each in model.versions.items():
            if version in model.wanted or each.can_serve:
                states[version] = self._state(model, version, each)
        for stray in model.found.strays if model.found is not None else ():
            states.setdefault(stray.version, _unavailable(model.name, stray.version, stray.problem))
        words: list[Word] = [Declare(state) for version, state in states.items() if model.told.get(version) != state]
        if model.told_route is None or model.route != model.told_route:
            words.append(Routed(model.route))
        words += [Unwanted(model.name, version) for version in model.told if version not in states]
        model.told, model.told_route = states, model.route
        kept = {*states, *model.others}
        model.versions = {
            version: each for version, each in model.versions.items() if version in kept or each.loading is not None
        }
        self._rest(model)
        if model.found is None and not model.versions:
            del self._models[model.name]
        return words

    def _rest(self, model: _Model) -> None:
        """See whether anything is to be loaded, or to be looked at again."""
        due = list(model.due())
        if due:
            self._todo[model.name] = None
        else:
            self._todo.pop(model.name, None)
        unstill = [each.still_at() for each in due if not each.settled and each.loading is None]
        at = min([model.config_at, *unstill], default=float("inf"))
        if at < float("inf"):
            self._restless[model.name] = at
        else:
            self._restless.pop(model.name, None)

    def _state(self, model: _Model, version: str, each: _Version) -> ModelState:
        problem = f"{self._problem}; what was loaded before serves on" if self._problem else ""
        if each.idle is not None and each.state is not None:
            return each.state._replace(state=IDLE, reason=_sentence([problem, model.note, _IDLE, each.state.reason]))
        if each.loaded is not None and each.state is not None:
            why = [problem, model.note]
            if each.failed is not None and each.failed == each.mark != each.loaded:
                why.append(
                    f"version {version} as it is on disk now cannot be served: {each.failure}; the one loaded before "
                    "serves on"
                )
            elif each.unstill:
                why.append(_UNSTILL)
            if model.wanted and version not in model.wanted and self._all_failed(model):
                why.append(f"it stands in for version {model.wanted[0]}, which cannot be served")
            return each.state._replace(reason=_sentence([*why, each.note, each.state.reason]))
        if each.failed is not None and each.failed == each.mark:
            return _unavailable(model.name, version, _sentence([each.failure, model.note]))
        return ModelState(model.name, version, LOADING, _sentence([_UNSTILL if each.unstill else "", model.note]), None)

    def _all_failed(self, model: _Model) -> bool:
        versions = [model.versions[each] for each in model.wanted]
        return all(each.loaded is None and each.failed == each.mark for each in versions)

    def _follow(self) -> list[Word]:
        if self._ticket is None:
            return []
        self._awaited = {(name, version) for name, version in self._awaited if self._is_pending(name, version)}
        if self._awaited:
            return []
        ticket, self._ticket = self._ticket, None
        return [Followed(*ticket)]

    def _is_pending(self, name: str, version: str) -> bool:
        model = self._models.get(name)
        each = model.versions.get(version) if model is not None and version in model.wanted else None
        return each is not None and each.pending

    def validate(self) -> None:
        """For tests: derive again what is indexed. Raises AssertionError."""
        for name, model in self._models.items():
            assert name == model.name, f"{model.name} is found as {name}"
            assert {*model.wanted, *model.others} <= model.versions.keys(), f"versions of {name} are missing"
            assert not set(model.wanted) & set(model.others), f"versions of {name} are wanted and others"
            assert bool(list(model.due())) == (name in self._todo), f"{name} is (not) to be loaded"
            loaded = {version for version, each in model.versions.items() if each.loaded is not None}
            rests = {version for version, each in model.versions.items() if each.rests}
            ready = {version for version, state in model.told.items() if state.state == READY}
            assert loaded - rests == ready, f"of {name} {loaded} are in memory, and {ready} are told"
            assert rests <= loaded, f"of {name} {rests} rest, and {loaded} are in memory"
        assert self._todo.keys() <= self._models.keys(), "what has gone is to be loaded"
        assert self._restless.keys() <= self._models.keys(), "what has gone is to be looked at"


def _unavailable(name: str, version: str, reason: str) -> ModelState:
    return ModelState(name, version, UNAVAILABLE, _sentence([reason]), None)


def _sentence(parts: Sequence[str]) -> str:
    """A path in it may hold what is not UTF-8, so that no message could carry it, or what would steer a terminal."""
    said = "; ".join(filter(None, parts)).encode("utf-8", "replace").decode()[:MAX_SENTENCE]
    return said if said.isprintable() else "".join([each if each.isprintable() else "?" for each in said])


def _is_old(file: ModelFile, at_ns: int) -> bool:
    """Whether its files were still before they were first seen, as far as clocks tell."""
    return abs(at_ns - file.changed_ns) >= STILL_S * _NS
