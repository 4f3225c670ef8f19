"""``model.toml``: what it may say, and what is said of what it may not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.worker.config import (
    DEFAULT_BATCH_SIZE,
    FILE_BYTES_MAX,
    ConfigError,
    ModelConfig,
    load_config,
    parse_duration,
    without_effect,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.toml"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('"0s"', "it is more than nothing"),
        ('"3601s"', "'3601s' is longer than 3600s"),
        ('"soon"', "'soon' is not a duration"),
        ("30", "Expected `str | null`, got `int`"),
    ],
)
def test_a_time_to_compute_is_more_than_nothing_and_has_an_end(path: Path, value: str, words: str) -> None:
    text = complaint(path, f"max_compute = {value}")
    assert text.startswith("key 'max_compute': ")
    assert words in text


def test_a_time_to_compute_is_read(path: Path) -> None:
    path.write_text('max_compute = "2.5s"\n')
    assert load_config(path).max_compute_s == 2.5
    assert ModelConfig().max_compute_s == 0.0


def complaint(path: Path, content: str) -> str:
    """What is wrong with a file, without its name and the line."""
    return re.sub(r"^(\d+:)? ", "", located(path, content))


def located(path: Path, content: str) -> str:
    """The same, with the line."""
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    text = str(raised.value)
    assert text.startswith(f"{path}:")
    assert "\n" not in text
    return text.removeprefix(f"{path}:")


def test_without_a_file_everything_has_its_default(path: Path) -> None:
    config = load_config(path)
    assert config == ModelConfig()
    assert (config.max_batch_size, config.max_queue_delay_s) == (None, 0.0)
    assert (config.instances, config.intra_op_threads, config.intra_op_spinning) == (1, 1, False)


def test_every_key_is_read(path: Path) -> None:
    path.write_text(
        'max_batch_size = 8\nmax_queue_delay = "2ms"\ninstances = 3\nintra_op_threads = 4\nintra_op_spinning = true\n'
    )
    config = load_config(path)
    assert config.intra_op_spinning
    assert (config.max_batch_size, config.instances, config.intra_op_threads) == (8, 3, 4)
    assert config.max_queue_delay_s == 0.002


@pytest.mark.parametrize("key", ["max_batch_size", "instances", "intra_op_threads"])
@pytest.mark.parametrize("value", ["-1", "100000", "1e30", '"8"', "true", "2.5", "[8]", "{}", f"1{'0' * 40}"])
def test_number_out_of_range_or_of_another_type_names_its_key(path: Path, key: str, value: str) -> None:
    text = complaint(path, f"{key} = {value}")
    assert text.startswith(f"key '{key}': ")
    assert "Expected `int" in text or "out of range" in text


@pytest.mark.parametrize("key", ["instances", "intra_op_threads"])
def test_there_is_one_at_least(path: Path, key: str) -> None:
    assert complaint(path, f"{key} = 0") == f"key '{key}': Expected `int` >= 1"


def test_a_batch_size_of_0_has_requests_run_alone(path: Path) -> None:
    path.write_text('max_batch_size = 0\nmax_queue_delay = "2ms"\n')
    config = load_config(path)
    assert (config.max_batch_size, config.rows_max) == (0, 1)
    assert without_effect(config, "its max_batch_size is 0").endswith("leave it out, or make max_batch_size 1 or more")
    text = complaint(path, "max_batch_size = 0\npreferred_batch_sizes = [2]")
    assert text.startswith("keys 'preferred_batch_sizes' and 'max_batch_size': ")


def test_keys_have_triton_s_names_in_its_file(path: Path) -> None:
    path.write_text('max_batch_size = 8\nmax_queue_delay = "2ms"\n')
    assert without_effect(load_config(path), "why", "config.pbtxt").startswith(
        "keys 'max_batch_size', 'dynamic_batching.max_queue_delay_microseconds' in config.pbtxt have no effect: "
    )


@pytest.mark.parametrize(("key", "limit"), [("max_batch_size", 4096), ("instances", 64), ("intra_op_threads", 1024)])
def test_limits_are_inclusive(path: Path, key: str, limit: int) -> None:
    path.write_text(f"{key} = {limit}")
    assert getattr(load_config(path), key) == limit
    assert f"<= {limit}" in complaint(path, f"{key} = {limit + 1}")


@pytest.mark.parametrize("value", ["0", "1", '"true"', "[]"])
def test_spinning_is_true_or_false(path: Path, value: str) -> None:
    assert complaint(path, f"intra_op_spinning = {value}").startswith("key 'intra_op_spinning': Expected `bool`")


@pytest.mark.parametrize("value", ["2", "0.002", "true", '["2ms"]'])
def test_delay_that_is_no_text_is_refused(path: Path, value: str) -> None:
    assert complaint(path, f"max_queue_delay = {value}").startswith("key 'max_queue_delay': Expected `str`")


@pytest.mark.parametrize("value", ["", "2", "ms", "2 minutes", "-1ms", "1e3ms", "2ms3", "2  ms", ".5s", "1.s", "inf s"])
def test_delay_without_number_and_unit_says_how_to_write_it(path: Path, value: str) -> None:
    text = complaint(path, f'max_queue_delay = "{value}"')
    assert text.startswith(f"key 'max_queue_delay': '{value}' is not a duration")
    assert "'500us', '2ms' or '1s'" in text


@pytest.mark.parametrize("value", ["61s", "60001ms", f"{'9' * 400}s"])
def test_delay_over_a_minute_is_refused(path: Path, value: str) -> None:
    assert "is longer than 60s" in complaint(path, f'max_queue_delay = "{value}"')


@pytest.mark.parametrize(
    ("key", "near"),
    [("max_batchsize", "max_batch_size"), ("instance", "instances"), ("max_queue_delay_ms", "max_queue_delay")],
)
def test_unknown_key_suggests_the_one_that_was_meant(path: Path, key: str, near: str) -> None:
    assert complaint(path, f"{key} = 1") == f"key '{key}': unknown; did you mean '{near}'?"


def test_unknown_key_like_no_other_lists_all(path: Path) -> None:
    text = complaint(path, "[zebra]\nx = 1")
    assert text == (
        "key 'zebra': unknown; known keys are version_policy, labels, traffic, class_labels, devices, "
        "max_batch_size, max_queue_delay, latency_target, preferred_batch_sizes, response_cache, weight, "
        "max_sequence_idle, instances, intra_op_threads, intra_op_spinning, max_compute, providers, "
        "gpu_memory_limit, gpu_arena, cudnn_search, tf32, fp16, cuda_graphs"
    )


# --- batches that are tuned, padded and weighed ---


def test_target_sizes_and_weight_are_read(path: Path) -> None:
    path.write_text('latency_target = "50ms"\npreferred_batch_sizes = [8, 16, 32]\nweight = 2.5\n')
    config = load_config(path)
    assert (config.latency_target_s, config.preferred_batch_sizes) == (0.05, (8, 16, 32))
    assert (config.weight, config.weight_thousandths, config.rows_max) == (2.5, 2500, 32)


def test_without_them_nothing_is_picked_or_padded(path: Path) -> None:
    config = load_config(path)
    assert (config.latency_target_s, config.preferred_batch_sizes, config.weight_thousandths) == (0.0, None, 1000)
    assert config.rows_max == DEFAULT_BATCH_SIZE


@pytest.mark.parametrize("value", ["", "50", "-1ms", "5 minutes"])
def test_target_is_a_duration(path: Path, value: str) -> None:
    text = complaint(path, f'latency_target = "{value}"')
    assert text.startswith(f"key 'latency_target': '{value}' is not a duration")


def test_target_has_bounds(path: Path) -> None:
    assert "key 'latency_target': '61s' is longer than 60s" in complaint(path, 'latency_target = "61s"')
    assert complaint(path, 'latency_target = "0ms"').startswith("key 'latency_target': it is more than nothing")
    assert complaint(path, "latency_target = 50").startswith("key 'latency_target': Expected `str")


def test_target_beside_a_delay_is_a_contradiction(path: Path) -> None:
    text = complaint(path, 'latency_target = "50ms"\nmax_queue_delay = "2ms"')
    assert text.startswith("keys 'latency_target' and 'max_queue_delay': ")
    assert text.endswith("leave out max_queue_delay = '2ms'")
    path.write_text('latency_target = "50ms"\nmax_queue_delay = "0ms"')
    assert load_config(path).latency_target_s == 0.05


def test_what_a_file_says_of_batches_has_no_effect_where_requests_run_alone(path: Path) -> None:
    path.write_text('latency_target = "50ms"\npreferred_batch_sizes = [8, 16]\nweight = 2.0\n')
    assert without_effect(load_config(path), "") == ""
    assert without_effect(load_config(path), "input 'x' has no dimensions") == (
        "keys 'latency_target', 'preferred_batch_sizes' in model.toml have no effect: requests of this model run "
        "alone, since input 'x' has no dimensions; leave them out, or export the model with independent rows along a "
        "symbolic first dimension"
    )


@pytest.mark.parametrize("line", ["max_batch_size = 8", 'max_queue_delay = "2ms"', 'latency_target = "50ms"'])
def test_each_key_about_batches_is_named(path: Path, line: str) -> None:
    path.write_text(line)
    key = line.partition(" ")[0]
    assert without_effect(load_config(path), "why").startswith(f"key '{key}' in model.toml has no effect: ")


@pytest.mark.parametrize("line", ["", "max_batch_size = 1", 'max_queue_delay = "0ms"', "weight = 2.0", "instances = 2"])
def test_what_holds_of_requests_that_run_alone_is_no_such_key(path: Path, line: str) -> None:
    path.write_text(line)
    assert without_effect(load_config(path), "why") == ""


@pytest.mark.parametrize("sizes", ["[16, 8]", "[8, 8]"])
def test_preferred_sizes_ascend(path: Path, sizes: str) -> None:
    assert complaint(path, f"preferred_batch_sizes = {sizes}").startswith("key 'preferred_batch_sizes': they ascend")


@pytest.mark.parametrize(
    "sizes", ["[]", "[0]", "[5000]", "8", '["8"]', "[1.5]", f"[{', '.join(map(str, range(1, 34)))}]"]
)
def test_preferred_sizes_are_one_to_32_numbers_of_rows(path: Path, sizes: str) -> None:
    text = complaint(path, f"preferred_batch_sizes = {sizes}")
    assert text.startswith("key 'preferred_batch_sizes")
    assert "Expected `" in text


@pytest.mark.parametrize("rows", [8, 31, 33])
def test_largest_preferred_size_is_the_largest_batch(path: Path, rows: int) -> None:
    text = complaint(path, f"preferred_batch_sizes = [8, 32]\nmax_batch_size = {rows}")
    assert text.startswith("keys 'preferred_batch_sizes' and 'max_batch_size': the largest preferred size, 32, ")
    assert f"{rows} are allowed" in text
    path.write_text("preferred_batch_sizes = [8, 32]\nmax_batch_size = 32")
    assert load_config(path).rows_max == 32


@pytest.mark.parametrize("value", ["0", "0.0009", "1000.1", "-1", "inf", "nan", '"1"', "true"])
def test_weight_out_of_range_or_of_another_type_names_its_key(path: Path, value: str) -> None:
    assert complaint(path, f"weight = {value}").startswith("key 'weight': ")


@pytest.mark.parametrize(("value", "thousandths"), [("0.001", 1), ("1000", 1_000_000), ("2", 2000)])
def test_weights_may_be_whole_and_reach_their_bounds(path: Path, value: str, thousandths: int) -> None:
    path.write_text(f"weight = {value}")
    assert load_config(path).weight_thousandths == thousandths


# --- what is no configuration ---


@pytest.mark.parametrize("content", ["instances", "instances = ", "instances = 1\ninstances = 2", "[", "a = [" * 5000])
def test_what_is_not_toml_is_a_sentence(path: Path, content: str) -> None:
    assert complaint(path, content)


def test_number_with_more_digits_than_python_reads_is_a_sentence(path: Path) -> None:
    assert "digits" in complaint(path, f"instances = {'9' * 5000}")


def test_bytes_that_are_not_utf8_are_a_sentence(path: Path) -> None:
    path.write_bytes(b"instances = 1 # \xff")
    with pytest.raises(ConfigError, match="utf-8"):
        load_config(path)


def test_a_file_has_a_limit(path: Path) -> None:
    path.write_text("#" * FILE_BYTES_MAX)
    assert load_config(path) == ModelConfig()
    path.write_text("#" * (FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="more than 1048576 bytes, so it is no configuration; replace it"):
        load_config(path)


def test_directory_in_its_place_is_a_sentence(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_would_never_end_is_not_read(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(ConfigError, match="it is no file, so it is no configuration; replace it"):
        load_config(path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_file_that_may_not_be_read_is_a_sentence(path: Path) -> None:
    path.touch(mode=0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0ms", 0.0), ("500us", 0.0005), ("2ms", 0.002), ("2 ms", 0.002), (" 1s ", 1.0), ("1.5s", 1.5), ("60s", 60.0)],
)
def test_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="0123456789. usm\n-e", max_size=8))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    assert 0 <= seconds <= 1e8


@pytest.mark.parametrize(
    ("value", "policy"),
    [('"latest"', "latest"), ('"all"', "all"), ("{latest = 2}", {"latest": 2}), ("[3, 5]", (3, 5)), ("[0]", (0,))],
)
def test_a_version_policy_is_read(path: Path, value: str, policy: object) -> None:
    path.write_text(f"version_policy = {value}\n")
    assert load_config(path).version_policy == policy


@pytest.mark.parametrize(
    "value", ['"newest"', "3", "[]", "[-1]", "[1.5]", '["1"]', "{latest = 0}", "{newest = 1}", "{}", "true"]
)
def test_what_is_no_version_policy(path: Path, value: str) -> None:
    text = complaint(path, f"version_policy = {value}")
    assert text.startswith("key 'version_policy")
    assert text.endswith('; write "latest", "all", {latest = 2} or [3, 5]')


# --- labels, traffic, devices ---


def test_labels_traffic_and_devices_are_read(path: Path) -> None:
    path.write_text(
        'labels = {stable = 3, "blue / green"= 4}\n'.replace(" / ", "|")
        + 'traffic = {stable = 60, "blue|green" = 0, "7" = 40}\ndevices = ["cuda:0", "cpu"]\n'
    )
    config = load_config(path)
    assert config.labels == {"stable": 3, "blue|green": 4}
    assert config.traffic == {"stable": 60, "blue|green": 0, "7": 40}
    assert config.devices == ("cuda:0", "cpu")


def test_without_them_there_are_none(path: Path) -> None:
    config = load_config(path)
    assert (config.labels, config.traffic, config.devices) == ({}, {}, None)
    path.write_text("labels = {}\ntraffic = {}\n")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "a label has 1 to 64 characters, not 0"),
        ("x" * 65, "a label has 1 to 64 characters, not 65"),
        ("a/b", "without '/'"),
        ("a\\tb", "can be printed"),
        ("12", "a whole number looks like a version; call it 'v12'"),
    ],
)
def test_what_a_label_is_not_called(path: Path, name: str, words: str) -> None:
    text = complaint(path, f'labels = {{ok = 1, "{name}" = 3}}')
    assert text.startswith("key 'labels.")
    assert words in text


@pytest.mark.parametrize("value", ['"3"', "-1", "1.5", "true", "[3]"])
def test_a_label_names_a_version(path: Path, value: str) -> None:
    assert complaint(path, f"labels = {{ok = 1, stable = {value}}}").startswith("key 'labels.stable': Expected `int`")


def test_labels_have_a_limit(path: Path) -> None:
    some = [f"l{number} = 1" for number in range(65)]
    path.write_text(f"labels = {{{', '.join(some[:-1])}}}")
    assert len(load_config(path).labels) == 64
    assert complaint(path, f"labels = {{{', '.join(some)}}}") == "key 'labels': Expected `object` of length <= 64"


@pytest.mark.parametrize(
    ("traffic", "said"),
    [
        ("{stable = 95, canary = 50}", "key 'traffic': it adds up to 145; make it 100"),
        ("{stable = 99}", "key 'traffic': it adds up to 99; make it 100"),
        ("{stable = 101}", "key 'traffic.stable': Expected `int` <= 100"),
        ("{stable = -1, canary = 101}", "key 'traffic.stable': Expected `int` >= 0"),
        ("{stable = 99.5}", "key 'traffic.stable': Expected `int`, got `float`"),
        (
            "{stable = 95, canry = 5}",
            "key 'traffic.canry': it is neither a label of this file nor a version's number; did you mean 'canary'?",
        ),
        ("{zebra = 100}", "key 'traffic.zebra': it is neither a label of this file nor a version's number; labels are"),
        ('{"03" = 100}', "key 'traffic.03': it is neither a label"),
        ("{}\n[canary]", "key 'canary': unknown"),
        ("3", "key 'traffic': Expected `object`, got `int`"),
    ],
)
def test_what_traffic_cannot_say(path: Path, traffic: str, said: str) -> None:
    assert complaint(path, f"labels = {{stable = 3, canary = 4}}\ntraffic = {traffic}").startswith(said)


def test_traffic_may_go_to_versions_alone(path: Path) -> None:
    path.write_text('traffic = {"3" = 100}')
    assert load_config(path).traffic == {"3": 100}
    assert complaint(path, "traffic = {stable = 100}").endswith("there are no labels")


@pytest.mark.parametrize("value", ['["gpu"]', '["cuda:"]', '["cuda:x"]', '["CPU"]', '["cpu", "cuda:0,cpu"]', '["\\n"]'])
def test_what_is_no_device(path: Path, value: str) -> None:
    assert re.fullmatch(r"key 'devices\[\d\]': '.*' is no device; write .*", complaint(path, f"devices = {value}"))


@pytest.mark.parametrize("value", ["[]", '"cpu"', "[0]", f"[{', '.join(['0'] * 65)}]"])
def test_devices_are_1_to_64_names(path: Path, value: str) -> None:
    assert complaint(path, f"devices = {value}").startswith("key 'devices")


@pytest.mark.parametrize(
    ("devices", "on"),
    [
        (None, ["cpu", "cuda:0", "cuda:1"]),
        (("cpu",), ["cpu"]),
        (("cuda",), ["cuda:0", "cuda:1"]),
        (("cuda:1", "cpu"), ["cpu", "cuda:1"]),
    ],
)
def test_a_model_is_loaded_on_its_devices(devices: tuple[str, ...] | None, on: list[str]) -> None:
    config = ModelConfig(devices=devices)
    assert [device for device in ("cpu", "cuda:0", "cuda:1") if config.loaded_on(device)] == on


# --- where it stands ---


@pytest.mark.parametrize(
    ("content", "begin"),
    [
        ("# one\n\nmax_batch_sise = 3", "3: key 'max_batch_sise': unknown; did you mean 'max_batch_size'?"),
        ('# """\ninstances = "#"', "2: key 'instances': Expected `int`"),
        ('max_compute = """\n\n"""\ninstances = 0', "4: key 'instances': Expected `int` >= 1"),
        ("\n[labels]\nstable = 1\ncanary = true", "4: key 'labels.canary': "),
        ("\nlabels.stable = 1\nlabels.canary = true", "3: key 'labels.canary': "),
        ('\n[labels]\nstable = 1\n"a/b" = 2', "4: key 'labels.a/b': "),
        ("[labels]\na = 1\n[traffic]\n\nb = 100", "5: key 'traffic.b': "),
        ("[labels]\na = 1\n[traffic]\n\na = 99", "3: key 'traffic': it adds up to 99"),
        ("preferred_batch_sizes = [\n 1,\n 0,\n]", "3: key 'preferred_batch_sizes[1]': "),
        ('devices = [\n "cpu",\n "gpu",\n]', "3: key 'devices[1]': "),
        ("\nversion_policy = {newest = 1}", "2: key 'version_policy"),
        ('weight = 2\n\nmax_queue_delay = "2"', "3: key 'max_queue_delay': '2' is not a duration"),
        ('\nmax_compute = "0s"', "2: key 'max_compute': it is more than nothing"),
        ('max_queue_delay = "2ms"\nlatency_target = "50ms"', "2: keys 'latency_target' and 'max_queue_delay': "),
        ("\npreferred_batch_sizes = [2]\nmax_batch_size = 3", "2: keys 'preferred_batch_sizes' and "),
        ('\n\nproviders = ["cpu", "cuda"]', "3: key 'providers': "),
        ("\nfp16 = true", "2: key 'fp16': "),
        ("\r\ncuda_graphs = true\r\ninstances = 2\r\n", "2: key 'cuda_graphs': "),
        ("\ninstances = \n", "2: Invalid value (column 13)"),
        ("\n\ninstances", "3: Expected '=' after a key in a key/value pair (at end of document)"),
        ('\nmax_compute = """\n\n', "3: "),
        ('\n"a\\nb" = 3', "2: key 'a?b': unknown"),
        (f"\n{'a' * 300} = 3", f"2: key '{'a' * 80}...': unknown"),
        ("\n'' = 3", "2: key '': unknown"),
    ],
)
def test_an_error_names_the_line_of_its_key(path: Path, content: str, begin: str) -> None:
    assert located(path, content).startswith(begin)


def test_bytes_that_are_not_utf8_have_a_line(path: Path) -> None:
    path.write_bytes(b"instances = 1\n# \xff")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}:2: 'utf-8'")
