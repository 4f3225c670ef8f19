"""The one arena that all models of a process run in. It is the process's, so each test has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from penstock.worker import memory
from penstock.worker.memory import GiveBackRule

MIB = 1 << 20
WIDTH = 1 << 18  # floats of what the model makes of each of its rows on the way: 1 MiB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, 1] -> y [N, 1] by way of [N, WIDTH]; with as much of weights."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["wide"]),
        helper.make_node("Sin", ["wide"], ["other"]),
        helper.make_node("ReduceMax", ["other"], ["y"], axes=[1]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in "xy"]
    weights = numpy_helper.from_array(np.ones((1, WIDTH), np.float32), "w")
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], [weights])
    path = tmp_path_factory.mktemp("models") / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def tell(model: Path, script: str) -> Any:
    """What a script says that has loaded the model twice, as ``one`` and ``other``, in an arena of 64 MiB."""
    start = f"""
        import json, sys
        from pathlib import Path
        import numpy as np
        from penstock.worker import memory
        from penstock.worker.config import ModelConfig
        from penstock.worker.model import RUN_ERRORS, brief, load
        assert memory.share_arena(64 << 20) == 64 << 20
        one, other = (load(Path({str(model)!r}), name, "1", ModelConfig()) for name in ("one", "other"))
        def run(model, rows):
            return model.run([np.ones((rows, 1), np.float32)])[0]
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(script)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=100).stdout)


def test_models_share_what_they_run_in_and_it_is_given_back(model: Path) -> None:
    told = tell(
        model,
        """
        told = [memory.heap_bytes()]
        for each in one, other:
            run(each, 16)
            told.append(memory.heap_bytes())
        memory.give_back()
        told.append(memory.heap_bytes())
        run(other, 16)
        print(json.dumps(told))
        """,
    )
    loaded, first, second, given_back = told
    assert first - loaded > 16 * MIB
    assert second - first < MIB
    assert given_back - loaded < MIB


def test_a_run_that_takes_more_than_the_limit_fails_and_says_what_to_change(model: Path) -> None:
    told, sums = tell(
        model,
        """
        told = []
        for rows in 16, 400:
            try:
                run(one, rows)
                told.append("")
            except RUN_ERRORS as error:
                told.append(brief(error))
        print(json.dumps([told, float(run(one, 16).sum())]))
        """,
    )
    assert told[0] == ""
    assert "raise [worker] run_bytes_max, or lower the model's max_batch_size" in told[1]
    assert "onnxruntime_src" not in told[1]
    assert sums == pytest.approx(16 * np.sin(1.0))


def test_a_want_of_memory_that_passes_does_not_cost_the_model_its_binding(model: Path) -> None:
    staged, bound, sums = tell(
        model,
        """
        assert one.stage()
        try:
            run(one, 400)
        except RUN_ERRORS as error:
            want = error
        def fail(rows, feeds):
            raise want
        with one.staging() as staging:
            bound = staging.run
            staging.run = fail
            sums = float(one.run_in(staging, 2, [np.ones((2, 1), np.float32)])[0].sum())
            staging.run = bound
        with one.staging() as staging:
            staged = staging is not None
        print(json.dumps([staged, bool(one.foresee([np.ones((2, 1), np.float32)], [0]).nbytes), sums]))
        """,
    )
    assert (staged, bound) == (True, True)
    assert sums == pytest.approx(2 * np.sin(1.0))


def test_it_is_given_back_while_models_run(model: Path) -> None:
    wrong = tell(
        model,
        """
        import threading
        wrong, over = [], threading.Event()
        expected = run(one, 4)
        def work(each):
            while not over.is_set():
                if not np.array_equal(run(each, 4), expected):
                    wrong.append(each)
        threads = [threading.Thread(target=work, args=(each,)) for each in (one, other)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            memory.give_back()
        over.set()
        for thread in threads:
            thread.join()
        print(len(wrong))
        """,
    )
    assert wrong == 0


def test_what_is_run_to_give_back_is_an_identity() -> None:
    model = onnx.load_from_string(memory._IDENTITY)
    onnx.checker.check_model(model)
    assert [each.op_type for each in model.graph.node] == ["Identity"]


# --- when ---


def test_nothing_is_given_back_when_nothing_has_run() -> None:
    rule = GiveBackRule()
    assert not any(rule.due(0, now) for now in range(200))


def test_it_is_given_back_once_after_ten_seconds_without_a_batch() -> None:
    rule = GiveBackRule()
    assert [now for now in range(100) if rule.due(3, float(now))] == [10]
    assert [now for now in range(100, 200) if rule.due(4, float(now))] == [110]


def test_it_is_given_back_every_minute_while_batches_run() -> None:
    rule = GiveBackRule()
    assert [now for now in range(200) if rule.due(now + 1, float(now))] == [60, 121, 182]


@given(batches=st.lists(st.integers(0, 3), max_size=300))
def test_whatever_has_run_is_given_back_within_a_minute(batches: list[int]) -> None:
    rule = GiveBackRule()
    ran, waiting = 0, 0
    for now, more in enumerate(batches):
        ran += more
        waiting = 0 if rule.due(ran, float(now)) else waiting + (ran > 0)
        assert waiting <= 61 or ran == rule._given
