"""What becomes of each field of Triton's ``config.pbtxt`` (see tritonconfig.py), and of the options in its maps."""

from __future__ import annotations

from typing import Final

_PRIORITIES: Final = "a request says its own, 1 to 5, and 3 where it says nothing"
_QUEUES: Final = "a request's time is its own `timeout`, or [gateway] request_timeout_s; late ones are refused"
_SEQUENCES: Final = (
    "requests of a sequence go one after another to the worker that has it, and share batches with others"
)
_TENSORRT_ONLY: Final = "it is for TensorRT plans, and this is an ONNX model; leave it out"
# What is asked for and not given: the field (a whole message where it is one), and why, with the way out.
UNHEEDED: Final = {
    "runtime": "ONNX models are run by the ONNX Runtime that is installed here; leave it out",
    "input.reshape": "requests have to have the shape that the model has; change it in the model, or in the client",
    "input.is_shape_tensor": _TENSORRT_ONLY,
    "input.allow_ragged_batch": "only requests of one shape share a batch; others run in batches of their own",
    "input.optional": "a request may leave out only what has a value in the ONNX file; give it one there",
    "input.is_non_linear_format_io": _TENSORRT_ONLY,
    "output.reshape": "answers have the shape that the model gives them; change it in the model, or in the client",
    "output.is_shape_tensor": _TENSORRT_ONLY,
    "output.is_non_linear_format_io": _TENSORRT_ONLY,
    "optimization.priority": "between models it is `weight` in a model.toml that counts",
    "optimization.cuda.busy_wait_events": "it would take a core of the processor; leave it out",
    "optimization.cuda.graph_spec": "graphs are recorded for each power of two of rows",
    "optimization.cuda.output_copy_stream": "each instance has one stream for copies and one for computing",
    "optimization.execution_accelerators.cpu_execution_accelerator": "ONNX Runtime's own CPU provider is the only one",
    "optimization.gather_kernel_buffer_threshold": "batches are gathered in pinned memory and copied once",
    "optimization.eager_batching": "a batch is gathered when it is closed",
    "sequence_batching.direct.max_queue_delay_microseconds": _SEQUENCES,
    "sequence_batching.direct.minimum_slot_utilization": _SEQUENCES,
    "sequence_batching.oldest.max_candidate_sequences": "[broker] sequences_max bounds sequences",
    "sequence_batching.oldest.preferred_batch_size": _SEQUENCES,
    "sequence_batching.oldest.max_queue_delay_microseconds": _SEQUENCES,
    "sequence_batching.oldest.preserve_ordering": _SEQUENCES,
    "dynamic_batching.preserve_ordering": (
        "answers come as they are ready, those of one HTTP connection in order; order them in the client by their ids"
    ),
    "dynamic_batching.priority_levels": _PRIORITIES,
    "dynamic_batching.default_priority_level": _PRIORITIES,
    "dynamic_batching.default_queue_policy.timeout_action": _QUEUES,
    "dynamic_batching.default_queue_policy.default_timeout_microseconds": _QUEUES,
    "dynamic_batching.default_queue_policy.max_queue_size": "[broker] queue_requests_max bounds each model's queue",
    "dynamic_batching.priority_queue_policy": "all priorities have the same rules: [broker] queue_requests_max bounds "
    "a model's queue, and each request has its own `timeout`",
    "instance_group.rate_limiter": "models of a worker take turns by their `weight` in a model.toml",
    "instance_group.secondary_devices": "there is no DLA; leave it out",
    "instance_group.profile": _TENSORRT_ONLY,
    "instance_group.passive": "a passive instance runs nothing, so it is not made",
    "instance_group.host_policy": "`penstock up --pin` keeps workers to cores, [worker] numa next to their GPU",
    "cc_model_filenames": "the file is the same on every GPU: default_model_filename, or model.onnx",
    "metric_tags": "metrics are labelled by model and version; relabel them in Prometheus",
    "model_warmup": "models are warmed up with made-up inputs, at every batch size; these samples are not run",
    "model_repository_agents": "nothing is checked or decrypted before a model is loaded; do it before it is put there",
    "model_metrics": "histograms have the buckets that they have; see /metrics",
}
# What it asks for is so anyway, or says nothing of how the model is served.
AGREED: Final = frozenset(
    {
        "input.format",  # a description: ONNX models take what they take
        "instance_group.name",
        "dynamic_batching.default_queue_policy.allow_timeout_override",  # requests have their own time
    }
)
# What nobody can be served without, each with the way out.
REFUSED: Final = {
    "sequence_batching.control_input": "requests of a sequence run one after another on one worker, and nobody makes "
    "these inputs; make them inputs that requests carry",
    "sequence_batching.state": "nothing is kept for the next request of a sequence; make the state an input and an "
    "output, and have the client carry it",
    "sequence_batching.iterative_sequence": "a request has one answer; have the client ask again",
    "ensemble_scheduling": "there are no ensembles; merge the models into one (onnx.compose), or call them one by one",
    "batch_input": "Triton makes these inputs, and nobody does so here; make them inputs that requests carry",
    "batch_output": "outputs are taken apart by rows; export the model with a row for each row of the input",
    "model_operations.op_library_filename": "custom operators are not loaded; export the model without them",
    "model_transaction_policy.decoupled": "a request has one answer; serve this model with Triton",
}
TAKEN: Final = frozenset(
    {
        "name",
        "platform",
        "backend",
        "version_policy",
        "max_batch_size",
        "input.name",
        "input.data_type",
        "input.dims",
        "output.name",
        "output.data_type",
        "output.dims",
        "output.label_filename",
        "optimization.graph.level",
        "optimization.cuda.graphs",
        "optimization.execution_accelerators.gpu_execution_accelerator",
        "optimization.input_pinned_memory.enable",
        "optimization.output_pinned_memory.enable",
        "dynamic_batching.preferred_batch_size",
        "dynamic_batching.max_queue_delay_microseconds",
        "sequence_batching.max_sequence_idle_microseconds",
        "instance_group.kind",
        "instance_group.count",
        "instance_group.gpus",
        "default_model_filename",
        "response_cache.enable",
        "parameters",
    }
)
ACCOUNTED: Final = frozenset(UNHEEDED) | AGREED | frozenset(REFUSED) | TAKEN

# By the name that ONNX Runtime has for an option: ours, and its values, as numbers or words.
CUDA_OPTIONS: Final[dict[str, tuple[str, dict[str, str | bool]]]] = {
    "cudnn_conv_algo_search": (
        "cudnn_search",
        {
            "0": "exhaustive",
            "1": "heuristic",
            "2": "default",
            "EXHAUSTIVE": "exhaustive",
            "HEURISTIC": "heuristic",
            "DEFAULT": "default",
        },
    ),
    "arena_extend_strategy": (
        "gpu_arena",
        {
            "0": "next_power_of_two",
            "1": "same_as_requested",
            "kNextPowerOfTwo": "next_power_of_two",
            "kSameAsRequested": "same_as_requested",
        },
    ),
    "use_tf32": ("tf32", {"0": False, "1": True}),
    "enable_cuda_graph": ("cuda_graphs", {"0": False, "1": True}),
}
PARAMETERS_AGREED: Final = frozenset(
    {
        ("execution_mode", "0"),
        ("enable_mem_arena", "1"),
        ("enable_mem_pattern", "1"),
        ("session.use_device_allocator_for_initializers", "0"),
    }
)
PARAMETERS: Final = {
    "execution_mode": "the operators of a batch run one after another; use `instances` or intra_op_thread_count",
    "enable_mem_arena": "models run in memory that they share; [worker] run_bytes_max bounds it",
    "enable_mem_pattern": "the memory of a batch is planned before it runs",
    "memory.enable_memory_arena_shrinkage": "memory that lies unused is given back by itself",
}
