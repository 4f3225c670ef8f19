"""model.toml is changed where it must be, and nowhere else."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.files import write_whole
from penstock.bin.modeltoml import EditError, edit, to_toml
from penstock.worker.config import ModelConfig, load_config

COMMENTED = """# Ours.
max_batch_size   =  16   # more does not help

  "instances" = 1
max_queue_delay = '5ms'# because
"""


def test_values_change_in_their_lines_and_all_else_stays() -> None:
    assert edit(COMMENTED, {"max_batch_size": 8, "instances": 2, "max_queue_delay": "500us"}) == (
        """# Ours.
max_batch_size   =  8   # more does not help

  "instances" = 2
max_queue_delay = "500us"# because
"""
    )


def test_new_keys_come_behind_the_others_and_before_any_table() -> None:
    assert edit("", {"instances": 2}) == "instances = 2\n"
    assert edit("a = 1", {"instances": 2}) == "a = 1\ninstances = 2\n"
    assert edit("a = 1\r\n", {"instances": 2}) == "a = 1\r\ninstances = 2\r\n"
    assert edit("a = 1\n\n[t]\ninstances = 5\n", {"instances": 2}) == "a = 1\n\ninstances = 2\n[t]\ninstances = 5\n"


@pytest.mark.parametrize(
    "text",
    ["max_queue_delay = '''\n5ms'''\n", 'a = """\nmax_queue_delay = "1ms"\n"""\n', '"max_queue\\u005fdelay" = "1ms"\n'],
)
def test_what_is_written_in_strange_ways_is_left_to_its_user(text: str) -> None:
    tomllib.loads(text)
    with pytest.raises(EditError, match=r"set \{'max_queue_delay': '2ms'\} by hand|is no TOML"):
        edit(text, {"max_queue_delay": "2ms"})


def test_what_is_no_toml_is_said() -> None:
    with pytest.raises(EditError, match="it is no TOML"):
        edit("max_batch_size = \n", {"instances": 1})


def test_lists_that_stand_beside_stay() -> None:
    text = "preferred_batch_sizes = [\n  8,  # small\n  16,\n]\ninstances = 1\nweight = 0.5\n"
    assert edit(text, {"instances": 2}) == text.replace("instances = 1", "instances = 2")


@given(
    st.dictionaries(st.sampled_from(["max_batch_size", "instances", "intra_op_threads", "other"]), st.integers()),
    st.dictionaries(st.sampled_from(["max_batch_size", "instances", "intra_op_threads"]), st.integers()),
    st.sampled_from(["", "  # said", "\t"]),
)
def test_the_keys_are_set_and_no_line_is_lost(before: dict[str, int], values: dict[str, int], end: str) -> None:
    lines = [f"{key} = {value}{end}" for key, value in before.items()]
    edited = edit("\n".join(lines), values)
    assert tomllib.loads(edited) == before | values
    kept = [line for line, key in zip(lines, before, strict=True) if key not in values]
    assert [line for line in edited.splitlines() if line in kept] == kept
    assert edited.count(end) >= len(lines)


def test_a_file_keeps_its_permissions_and_a_link_its_end(tmp_path: Path) -> None:
    path, link = tmp_path / "model.toml", tmp_path / "link"
    path.write_text("a = 1\n")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "a = 2\n")
    assert link.is_symlink()
    assert path.read_text() == "a = 2\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "model.toml"]


def test_a_configuration_can_be_written_down(tmp_path: Path) -> None:
    assert to_toml(ModelConfig()) == ""
    config = ModelConfig(
        version_policy={"latest": 2},
        max_batch_size=8,
        max_queue_delay="100us",
        preferred_batch_sizes=(4, 8),
        weight=2.5,
        providers=("tensorrt", "cuda", "cpu"),
        tf32=False,
        fp16=True,
    )
    path = tmp_path / "model.toml"
    path.write_text(to_toml(config) + "instances = 1\n")
    assert load_config(path) == config
    assert to_toml(ModelConfig(version_policy=(3, 5))) == "version_policy = [3, 5]\n"
    assert to_toml(ModelConfig(version_policy="all")) == 'version_policy = "all"\n'
