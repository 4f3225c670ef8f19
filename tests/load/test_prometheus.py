"""What metrics tell, from a server of ours, from Triton, and from one that has none."""

from __future__ import annotations

from penstock.load.prometheus import Reading, mean_batch, read_metrics

OURS = """# HELP penstock_process_cpu_seconds_total Processor time
# TYPE penstock_process_cpu_seconds_total counter
penstock_process_cpu_seconds_total{process="broker"} 1.5
penstock_process_cpu_seconds_total{process="worker-ab"} 2.5e+00
nv_inference_count{model="a",version="1"} 10.0
nv_inference_count{model="a",version="2"} 20.0
nv_inference_count{model="ab",version="1"} 7000.0
nv_inference_exec_count{model="a",version="1"} 5.0
nv_inference_exec_count{model="a",version="2"} 5.0
"""
TRITON = 'nv_inference_count{model="a\\"b",version="1"} 8\nnv_inference_exec_count{model="a\\"b",version="1"} 2 1712\n'


def test_processor_time_and_batches_of_the_model_are_read() -> None:
    reading = read_metrics(OURS, "a")
    assert reading == Reading({'process="broker"': 1.5, 'process="worker-ab"': 2.5}, 30.0, 10.0)
    assert read_metrics(TRITON, 'a"b') == Reading({}, 8.0, 2.0)
    assert read_metrics(OURS, "b") == Reading({'process="broker"': 1.5, 'process="worker-ab"': 2.5}, None, None)
    assert read_metrics("<html>", "a") == Reading({}, None, None)


def test_the_mean_batch_is_of_what_ran_in_between() -> None:
    before, after = Reading({}, 30.0, 10.0), Reading({}, 50.0, 15.0)
    assert mean_batch(before, after) == 4.0
    assert mean_batch(before, before) is None
    assert mean_batch(Reading({}, None, None), after) == 50 / 15
    assert mean_batch(before, Reading({}, None, None)) is None
