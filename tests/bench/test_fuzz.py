"""The fuzzer finds what is wrong, tells how to see it again, and finds nothing in what is there."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench import fuzz, fuzzlive, fuzzmutate, fuzzrun, fuzzwire
from bench.fuzzbroker import Broker
from bench.fuzzcaller import CallerCore
from bench.fuzzexamples import Examples
from bench.fuzzfiles import Files
from bench.fuzzhttp import HttpTarget, statuses
from bench.fuzztarget import Target
from bench.fuzzwire import Codec, Control, Zmtp
from bench.fuzzworker import Worker
from penstock.broker.core import Core
from penstock.gateway import inference
from penstock.wire.codec import unpack
from penstock.wire.messages import INLINE_MAX_BYTES, Submit
from tests.system.servers import wait_for


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """A process that fuzzes hears nothing but findings; this one goes on to other tests."""
    found = [logging.getLogger(f"penstock.{name}") for name in ("client", "gateway")]
    before = [(log.level, log.handlers[:], log.propagate) for log in found]
    yield
    for log, (level, handlers, propagate) in zip(found, before, strict=True):
        log.setLevel(level)
        log.handlers[:], log.propagate = handlers, propagate


INPUTS: dict[type[Target], int] = {
    Codec: 4000,
    Zmtp: 2000,
    Control: 2000,
    Files: 500,
    Broker: 2000,
    Worker: 1000,
    CallerCore: 2000,
    HttpTarget: 1000,
}


class Planted(Target):
    """Numbers, of which one is slow, and one less is held behind each phase if ``grows``."""

    name = "planted"
    phase = 10
    phases = 8
    grows = 0
    slow = -1

    def make(self, random: Random) -> Any:
        return random.randrange(1000)

    def feed(self, each: Any) -> bool:
        if each == self.slow:
            until = time.thread_time() + 1.2 * fuzzrun.SLOW_S
            while time.thread_time() < until:
                pass
        return bool(each % 2)

    def settle(self) -> int:
        self.held = getattr(self, "held", 0) + self.grows
        return self.held


def brittle(head: bytes, frames: Any, kinds: Any) -> Any:
    """A decoder with a defect."""
    if b"caller01" in head:
        raise ValueError("it is caller 1")
    return unpack(head, frames, kinds)


@pytest.mark.parametrize("target", INPUTS, ids=lambda each: each.name)
def test_each_target_takes_what_comes(target: type[Target]) -> None:
    tally = fuzzrun.run(target, 1, INPUTS[target])
    assert [str(finding) for finding in tally.findings] == []
    assert tally.inputs == INPUTS[target]
    assert 0 < tally.understood < tally.inputs, "some are understood, and some are refused"


@pytest.mark.parametrize("target", INPUTS, ids=lambda each: each.name)
def test_inputs_follow_from_the_seed(target: type[Target]) -> None:
    count = INPUTS[target] // 8
    first, again, other = (fuzzrun.run(target, seed, count, digest=True) for seed in (5, 5, 6))
    assert (first.digest, first.understood) == (again.digest, again.understood)
    assert first.digest != other.digest


def test_shares_are_of_all_inputs() -> None:
    assert sum(target.share for target in fuzz.TARGETS.values()) == pytest.approx(1.0)
    assert set(fuzz.TARGETS.values()) == set(INPUTS)


# --- what is wrong is found ---


def test_a_defect_is_found_made_smaller_and_fed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(fuzzwire, "unpack", brittle)
        finding, *_ = fuzzrun.run(Codec, 1, 1000).findings
        assert finding.what == "ValueError: it is caller 1"
        assert "b'caller01'" in finding.each, "all else has been left out"
        assert f"--target codec --seed 1 --replay {finding.number}" in str(finding)
        again = fuzzrun.replay(Codec, 1, finding.number)
        assert again is not None
        assert (again.number, again.what, again.each) == (finding.number, finding.what, finding.each)
    assert fuzzrun.replay(Codec, 1, finding.number) is None


def test_a_defect_of_a_core_is_found_in_the_state_that_led_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Core._worker_gone

    def leaves_it(self: Core, worker: Any, *how: Any) -> None:
        held = dict(worker.held)
        original(self, worker, *how)
        self.ledger.requests += bool(held)

    monkeypatch.setattr(Core, "_worker_gone", leaves_it)
    finding, *_ = fuzzrun.run(Broker, 1, 4000).findings
    assert finding.what.startswith("AssertionError")
    again = fuzzrun.replay(Broker, 1, finding.number)
    assert again is not None
    assert (again.number, again.what) == (finding.number, finding.what)


def test_what_the_gateway_answers_with_500_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(inference._integer.__globals__, "MAX_PRIORITY")
    finding, *_ = fuzzrun.run(HttpTarget, 1, 1000).findings
    assert finding.what.startswith("NameError")


def test_an_input_that_takes_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Random("1 planted 0")
    values = [numbers.randrange(1000) for _ in range(20)]
    monkeypatch.setattr(Planted, "slow", values[12])
    [finding] = fuzzrun.run(Planted, 1, 20).findings
    assert (finding.number, finding.each) == (12, str(values[12]))
    assert finding.what.startswith("it took 1")


def test_growth_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzzrun.run(Planted, 1, 80).findings == []
    monkeypatch.setattr(Planted, "grows", 100)
    [finding] = fuzzrun.run(Planted, 1, 80).findings
    assert finding.what == "750 elements are held where 350 were"


def test_what_was_found_keeps_nothing_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Target]] = []

    def make() -> Target:
        target = Planted()
        made.append(weakref.ref(target))
        return target

    monkeypatch.setattr(Planted, "check", lambda self: 1 / 0)
    tally = fuzzrun.run(make, 1, 100)
    gc.collect()
    assert tally.findings
    assert [target() for target in made] == [None] * len(made)


def test_a_payload_of_nobody_is_not_made() -> None:
    tree = [0, 0, 0, [[1 << 60, 0, 0, 0, [], []]], b""]
    assert fuzzmutate._fit(tree, []) == []


def test_memory_that_comes_back_is_no_growth() -> None:
    tally = fuzzrun.Tally("x", rss=[5, 90, 5, 5, 90, 6, 6, 90, 6])
    assert tally.growth == 1


def test_what_fails_is_made_as_small_as_it_can_be() -> None:
    assert fuzzrun.shrink(b"0123456789", lambda data: b"3" in data and b"7" in data) == b"37"
    assert fuzzrun.shrink(b"0123456789", lambda data: False) == b"0123456789"


@pytest.mark.parametrize(
    "written",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nmore",
        b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_answers_that_are_not_http_are_found(written: bytes) -> None:
    with pytest.raises(AssertionError):
        list(statuses(written, False))


def test_answers_are_read_one_behind_the_other() -> None:
    error = b'{"error":"it"}'
    refused = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(error)
    answered = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    assert list(statuses(answered + refused + error + refused + answered, True)) == [200, 404, 404, 200]
    assert list(statuses(answered + refused, False, whole=False)) == [200]


def test_what_has_been_changed_fits_its_payloads_again() -> None:
    random = Random(1)
    examples = Examples(random)
    message = examples.carry(Submit, [examples.requests(1)])
    tree = fuzzmutate.tree_of(message)
    tree[3][0][0][5] = 24
    frames = fuzzmutate._fit(tree, [])
    assert tree[-1] == bytes(24 * len(message.groups[0].ids))
    assert frames == []
    [group] = message.groups
    tree[3][0][0][5] = INLINE_MAX_BYTES + 1
    assert fuzzmutate._fit(tree, []) == [bytes(INLINE_MAX_BYTES + 1)] * len(group.ids)
    assert tree[-1] == b""


# --- the program ---


def test_results_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "fuzz.txt"
    assert fuzz.main(["--inputs=40", "--target=control", "--processes=1", f"--results={results}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "in process, seed 1: 40 inputs"
    assert lines[-1].startswith("| control | 40 | ")
    assert results.read_text().splitlines() == lines
    assert fuzz.main(["--target=control", "--replay=7"]) == 0
    assert capsys.readouterr().out == "nothing is wrong with it\n"


def test_a_real_server_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzlive, "_QUIET_S", 1.2)
    outcome = fuzzlive.run(1, 300)
    assert outcome.findings == []
    assert outcome.lines[0].startswith("live, seed 1: 300 inputs in ")


def test_a_checker_tells_what_is_wrong() -> None:
    with fuzzlive.Check("x", lambda x: x) as check:
        wait_for(lambda: check.answers >= 3, "answers to be checked")
    assert check.wrong[0][1] == "x, answer 1: another result"  # of zeros it is right


def test_a_machine_that_stood_still_explains_what_went_wrong_then() -> None:
    pauses = fuzzlive.Pauses()
    pauses.seen.append((100.0, 30.0))
    assert [at for at in (69.0, 71.0, 100.0, 119.0, 121.0) if pauses.explain(at)] == [71.0, 100.0, 119.0]


def test_what_has_become_of_processes_is_told() -> None:
    before = fuzzlive.State({1: 0, 2: 0}, {1: 5, 2: 5})
    after = fuzzlive.State({1: 50 << 20, 2: 0}, {1: 5, 2: 6})
    assert list(fuzzlive._changes({1, 2}, {1, 2}, before, after)) == [
        "process 1 grew by 52.4 MB",
        "process 2 has 6 descriptors open, and had 5",
    ]
    [ended] = fuzzlive._changes({1, 2}, {1, 3}, before, fuzzlive.State({1: 0}, {1: 5}))
    assert ended == "processes have ended or begun: [1, 2] were there, and now [1, 3]"
