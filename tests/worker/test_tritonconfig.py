"""Triton's config.pbtxt: what becomes of each thing that it may say."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from penstock.wire.models import ModelSpec, TensorSpec
from penstock.worker.config import FILE_BYTES_MAX, ConfigError, ModelConfig, default_config
from penstock.worker.probe import load_and_probe, unheeded
from penstock.worker.repository import find_models
from penstock.worker.textformat import _classes, find_line
from penstock.worker.tritonconfig import Declared, TritonConfig, contradictions, load_triton, read_triton
from penstock.worker.tritonfields import ACCOUNTED
from penstock.worker.tritonschema import TRITON
from tests.system.models import identity, write

# As users write them: comments, both kinds of quotes, lists with commas and none, colons before braces and none.
RESNET = """
# ResNet-50, from the model zoo
name: "resnet50"
platform: "onnxruntime_onnx"
max_batch_size : 128
input [
  {
    name: "data_0"
    data_type: TYPE_FP32
    format: FORMAT_NCHW
    dims: [ 3, 224, 224 ]   # without the batch
  }
]
output [
  {
    name: 'fc6_1'
    data_type: TYPE_FP32
    dims: [ 1000 ]
    label_filename: "resnet50_labels.txt"
  }
]
instance_group [ { kind: KIND_CPU, count: 3 } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ];
  max_queue_delay_microseconds: 100
}
version_policy: { latest { num_versions: 2 } }
parameters { key: "intra_op_thread_count" value: { string_value: "4" } }
"""
BERT = """
name: "bert"
backend: "onnxruntime"
default_model_filename: "bert.onnx"
max_batch_size: 0
input: { name: "input_ids" data_type: TYPE_INT64 dims: -1 dims: -1 }
input: { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1, -1 ] }
output < name: "logits", data_type: TYPE_FP32, dims: [ -1, 2 ] >
"""


def read(text: str, device: str = "cpu", name: str = "m") -> TritonConfig:
    return read_triton(text, "m/config.pbtxt", name, device)


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        read(text)
    said = str(raised.value)
    assert said.startswith("m/config.pbtxt")
    assert said.isprintable()
    return said.removeprefix("m/config.pbtxt")


def changed(config: ModelConfig, device: str = "cpu") -> dict[str, Any]:
    """What differs from a model of which nothing is said."""
    plain = default_config(device)
    return {key: value for key in config.__struct_fields__ if (value := getattr(config, key)) != getattr(plain, key)}


def one(text: str, device: str = "cpu") -> str:
    """The only sentence, without the words that all have."""
    [sentence] = read(text, device).unheeded
    assert sentence.startswith("config.pbtxt: ")
    assert " is not followed: " in sentence
    assert sentence.isprintable()
    return sentence.removeprefix("config.pbtxt: ")


# --- whole files ---


def test_a_configuration_with_batches() -> None:
    found = read(RESNET, name="resnet50")
    assert changed(found.config) == {
        "max_batch_size": 128,
        "max_queue_delay": "100us",
        "instances": 3,
        "version_policy": {"latest": 2},
        "intra_op_threads": 4,
        "class_labels": {"fc6_1": "resnet50_labels.txt"},
    }
    assert found.file_name == "model.onnx"
    [preferred] = found.unheeded
    assert preferred.startswith(
        "config.pbtxt: dynamic_batching.preferred_batch_size is not followed: a batch is closed"
    )
    assert found.declared == (
        Declared("input[0]", "input", "data_0", "FP32", (-1, 3, 224, 224)),
        Declared("output[0]", "output", "fc6_1", "FP32", (-1, 1000)),
    )


def test_a_configuration_without_batches() -> None:
    found = read(BERT, name="bert")
    assert changed(found.config) == {"max_batch_size": 0}
    assert (found.file_name, found.unheeded) == ("bert.onnx", ())
    assert found.declared[2] == Declared("output[0]", "output", "logits", "FP32", (-1, 2))


@pytest.mark.parametrize("text", ["", "# nothing\n", 'name: "m"', 'backend: "onnxruntime" dynamic_batching { }'])
def test_what_says_nothing_is_a_model_of_which_nothing_is_said(text: str) -> None:
    for device in ("cpu", "cuda:0"):
        assert read(text, device) == TritonConfig(default_config(device))


# --- what is followed ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version_policy { all { } }", {"version_policy": "all"}),
        ("version_policy { latest { } }", {}),
        ("version_policy { specific { versions: [ 3, 5 ] } }", {"version_policy": (3, 5)}),
        ("version_policy: { specific: { versions: 42 } }", {"version_policy": (42,)}),
        ("max_batch_size: 1", {"max_batch_size": 1, "max_queue_delay": "0us"}),
        ("max_batch_size: 8 dynamic_batching { }", {"max_batch_size": 8, "max_queue_delay": "0us"}),
        ("instance_group { count: 2 } instance_group { count: 3 kind: KIND_AUTO }", {"instances": 5}),
        ("instance_group [ { kind: KIND_MODEL }, { kind: KIND_CPU } ]", {"instances": 2}),
        ('parameters: [ { key: "gpu_mem_limit" value { string_value: "4096" } } ]', {"gpu_memory_limit": 4096}),
        (f'parameters {{ key: "gpu_mem_limit" value {{ string_value: "{2**64 - 1}" }} }}', {}),
        ('parameters { key: "cudnn_conv_algo_search" value { string_value: "1" } }', {"cudnn_search": "heuristic"}),
        ('parameters { key: "arena_extend_strategy" value { string_value: "0" } }', {"gpu_arena": "next_power_of_two"}),
        ('parameters { key: "execution_mode" value { string_value: "0" } }', {}),
        ('parameters { key: "inter_op_thread_count" value { string_value: "2" } }', {}),
        ("optimization { cuda { graphs: true } }", {"cuda_graphs": True}),
        ("optimization { graph { level: 1 } input_pinned_memory { enable: true } }", {}),
        ("dynamic_batching { default_queue_policy { allow_timeout_override: true } }", {}),
        ("model_transaction_policy { decoupled: false } response_cache { enable: false }", {}),
        ("response_cache { enable: true }", {"response_cache": True}),
    ],
)
def test_what_is_followed(text: str, expected: dict[str, Any]) -> None:
    found = read(text)
    assert found.unheeded == ()
    assert {**changed(ModelConfig(max_queue_delay="0ms")), **changed(found.config)} == expected


def test_requests_run_alone_where_triton_would_not_fill_in_a_batch_size() -> None:
    inputs, outputs = "input { name: 'x' dims: [ -1 ] }", "output { name: 'y' dims: [ -1 ] }"
    for text in ("", "max_batch_size: 0 "):
        assert read(f"{text}{inputs} {outputs}").config.max_batch_size == 0
        assert read(f"{text}{inputs}").config.max_batch_size is None
        # Nor does it tell then whether its dimensions count the rows.
        assert [each.shape for each in read(f"{text}{inputs}").declared] == [None]


def test_a_preferred_size_that_is_a_full_batch_is_what_happens_anyway() -> None:
    assert read("max_batch_size: 8 dynamic_batching { preferred_batch_size: 8 }").unheeded == ()
    assert "(8 rows)" in one("max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 4, 8 ] }")


def accelerator(text: str) -> str:
    return f"optimization {{ execution_accelerators {{ gpu_execution_accelerator : [ {{ {text} }} ] }} }}"


def test_tensorrt_goes_before_cuda() -> None:
    text = accelerator(
        'name : "tensorrt" parameters { key: "precision_mode" value: "FP16" } '
        'parameters { key: "trt_engine_cache_enable" value: "1" }'
    )
    found = read(text, "cuda:0")
    assert changed(found.config, "cuda:0") == {"providers": ("tensorrt", "cuda", "cpu"), "fp16": True}
    assert found.unheeded == ()


def test_options_of_cuda() -> None:
    text = accelerator(
        'name: "cuda" parameters [ { key: "use_tf32" value: "0" }, { key: "gpu_mem_limit" value: "9" }, '
        '{ key: "enable_cuda_graph" value: "1" }, { key: "cudnn_conv_algo_search" value: "DEFAULT" } ]'
    )
    assert changed(read(text, "cuda:1").config, "cuda:1") == {
        "tf32": False,
        "gpu_memory_limit": 9,
        "cuda_graphs": True,
        "instances": 1,
        "cudnn_search": "default",
    }


def test_instances_are_those_for_the_device() -> None:
    both = "instance_group [ { kind: KIND_CPU count: 2 }, { kind: KIND_GPU count: 3 gpus: [ 0, 1 ] } ]"
    assert read(both, "cuda:1").config.instances == 3
    assert one(both, "cuda:1").startswith("instance_group[0].kind is not followed: a worker on a GPU")
    assert read(both).config.instances == 2
    assert one(both).startswith("instance_group[1].kind is not followed: a worker on the CPU serves the model too")
    assert read("instance_group { kind: KIND_GPU count: 2 }").config.instances == 2


def test_a_model_for_the_cpu_leaves_the_gpu_alone() -> None:
    text = "instance_group { kind: KIND_CPU }"
    assert changed(read(text, "cuda:0").config, "cuda:0") == {"providers": ("cpu",), "instances": 1}
    assert read(text, "cuda:0").unheeded == ()
    both = text + accelerator('name: "tensorrt"')
    assert read(both).config.providers is None
    assert "all instances are of KIND_CPU" in one(both)


def test_other_gpus_than_this() -> None:
    text = "instance_group { gpus: [ 0, 2 ] }"
    assert read(text, "cuda:2").unheeded == ()
    assert one(text, "cuda:1") == (
        "instance_group[0].gpus is not followed: every worker serves every model, so also that on cuda:1; see --device"
    )


@pytest.mark.parametrize(
    "text",
    [
        "optimization { cuda { graphs: true } } instance_group { count: 2 }",
        "optimization { cuda { graphs: true } execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } "
        "} }",
    ],
)
def test_graphs_take_one_instance_and_cuda(text: str) -> None:
    found = read(text, "cuda:0")
    assert not found.config.cuda_graphs
    assert found.unheeded == (
        "config.pbtxt: optimization.cuda.graphs is not followed: CUDA graphs take CUDA's own provider and one "
        "instance; ask for these",
    )


# --- what is said ---


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runtime: 'model.py'", "runtime"),
        ("input { reshape { shape: [ ] } }", "input[0].reshape"),
        ("input [ { }, { is_shape_tensor: true } ]", "input[1].is_shape_tensor"),
        ("input { allow_ragged_batch: true }", "input[0].allow_ragged_batch"),
        ("input { optional: true }", "input[0].optional"),
        ("input { is_non_linear_format_io: true }", "input[0].is_non_linear_format_io"),
        ("output { reshape { shape: [ 1 ] } }", "output[0].reshape"),
        ("output { is_shape_tensor: true }", "output[0].is_shape_tensor"),
        ("output { is_non_linear_format_io: true }", "output[0].is_non_linear_format_io"),
        ("optimization { priority: PRIORITY_MAX }", "optimization.priority"),
        ("optimization { graph { level: -1 } }", "optimization.graph.level"),
        ("optimization { cuda { busy_wait_events: true } }", "optimization.cuda.busy_wait_events"),
        ("optimization { cuda { graph_spec { batch_size: 1 } } }", "optimization.cuda.graph_spec"),
        ("optimization { cuda { output_copy_stream: true } }", "optimization.cuda.output_copy_stream"),
        (
            "optimization { execution_accelerators { cpu_execution_accelerator : [ { name : 'openvino' } ] } }",
            "optimization.execution_accelerators.cpu_execution_accelerator",
        ),
        (
            accelerator("name: 'gpu_io'"),
            "optimization.execution_accelerators.gpu_execution_accelerator[0].name",
        ),
        (
            accelerator("name: 'tensorrt' parameters { key: 'precision_mode' value: 'INT8' }"),
            "optimization.execution_accelerators.gpu_execution_accelerator[0].parameters['precision_mode']",
        ),
        (
            accelerator("name: 'cuda' parameters { key: 'do_copy_in_default_stream' value: '1' }"),
            "optimization.execution_accelerators.gpu_execution_accelerator[0].parameters['do_copy_in_default_stream']",
        ),
        ("optimization { input_pinned_memory { enable: false } }", "optimization.input_pinned_memory.enable"),
        ("optimization { output_pinned_memory { enable: false } }", "optimization.output_pinned_memory.enable"),
        ("optimization { gather_kernel_buffer_threshold: 9 }", "optimization.gather_kernel_buffer_threshold"),
        ("optimization { eager_batching: true }", "optimization.eager_batching"),
        ("dynamic_batching { preserve_ordering: true }", "dynamic_batching.preserve_ordering"),
        ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.priority_levels"),
        ("dynamic_batching { default_priority_level: 1 }", "dynamic_batching.default_priority_level"),
        (
            "dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
            "dynamic_batching.default_queue_policy.timeout_action",
        ),
        (
            "dynamic_batching { default_queue_policy { default_timeout_microseconds: 9 } }",
            "dynamic_batching.default_queue_policy.default_timeout_microseconds",
        ),
        (
            "dynamic_batching { default_queue_policy { max_queue_size: 9 } }",
            "dynamic_batching.default_queue_policy.max_queue_size",
        ),
        (
            "dynamic_batching { priority_queue_policy { key: 1 value: { max_queue_size: 1 } } }",
            "dynamic_batching.priority_queue_policy",
        ),
        ("instance_group { rate_limiter { priority: 2 } }", "instance_group[0].rate_limiter"),
        ("instance_group { secondary_devices { device_id: 1 } }", "instance_group[0].secondary_devices"),
        ("instance_group { profile: '0' }", "instance_group[0].profile"),
        ("instance_group [ { }, { passive: true } ]", "instance_group[1].passive"),
        ("instance_group { host_policy: 'numa0' }", "instance_group[0].host_policy"),
        ("cc_model_filenames { key: '8.0' value: 'a.onnx' }", "cc_model_filenames"),
        ("metric_tags { key: 'a' value: 'b' }", "metric_tags"),
        ("model_warmup [ { name: 'w' batch_size: 1 } ]", "model_warmup"),
        ("model_repository_agents { agents [ { name: 'checksum' } ] }", "model_repository_agents"),
        ("model_metrics { metric_control { histogram_options { buckets: [ 1, 2 ] } } }", "model_metrics"),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: '0' } }",
            "parameters['intra_op_thread_count']",
        ),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: 'x' } }",
            "parameters['intra_op_thread_count']",
        ),
        ("parameters { key: 'execution_mode' value { string_value: '1' } }", "parameters['execution_mode']"),
        ("parameters { key: 'enable_mem_arena' value { string_value: '0' } }", "parameters['enable_mem_arena']"),
        ("parameters { key: 'enable_mem_pattern' value { string_value: '0' } }", "parameters['enable_mem_pattern']"),
        (
            "parameters { key: 'memory.enable_memory_arena_shrinkage' value { string_value: 'cpu:0' } }",
            "parameters['memory.enable_memory_arena_shrinkage']",
        ),
        ("parameters { key: 'tokenizer' value { string_value: 'bert' } }", "parameters['tokenizer']"),
    ],
)
def test_what_is_not_followed_is_a_sentence(text: str, path: str) -> None:
    assert one(text).startswith(f"{path} is not followed: ")


def test_every_field_there_is_has_been_thought_of() -> None:
    missing = []

    def walk(descriptor: Any, path: str) -> None:
        for each in descriptor.fields:
            if f"{path}{each.name}" in ACCOUNTED:
                continue
            if each.message_type is None or each.message_type.GetOptions().map_entry:
                missing.append(f"{path}{each.name}")
            else:
                walk(each.message_type, f"{path}{each.name}.")

    # Read by way of what holds them, whether they are set or not.
    ours = {f"version_policy.{each}" for each in ("latest.num_versions", "specific.versions")}
    walk(_classes(TRITON)["ModelConfig"].DESCRIPTOR, "")
    assert set(missing) - ours == set()


def test_the_schema_is_triton_s() -> None:
    """Held against the generated code of Triton's own client, which is there whether gRPC is installed or not."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def describe(message: Any) -> dict[str, Any]:
        return {
            each.name: (
                each.type,
                each.label if not hasattr(each, "is_repeated") else each.is_repeated,
                each.enum_type and {value.name: value.number for value in each.enum_type.values},
                each.message_type and describe(each.message_type),
                each.containing_oneof and len(each.containing_oneof.fields) > 1,
            )
            for each in message.fields
            if each.name != "histogram_options"  # a choice of one, there
        }

    assert describe(_classes(TRITON)["ModelConfig"].DESCRIPTOR) == describe(module.ModelConfig.DESCRIPTOR)


# --- what nobody can be served ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: 'other'", ":1: name: it is 'other', and the directory's is 'm'; make them the same"),
        (
            "platform: 'tensorrt_plan'",
            ":1: platform: only ONNX models are served ('onnxruntime_onnx'), not 'tensorrt_plan'",
        ),
        ("platform: 'ensemble'", ":1: platform: 'ensemble': there are no ensembles; merge the models into one"),
        (
            "backend: 'python'",
            ":1: backend: only ONNX models are served ('onnxruntime'), not 'python'; export it to ONNX",
        ),
        (
            "sequence_batching { state { input_name: 'x' } }",
            ":1: sequence_batching.state: nothing is kept for the next request",
        ),
        ("ensemble_scheduling { step [ { model_name: 'a' } ] }", ":1: ensemble_scheduling: there are no ensembles"),
        ("batch_input { kind: BATCH_ITEM_SHAPE }", ":1: batch_input: Triton makes these inputs"),
        ("batch_output { target_name: 'a' }", ":1: batch_output: outputs are taken apart by rows"),
        (
            "model_operations { op_library_filename: 'a.so' }",
            ":1: model_operations.op_library_filename: custom operators",
        ),
        (
            "model_transaction_policy { decoupled: true }",
            ":1: model_transaction_policy.decoupled: a request has one answer",
        ),
        ("max_batch_size: -1", ":1: max_batch_size: -1 is not from 0 to 4096"),
        ("max_batch_size: 4097", ":1: max_batch_size: 4097 is not from 0 to 4096; change it, or write a model.toml"),
        (
            "max_batch_size: 2 dynamic_batching { max_queue_delay_microseconds: 60000001 }",
            ":1: dynamic_batching.max_queue_delay_microseconds: 60000001 is not from 0 to 60000000",
        ),
        ("instance_group [ { }, { count: 65 } ]", ":1: instance_group[1].count: 65 is not from 0 to 64"),
        ("instance_group [ { count: 64 }, { } ]", ":1: instance_group.count: 65 is not from 1 to 64"),
        (
            "version_policy { latest { num_versions: 0 } }",
            ":1: version_policy.latest.num_versions: 0 is not from 1 to 64",
        ),
        ("version_policy { specific { } }", ":1: version_policy.specific.versions: name 1 to 64 versions, not 0"),
        ("version_policy { specific { versions: -1 } }", ":1: version_policy.specific.versions: -1 is not from 0"),
        ("default_model_filename: '../x'", ":1: default_model_filename: '../x' is no file in the version's directory"),
        ("default_model_filename: '/x'", ":1: default_model_filename: '/x' is no file in the version's directory"),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: '2000' } }",
            ":1: parameters['intra_op_thread_count']: 2000 is not from 1 to 1024",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(text: str, words: str) -> None:
    assert complaint(text).startswith(words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: 'm'\nmax_batchsize: 8",
            ":2: field 'max_batchsize': unknown in ModelConfig; did you mean 'max_batch_size'?",
        ),
        (
            "dynamic_batching {\n\n  zebra: 8 }",
            ":3: field 'zebra': unknown in ModelDynamicBatching; if it is of a newer Triton, leave it out, or write a "
            "model.toml, which is then read instead",
        ),
        ("input [\n {\n name: 'x'\n", ':3: Expected "}".'),
        ("name: 'm", ':1: name: String missing ending quote: "\'m"'),
        ("max_batch_size: eight", ":1: max_batch_size: Couldn't parse integer: eight"),
        ("max_batch_size: 99999999999", ":1: max_batch_size: Value out of range: 99999999999"),
        ("name: 'a'\nname: 'b'", ':2: Message type "triton.ModelConfig" should not have multiple "name" fields.'),
    ],
)
def test_what_is_not_understood_has_a_line(text: str, said: str) -> None:
    assert complaint(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# backend\n\nbackend: 'py' \"thon\"", ":3: backend: only"),
        ("parameters { key: 'a' value { string_value: '{ \\' #' } }\n\nbackend: 'x'", ":3: backend: only"),
        ("instance_group [\n{ count: 1 },\n{\n count: 65 }\n]", ":4: instance_group[1].count: 65"),
        ("instance_group {\n count: 1 }\ninstance_group <\n count: 65; >", ":4: instance_group[1].count: 65"),
        ("\ninstance_group [ { count: 64 },\n { } ]", ":2: instance_group.count: 65"),
        ("version_policy {\n\n latest:\n{ num_versions: 100 } }", ":4: version_policy.latest.num_versions: 100"),
        ("version_policy {\n specific {\n } }", ":2: version_policy.specific.versions: name 1 to 64"),
        ("version_policy { specific {\n versions: [1,\n -2] } }", ":2: version_policy.specific.versions: -2"),
        ("\nmax_batch_size:\n-1", ":2: max_batch_size: -1 is not"),
        (
            "parameters { key: 'a' }\nparameters { key: 'intra_op_thread_count' value { string_value: '2000' } }",
            ":2: parameters['intra_op_thread_count']: 2000",
        ),
        ("input {\n data_type: TYPE_FOO }", ':2: data_type: Enum type "triton.DataType" has no value named TYPE_FOO.'),
    ],
)
def test_what_cannot_be_followed_has_the_line_of_its_field(text: str, said: str) -> None:
    assert complaint(text).startswith(said)


@given(st.lists(st.sampled_from([*":{}<>[],;-#\n'", '"', "a", "'x'"])).map(" ".join))
def test_any_text_has_a_line_or_none(text: str) -> None:
    """Also what protobuf would not have accepted."""
    assert (find_line(text, "a[1].a['x'].a") or 1) >= 1


def test_one_scheduler_at_most() -> None:
    assert "dynamic_batching" in complaint("dynamic_batching { }\nsequence_batching { }")


def test_long_nonsense_is_cut() -> None:
    assert len(complaint("x" * 100_000)) < 500
    assert len(complaint(f"name: 'm' {'é' * 100_000}: 3")) < 500


# What breaks a parser is rarely letters alone.
WORDS = (
    "name input dims max_batch_size parameters key value version_policy specific latest instance_group count kind "
    "KIND_GPU reshape { } [ ] < > : , ; 'a' '\\xff' '\\ud800' 1 -1 0x7fffffff 1e400 nan true # ' [a.b/c] é \x00 \n"
)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS.split(" ")), max_size=20).map(" ".join)))
def test_any_text_is_a_configuration_or_a_sentence(text: str) -> None:
    for device in ("cpu", "cuda:0"):
        try:
            said = ["m/config.pbtxt", *read(text, device).unheeded]
        except ConfigError as error:
            said = [str(error)]
        assert said[0].startswith("m/config.pbtxt")
        assert all(each.isprintable() for each in said)


# --- files ---


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text("#" * FILE_BYTES_MAX)
    assert load_triton(path, "m") == TritonConfig(ModelConfig())
    path.write_text("#" * (FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError) as raised:
        load_triton(path, "m")
    assert str(raised.value) == f"{path}: it has more than 1048576 bytes, so it is no configuration; replace it"


@pytest.mark.parametrize("content", [b"name: '\xff'", None])
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.pbtxt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_triton(path, "m")
    assert str(raised.value).startswith(f"{path}: ")


def put(root: Path, text: str, *names: str) -> None:
    for name in names:
        (root / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "m" / name).touch()
    (root / "m").mkdir(exist_ok=True)
    (root / "m" / "config.pbtxt").write_text(text)


def test_a_repository_follows_it(tmp_path: Path) -> None:
    text = "default_model_filename: 'net.onnx' version_policy { all { } } metric_tags { key: 'a' value: 'b' }"
    put(tmp_path, text, "1/net.onnx", "2/net.onnx", "3/model.onnx")
    three, two, one = find_models(tmp_path)
    assert three.problem == f"{tmp_path}/m/3/net.onnx does not exist; model.onnx is there: rename it to net.onnx"
    assert [(each.version, each.path, each.problem) for each in (two, one)] == [
        ("2", tmp_path / "m/2/net.onnx", ""),
        ("1", tmp_path / "m/1/net.onnx", ""),
    ]
    assert one.config_name == "config.pbtxt"
    assert one.unheeded[0].startswith("config.pbtxt: metric_tags is not followed: ")


def test_a_model_toml_is_read_instead(tmp_path: Path) -> None:
    put(tmp_path, "this is no configuration", "1/model.onnx")
    (tmp_path / "m" / "model.toml").write_text("instances = 2")
    [file] = find_models(tmp_path)
    assert (file.config, file.config_name, file.problem) == (ModelConfig(instances=2), "model.toml", "")


def test_a_model_may_be_a_directory_with_its_weights_beside_it(tmp_path: Path) -> None:
    put(tmp_path, "", "1/model.onnx/model.onnx", "1/model.onnx/weights")
    [file] = find_models(tmp_path)
    assert (file.path, file.problem) == (tmp_path / "m/1/model.onnx/model.onnx", "")


@pytest.mark.parametrize("names", [("1/model.py",), ()])
def test_what_is_not_served_says_so_with_or_without_versions(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, "backend: 'python'", *names)
    [file] = find_models(tmp_path)
    assert (file.version, file.problem.partition(", ")[0]) == (
        "1",
        f"{tmp_path}/m/config.pbtxt:1: backend: only ONNX models are served ('onnxruntime')",
    )


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    put(tmp_path, "", "1/model.onnx")
    (tmp_path / "m/config.pbtxt").chmod(0)
    [file] = find_models(tmp_path)
    assert "Permission denied" in file.problem


def test_what_is_not_followed_is_said_at_load(tmp_path: Path) -> None:
    path = write(tmp_path, "m", identity(TensorProto.FLOAT, ["N", 2]))
    text = "max_batch_size: 8 metric_tags { key: 'a' value: 'b' } input { name: 'z' } input { name: 'x' dims: [ 2 ] }"
    path.parents[1].joinpath("config.pbtxt").write_text(text)
    [file] = find_models(tmp_path)
    model = load_and_probe(file, warm=False)
    tags, declared = unheeded(file, model)
    assert tags.startswith("config.pbtxt: metric_tags is not followed: ")
    assert declared == "config.pbtxt: input[0]: the model has no input 'z'; the model is followed"
    assert (model.spec.batchable, model.spec.max_batch_size) == (True, 8)


def test_requests_run_alone_where_the_batch_size_is_0(tmp_path: Path) -> None:
    path = write(tmp_path, "m", identity(TensorProto.FLOAT, ["N", 2]))
    text = "input { name: 'x' dims: [ -1, 2 ] } output { name: 'y' dims: [ -1, 2 ] }"
    path.parents[1].joinpath("config.pbtxt").write_text(text)
    [file] = find_models(tmp_path)
    model = load_and_probe(file, warm=False)
    assert (model.spec.batchable, model.why_alone) == (False, "its max_batch_size is 0")
    assert unheeded(file, model) == []


# --- against the model ---

SPEC = ModelSpec(
    "m",
    "1",
    "onnxruntime_onnx",
    (TensorSpec("x", "FP32", (-1, 3, -1)), TensorSpec("words", "BYTES", (-1, 1))),
    (TensorSpec("y", "FP32", (-1, 10)), TensorSpec("unknown", "FP32", ())),
    True,
    8,
)


def against(text: str) -> list[str]:
    return [
        each.removeprefix("config.pbtxt: ").removesuffix("; the model is followed")
        for each in contradictions(read(text).declared, SPEC)
    ]


def test_declarations_that_hold() -> None:
    text = """
    max_batch_size: 8
    input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 224 ] }, { name: "words" data_type: TYPE_STRING dims: [ 1 ] } ]
    output [ { name: "y" dims: [ -1 ] }, { name: "unknown" data_type: TYPE_FP32 dims: [ 4, 4 ] } ]
    """
    assert against(text) == []
    assert against("max_batch_size: 8 input { name: 'x' dims: [ 6 ] reshape { shape: [ 3, 2 ] } }") == []


def test_declarations_that_do_not_hold() -> None:
    text = """
    max_batch_size: 8
    input [ { name: "x" data_type: TYPE_FP16 dims: [ 3, 224 ] }, { name: "y" } ]
    output { name: "y" data_type: TYPE_FP32 dims: [ 11 ] }
    """
    assert against(text) == [
        "input[0]: 'x' is declared as FP16, and in the model it is FP32",
        "input[1]: the model has no input 'y'",
        "output[0]: 'y' is declared with shape [-1, 11], and in the model it has [-1, 10]",
    ]
    whole = "input { name: 'x' dims: [ 3, 224 ] } output { name: 'y' dims: [ -1, 10 ] }"
    assert against(whole) == ["input[0]: 'x' is declared with shape [3, 224], and in the model it has [-1, 3, -1]"]
