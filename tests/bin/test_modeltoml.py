"""model.toml is changed where it must be, and nowhere else."""

from __future__ import annotations

import json
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
    ("text", "edited"),
    [
        ("max_queue_delay = '''\n5ms''' # a\n", 'max_queue_delay = "2ms" # a\n'),
        ('a = """\nmax_queue_delay = "1ms"\n"""', 'a = """\nmax_queue_delay = "1ms"\n"""\nmax_queue_delay = "2ms"\n'),
        ('"max_queue\\u005fdelay" = "1ms"\n', '"max_queue\\u005fdelay" = "2ms"\n'),
    ],
)
def test_what_is_written_in_strange_ways_is_found_too(text: str, edited: str) -> None:
    tomllib.loads(text)
    assert edit(text, {"max_queue_delay": "2ms"}) == edited


def test_what_cannot_be_set_is_left_to_its_user() -> None:
    with pytest.raises(EditError, match=r"set \{'labels': 3\} by hand"):
        edit("[labels]\na = 1\n", {"labels": 3})


def test_keys_are_taken_out_with_their_lines() -> None:
    text = '# top\na = 1 # one\ntraffic = {"a" = [\n1], b = 2}\n[labels]\n# why\nstable = 3\n[other]\nx = 1\n'
    assert edit(text.replace("[\n1]", "1"), {"traffic": None, "gone": None}) == (
        "# top\na = 1 # one\n[labels]\n# why\nstable = 3\n[other]\nx = 1\n"
    )
    assert edit(text, {"labels": None, "traffic": None}) == "# top\na = 1 # one\n# why\n[other]\nx = 1\n"
    assert edit("a = 1", {"a": None}) == ""


def test_tables_are_set_in_the_way_in_which_they_are_written() -> None:
    labels = {"stable": 4, "a b": 5}
    assert edit("labels = {stable = 3} # ours\n", {"labels": labels}) == 'labels = {stable = 4, "a b" = 5} # ours\n'
    assert edit("x = 1\n[labels]\n# now\nstable = 3 # ours\nold = 1", {"labels": labels}) == (
        'x = 1\n[labels]\n# now\nstable = 4 # ours\n"a b" = 5\n'
    )
    assert edit("labels.stable = 3\nx = 1\n", {"labels": labels}) == 'labels.stable = 4\nlabels."a b" = 5\nx = 1\n'
    assert edit("[labels]\n[t]\n", {"labels": {"a": 1}, "version_policy": (3, 5)}) == (
        "version_policy = [3, 5]\n[labels]\na = 1\n[t]\n"
    )
    assert edit("", {"traffic": {"3": 95, "canary": 5}}) == "traffic = {3 = 95, canary = 5}\n"
    assert edit("version_policy = [\n 3, # three\n]\r\n", {"version_policy": {"latest": 2}}) == (
        "version_policy = {latest = 2}\r\n"
    )


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


_labels = st.dictionaries(st.text("ab. \"'\\#=", max_size=3), st.integers(0, 9), max_size=3)


@given(_labels, st.none() | _labels, st.sampled_from(["inline", "head", "dots"]), st.sampled_from(["\n", "\r\n"]))
def test_any_labels_become_any_others(before: dict[str, int], after: dict[str, int] | None, way: str, end: str) -> None:
    pairs = {json.dumps(key): value for key, value in before.items()}
    body = {
        "inline": "labels = {" + ", ".join(f"{key} = {value}" for key, value in pairs.items()) + "}" + end,
        "head": f"[labels]{end}" + "".join(f"{key} = {value} # mine{end}" for key, value in pairs.items()),
        "dots": "".join(f"labels.{key} = {value}{end}" for key, value in pairs.items()),
    }[way]
    edited = edit(f"# first{end}x = 1{end}{body}[last]{end}y = 2", {"labels": after})
    wanted = {"x": 1, "last": {"y": 2}} | ({} if after is None else {"labels": after})
    assert tomllib.loads(edited) == wanted or (tomllib.loads(edited) | {"labels": {}} == wanted)
    assert edited.startswith(f"# first{end}x = 1{end}")
    assert edited.rstrip().endswith(f"[last]{end}y = 2")


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
