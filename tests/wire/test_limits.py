"""No wait without a limit, and no queue or cache without a bound, but for those that are named here with their reason.

What this cannot see: locks that are taken by ``with`` (each is held for a few lines that do not wait), a limit that is
None, containers that are lists, dictionaries, sets and deques. ``except Exception: pass`` is for ruff (S110, BLE).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

# Those of threads, processes, locks, queues, futures, events and contexts, which wait for ever without an argument.
WAITS: Final = frozenset({"wait", "join", "get", "acquire", "result", "exception", "communicate", "poll", "term"})
# Functions, and the argument without which they wait for ever.
LIMITED: Final = {
    **dict.fromkeys(
        ("subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output"), "timeout"
    ),
    **dict.fromkeys(("http.client.HTTPConnection", "http.client.HTTPSConnection"), "timeout"),
    **dict.fromkeys(("urllib.request.urlopen", "urlopen", "socket.create_connection", "asyncio.wait"), "timeout"),
}

WITHOUT_LIMIT: Final = {
    "bin/launcher.py: child.process.wait()": "its pidfd has said that it has ended",
    "bin/logs.py: self.acquire()": "whoever has it writes one line, which has a limit",
    "bin/top.py: select.select([hearing.woken.fileno(), *keys], [], [])": "until the user presses a key",
    "client/talk.py: waiter.wake.acquire()": "nobody else knows this lock yet",
    "wire/slots.py: self._lock.acquire()": "whoever has it takes or gives one slot, and wakes nobody meanwhile",
    "gateway/application.py: done.result()": "it has ended",
    "gateway/aside.py: done.exception()": "it has ended",
    "gateway/clerks.py: written.exception()": "it has ended",
    "gateway/clerks.py: written.result()": "it has ended",
    "gateway/large.py: done.exception()": "it has ended",
    "gateway/openapi.py: done.result()": "it has ended",
    "gateway/cachestore.py: self._ready.wait()": "its thread waits for work, or for the word to end",
    "gateway/cachestores.py: opening.result()": "it has ended",
    "gateway/repository.py: done.result()": "it has ended",
    "gateway/sharedmemory.py: done.result()": "it has ended",
    "gateway/application.py: future.exception()": "it has ended",
    "gateway/jobs.py: done.result()": "it has ended",
    "gateway/jobwaits.py: done.result()": "it has ended",
    "gateway/runner.py: task.exception()": "it has ended",
    "gateway/application.py: done.exception()": "it has ended",
    "gateway/process.py: event.wait()": "it is given to what has a limit",
    "gateway/waits.py: event.wait()": "it is given to what has a limit",
    "client/jobs.py: ended.get()": "it is given to asyncio.wait_for",
    "gateway/process.py: stopped.wait()": "a gateway serves until a signal comes",
    "load/http.py: self._ended.wait()": "every request and every connection has its time",
    "load/library.py: ended.get()": "every request has its time",
    "load/library.py: future.exception()": "it has ended",
    "worker/instances.py: todo.get()": "a compute thread waits for work, or for the word to end",
    "worker/ondevice.py: self._copies.wait()": "the batch that it is part of has max_compute",
    "worker/trial.py: tried.wait()": "a timer kills it",
}
WITHOUT_BOUND: Final = {
    "load/library.py: queue.SimpleQueue()": "as many as are under way",
    "load/run.py: queue.SimpleQueue()": "a line a second of each generator, for as long as is measured",
    "worker/cuda.py: cache()": "it takes no argument",
    "worker/textformat.py: functools.cache()": "its schemas are two",
    "worker/instances.py: SimpleQueue()": "the core gives batches to idle instances alone",
}


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """In the files that are installed: which file it is in, what is called, and the call. A decorator is one, too."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                some = [node] if isinstance(node, ast.Call) else []
                if isinstance(node, ast.FunctionDef):
                    some = [ast.Call(each, [], []) for each in node.decorator_list if not isinstance(each, ast.Call)]
                found += [(str(path.relative_to(ROOT)), ast.unparse(call.func), call) for call in some]
    return found


def has_no_limit(name: str, call: ast.Call) -> bool:
    given = {each.arg for each in call.keywords}
    if name in LIMITED:
        return LIMITED[name] not in given
    if name == "select.select":
        return len(call.args) < 4
    if name == "fcntl.flock":
        return "LOCK_NB" not in ast.unparse(call)
    method = name.rpartition(".")[2]
    return method in WAITS and method != name != "select.poll" and not (call.args or given)


def has_no_bound(name: str, call: ast.Call) -> bool:
    what = name.rpartition(".")[2]
    if what == "lru_cache":
        return "maxsize=None" in ast.unparse(call)
    return what == "cache" or (what.endswith("Queue") and not (call.args or call.keywords))


def named(which: Callable[[str, ast.Call], bool]) -> set[str]:
    return {f"{file}: {ast.unparse(call)}" for file, name, call in calls() if which(name, call)}


def test_every_wait_has_a_limit_or_a_reason() -> None:
    found = named(has_no_limit)
    assert found - WITHOUT_LIMIT.keys() == set(), "give them a limit, or say here why they need none"
    assert WITHOUT_LIMIT.keys() - found == set(), "they are no more"


def test_every_queue_and_cache_has_a_bound_or_a_reason() -> None:
    found = named(has_no_bound)
    assert found - WITHOUT_BOUND.keys() == set(), "give them a bound, or say here what it is"
    assert WITHOUT_BOUND.keys() - found == set(), "they are no more"


def test_nobody_suppresses_whatever_happens() -> None:
    given = [(file, ast.unparse(call)) for file, name, call in calls() if name.endswith("suppress")]
    assert given, "contextlib.suppress is used"
    assert [each for each in given if {"Exception", "BaseException"} & set(re.findall(r"\w+", each[1]))] == []
