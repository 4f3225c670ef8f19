"""Conversations with the caller core, and real processes for the sockets around it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from penstock.client import Client
from penstock.client.caller import Caller, Identity
from penstock.client.events import Command, Complete, Event, Fail, FromWorker
from penstock.wire.codec import ids_in, pack, pack_failure, unpack
from penstock.wire.errors import PenstockError
from penstock.wire.events import BrokerLost, FromBroker, Tick
from penstock.wire.messages import (
    COMPLETE,
    FAILED,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    TO_CALLER,
    Answers,
    Batch,
    Beat,
    Failure,
    Form,
    Message,
    Models,
    Refusal,
    Refusals,
    Results,
    Submit,
    Welcome,
)
from penstock.wire.models import READY, ModelSpec, ModelState, TensorSpec

if TYPE_CHECKING:
    from tests.client.serving import Server

WORKER = b"a worker"
BATCH = Batch(serial=5, rows=3, reason="idle", compute_us=700, model_us=600)


class End:
    """A sink that notes what reached it."""

    def __init__(self) -> None:
        self.answers: list[Complete] = []
        self.errors: list[PenstockError] = []

    def complete(self, answer: Complete, /) -> None:
        self.answers.append(answer)

    def fail(self, error: PenstockError, /) -> None:
        self.errors.append(error)

    @property
    def calls(self) -> int:
        return len(self.answers) + len(self.errors)

    @property
    def payload(self) -> bytes:
        """Of the one answer that came."""
        assert not self.errors, self.errors
        [answer] = self.answers
        return bytes(answer.payload)

    @property
    def error(self) -> PenstockError:
        """The one that came."""
        assert not self.answers
        [error] = self.errors
        return error


class Conversation:
    """A caller, what the others say to it, and a clock that stands still between two words.

    Commands for sinks are performed, the others are returned. ``now``: seconds. ``sent``: all that was ever flushed.
    """

    def __init__(self, calls_max: int = 65_536, local: bool = True, name: str = "") -> None:
        self.caller = Caller(Identity(b"caller 1", name, 77, local, "/run/penstock", calls_max))
        self.now = 1000.0
        self.sent: list[Submit] = []

    def hear(self, event: Event) -> list[Command]:
        commands = self.caller.handle(event, self.now)
        self.caller.validate()
        for command in commands:
            match command:
                case Complete(sink=sink):
                    sink.complete(command)
                case Fail(sink, error):
                    sink.fail(error)
        return [command for command in commands if not isinstance(command, (Complete, Fail))]

    def join(self, epoch: int = 9) -> None:
        self.broker(Welcome(epoch, "caller"))

    def broker(self, message: Message) -> list[Command]:
        """The broker says something, over the wire."""
        return self.hear(FromBroker(unpack(pack(message), (), TO_CALLER)))

    def serve(self, *models: ModelState) -> None:
        self.broker(Models(self.caller.membership.epoch, models))

    def refuse(self, *ids: int, code: str = "overloaded", sentence: str = "full", after_ms: int = 0) -> None:
        refusals = [Refusal(number, code, sentence, after_ms) for number in ids]
        self.broker(Refusals(self.caller.membership.epoch, refusals))

    def lose(self) -> list[Command]:
        return self.hear(BrokerLost("the broker's process ended"))

    def publish(self, *groups: tuple[Answers, Sequence[bytes]]) -> list[Command]:
        """A worker publishes answers with their payloads, over the wire."""
        blob = b"".join(part for answers, parts in groups if answers.nbytes <= INLINE_MAX_BYTES for part in parts)
        frames = [part for answers, parts in groups if answers.nbytes > INLINE_MAX_BYTES for part in parts]
        message = Results(3, [answers for answers, _ in groups], WORKER, BATCH, blob=blob, frames=frames)
        result = unpack(pack(message), frames, ON_PUBLICATION)
        assert isinstance(result, Results)
        return self.hear(FromWorker(result))

    def answer(self, *ids: int, status: int = COMPLETE, body: bytes = b"outcome") -> list[Command]:
        """Answers whose payloads are b"<id>", four bytes wide."""
        answers = Answers(status, 4, body, 1500, ids)
        return self.publish((answers, [b"%4d" % number for number in ids]))

    def answer_failed(self, *ids: int, code: str, sentence: str, after_ms: int = 0) -> list[Command]:
        body = pack_failure(Failure(code, sentence, after_ms))
        return self.publish((Answers(FAILED, 0, body, 0, ids), [b""] * len(ids)))

    def submit(self, form: Form, payload: bytes = b"12345678", timeout_s: float = 10.0) -> tuple[int, End]:
        """The id of a new request, and its end."""
        end = End()
        return self.caller.submit(form, payload, timeout_s, end, self.now), end

    def flush(self) -> list[Submit]:
        messages = self.caller.flush(self.now)
        self.caller.validate()
        self.sent += messages
        return messages

    def send(self, form: Form, count: int = 1, timeout_s: float = 10.0) -> list[End]:
        """The ends of requests that the broker has been told of."""
        ends = [self.submit(form, timeout_s=timeout_s)[1] for _ in range(count)]
        self.flush()
        return ends

    def acknowledged(self) -> list[int]:
        """The ids that the next messages acknowledge."""
        known = dict.fromkeys(range(self.caller._last_id + 100))
        return [number for message in self.flush() for number in sorted(ids_in(message.acks, known))]

    def live(self, seconds: int) -> list[Command]:
        """As ``pass_time``, with a broker that beats."""
        commands = list[Command]()
        for _ in range(seconds):
            self.broker(Beat(self.caller.membership.epoch))
            commands += self.pass_time(1.0)
        return commands

    def pass_time(self, seconds: float) -> list[Command]:
        """Let time pass as a shell does: a Tick whenever one is due. What followed."""
        until, commands = self.now + seconds, list[Command]()
        for _ in range(100_000):
            if self.caller.due() > until:
                break
            self.now = max(self.now, self.caller.due())
            commands += self.hear(Tick())
            if self.caller.wants_flush(self.now):
                self.flush()
        else:
            raise AssertionError("the caller is always due")
        self.now = until
        return commands


def make_form(model: str = "digits", nbytes: int = 8) -> Form:
    return Form(model, "1", 0, "", 1, nbytes, b"", b"layout")


def make_state(name: str = "digits", version: str = "1", state: str = READY, known: bool = True) -> ModelState:
    spec = ModelSpec(
        name,
        version,
        "onnxruntime_onnx",
        (TensorSpec("image", "FP32", (-1, 1, 8, 8)),),
        (TensorSpec("scores", "FP32", (-1, 10)),),
        True,
        32,
    )
    return ModelState(name, version, state, "" if state == READY else "it is a test", spec if known else None)


@pytest.fixture
def conversation() -> Conversation:
    """With a caller that no broker has welcomed."""
    return Conversation()


@pytest.fixture
def joined() -> Conversation:
    """With a caller that the broker of epoch 9 has welcomed."""
    conversation = Conversation()
    conversation.join()
    return conversation


@pytest.fixture
def new_conversation() -> Callable[..., Conversation]:
    return Conversation


@pytest.fixture
def end() -> Callable[[], End]:
    return End


@pytest.fixture
def form() -> Callable[..., Form]:
    """``form(model, nbytes)``"""
    return make_form


@pytest.fixture
def state() -> Callable[..., ModelState]:
    """``state(name, version, state, known)``"""
    return make_state


@pytest.fixture(scope="session")
def serving() -> Any:
    """tests/client/serving.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("serving", Path(__file__).with_name("serving.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository, see ``serving.make_repository``."""
    path: Path = serving.make_repository(tmp_path_factory.mktemp("models"))
    return path


@pytest.fixture(scope="session")
def server(serving: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A broker and a worker with these models, for all tests that do them no harm; they listen on TCP too."""
    with serving.Server(tmp_path_factory.mktemp("server")) as running:
        running.start("broker", "--bind=tcp://127.0.0.1:0", "--log-format=json")
        running.start("worker", str(models), "--bind=tcp://127.0.0.1:0")
        running.wait()
        yield running


@pytest.fixture(params=["shared", "sent"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    """With large tensors in shared memory, and as on another host: all over TCP."""
    with Client(server.runtime if request.param == "shared" else server.tcp, timeout=20.0) as client:
        yield client
