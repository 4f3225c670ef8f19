"""Sequences over HTTP and with the client library: all of one on one worker, until it ends or its worker does."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from penstock.client import Client, PenstockError
from tests.system.models import dense, write
from tests.system.servers import Server, StartServer, wait_for

ROW = np.ones((1, 4), np.float32)


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Server:
    write(tmp_path / "models", "dense", dense())
    (tmp_path / "models" / "dense" / "model.toml").write_text('max_sequence_idle = "120s"\n')
    return start_server(str(tmp_path / "models"), "--workers=3")


def workers(server: Server) -> dict[str, int]:
    """Process ids by name, of those that have joined last."""
    return {each["worker"]: each["pid"] for each in server.log() if each["event"] == "joined the broker"}


def test_over_http(server: Server) -> None:
    with triton.InferenceServerClient(f"{server.host}:{server.port}", concurrency=4) as client:
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(ROW)

        def where(sequence: int | str, start: bool = False, end: bool = False) -> str:
            asked: dict[str, Any] = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
            told = client.infer("dense", [given], parameters={"explain": True}, **asked).get_response()["parameters"]
            return str(told["worker"])

        begun = {sequence: where(sequence, start=True) for sequence in range(1, 13)}
        for _ in range(10):
            assert {sequence: where(sequence) for sequence in begun} == begun
        assert len(set(begun.values())) > 1
        assert where(1, end=True) == begun[1]
        with pytest.raises(InferenceServerException, match="sequence 1 to model 'dense' must specify the START flag"):
            where(1)
        with pytest.raises(InferenceServerException, match="sequence s to model 'dense' must specify the START flag"):
            where("s")

        killed, pid = next((name, pid) for name, pid in workers(server).items() if name in begun.values())
        lost = [sequence for sequence, name in begun.items() if name == killed and sequence > 1]
        kept = [sequence for sequence, name in begun.items() if name != killed and sequence > 1]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: killed not in workers(server) or workers(server)[killed] != pid, "the worker to be missed")
        for sequence in kept:
            assert where(sequence) == begun[sequence]
        for sequence in lost:
            with pytest.raises(InferenceServerException, match="must specify the START flag"):
                where(sequence)
            where(sequence, start=True)


def test_those_of_a_sequence_do_not_overtake_each_other(server: Server) -> None:
    with Client(server.runtime) as client:
        ended: list[int] = []
        lock = threading.Lock()

        def note(number: int, call: object) -> None:
            with lock:
                ended.append(number)

        calls = []
        for number in range(200):
            call = client.submit(
                "dense", {"x": ROW}, sequence="a", sequence_start=not number, sequence_end=number == 199
            )
            call.add_done_callback(partial(note, number))
            calls.append(call)
        workers = {call.result(30).timing.worker for call in calls}
        assert len(workers) == 1
        wait_for(lambda: len(ended) == 200, "all to be noted")
        assert ended == sorted(ended)
        with pytest.raises(PenstockError, match="must specify the START flag"):
            client.infer("dense", {"x": ROW}, sequence="a")
        assert client.infer("dense", {"x": ROW}, sequence="a", sequence_start=True)["y"].shape == (1, 3)
        with pytest.raises(PenstockError, match="'sequence_id' is"):
            client.infer("dense", {"x": ROW}, sequence=-1)
