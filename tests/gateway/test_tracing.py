"""When the parts of a request were."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.tracing import divide

US = st.integers(0, 10_000_000)


def test_the_way_there_takes_as_long_as_the_way_back() -> None:
    parts = divide(1_000_000, 2_000_000, queue_us=300, compute_us=500, model_us=400)
    assert parts.queue == (1_100_000, 1_400_000)
    assert parts.batch == (1_400_000, 1_900_000)
    assert parts.model == (1_450_000, 1_850_000)


@given(start=st.integers(0, 1 << 62), whole=st.integers(-1000, 10_000_000_000), queue=US, compute=US, model=US)
def test_parts_lie_inside_one_another_whatever_clocks_say(
    start: int, whole: int, queue: int, compute: int, model: int
) -> None:
    parts = divide(start, start + whole, queue, compute, model)
    end = start + max(0, whole)
    assert start <= parts.queue[0] <= parts.queue[1] == parts.batch[0] <= parts.batch[1] <= end
    assert parts.batch[0] <= parts.model[0] <= parts.model[1] <= parts.batch[1]
    for (begin, until), took in ((parts.queue, queue), (parts.batch, compute), (parts.model, model)):
        assert until - begin <= 1000 * took


def test_a_collector_that_does_not_answer_does_not_keep_a_gateway_from_ending() -> None:
    code = """if True:
        from penstock.gateway.reader import Head
        from penstock.gateway.tracing import Tracing

        tracing = Tracing("gateway")
        for _ in range(2000):  # in several exports, each of which would wait for its answer
            tracing.ended(Head(b"POST", b"/", {}, 0, True, False), ("m", "1"), 0.1, 200, "")
        tracing.close()
    """
    with socket.create_server(("127.0.0.1", 0)) as collector:
        endpoint = f"http://127.0.0.1:{collector.getsockname()[1]}"
        environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=30)
