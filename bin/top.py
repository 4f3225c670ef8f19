"""``penstock top``"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import threading
import tty
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from penstock.bin.listen import Listener, ListenError

if TYPE_CHECKING:
    from penstock.gateway.figures import View

_AGAIN_S: Final = 1.0  # after a gateway was lost
_END_S: Final = 5.0  # for the listening thread to end
_HISTORY: Final = 300  # views
_QUIT: Final = b"qQ"


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Any gateway of the server.")
@click.option("--once", is_flag=True, help="Print one view and end.")
def top(url: str, once: bool) -> None:
    """Show the server live: models, processes, queues, batches and latencies. q or Ctrl-C ends."""
    try:
        listener = Listener(url)
    except ListenError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None
    if once:
        _print_once(listener)
    elif not sys.stdout.isatty():
        raise click.UsageError("standard output is no terminal; --once prints one view")
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(listener)


def _print_once(listener: Listener) -> None:
    from rich.console import Console

    from penstock.bin.screen import Screen

    try:
        view = next(view for view in listener.views() if view.seconds)
    except ListenError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)
    console = Console(highlight=False)
    console.print(Screen(view, f"{listener.url}, seen by {view.gateway}", whole=True), end="")


class _Hearing:
    """Listens on a thread of its own, again and again. ``heard``: views, and why there are none; a byte comes on
    ``woken`` with each."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._closing = threading.Event()
        self.woken, self.wake = socket.socketpair()
        self.woken.setblocking(False)
        self.wake.setblocking(False)
        self.heard: deque[View | str] = deque(maxlen=_HISTORY)  # while a terminal is stopped, nobody takes them
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                for view in self._listener.views():
                    self._say(view)
            except ListenError as error:
                self._say(str(error))
            self._closing.wait(_AGAIN_S)

    def _say(self, said: View | str) -> None:
        self.heard.append(said)
        self.nudge()

    def nudge(self) -> None:
        with contextlib.suppress(BlockingIOError):  # there is a byte already
            self.wake.send(b".")

    def close(self) -> None:
        self._closing.set()
        self._listener.close()
        self._thread.join(_END_S)
        self.woken.close()
        self.wake.close()


def _watch(listener: Listener) -> None:
    from rich.console import Console
    from rich.live import Live

    from penstock.bin.screen import Screen

    view: View | None = None
    lost = ""
    rates: deque[float] = deque(maxlen=_HISTORY)
    queues: deque[float] = deque(maxlen=_HISTORY)
    hearing = _Hearing(listener)
    before = signal.signal(signal.SIGWINCH, lambda number, frame: hearing.nudge())
    try:
        console = Console(highlight=False)
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                note = listener.url if view is None else f"{listener.url}, seen by {view.gateway}; q ends"
                live.update(Screen(view, note, lost, list(rates), list(queues)), refresh=True)
                ready, _, _ = select.select([hearing.woken.fileno(), *keys], [], [])
                if hearing.woken.fileno() in ready:
                    hearing.woken.recv(4096)
                if any(key in ready for key in keys):
                    pressed = os.read(keys[0], 64)
                    if not pressed or any(key in _QUIT for key in pressed):
                        return
                while hearing.heard:
                    said = hearing.heard.popleft()
                    if isinstance(said, str):
                        lost = said
                        continue
                    view, lost = said, ""
                    if view.seconds:
                        rates.append(view.rate)
                        queues.append(view.queue)
    finally:
        signal.signal(signal.SIGWINCH, before)
        hearing.close()


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input, so that a key is heard when it is pressed and not shown; nothing when it is no terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    fileno = sys.stdin.fileno()
    before = termios.tcgetattr(fileno)
    try:
        tty.setcbreak(fileno)
        yield [fileno]
    finally:
        termios.tcsetattr(fileno, termios.TCSADRAIN, before)
