"""When a configuration file counts as changed, and whom that is about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.options import Options
from penstock.bin.reload import ConfigFile, Mark, Watch, changed_roles, mark_of, sweep, with_config
from penstock.broker.options import BrokerOptions
from penstock.gateway.options import GatewayOptions
from penstock.jobs.options import JobsOptions
from penstock.worker.config import ConfigError
from penstock.worker.options import WorkerOptions


def test_a_change_is_told_once_and_when_it_is_over() -> None:
    watch = Watch((1,))
    seen: list[Mark] = [(1,), (2,), (3,), (3,), (3,), (), (), (), (3,), (3,)]
    assert [watch.changed(mark) for mark in seen] == [False, False, False, True, False, False, True, False, False, True]


def test_what_is_as_before_when_it_is_over_is_no_change() -> None:
    watch = Watch((1,))
    assert not any(watch.changed(mark) for mark in [(2,), (1,), (1,), (3,), (1,), (1,)])


@given(st.lists(st.sampled_from([(), (1,), (2,)])))
def test_the_last_state_that_stays_is_always_told(marks: list[Mark]) -> None:
    watch = Watch(())
    told: Mark = ()
    for mark in [*marks, (2,), (2,)]:
        if watch.changed(mark):
            assert mark != told
            told = mark
    assert told == (2,)


def test_a_file_that_is_written_replaced_or_removed_has_another_mark(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("one")
    link.symlink_to(path)
    marks = [mark_of(link)]
    path.write_text("other")
    marks.append(mark_of(link))
    (tmp_path / "b").write_text("third")
    (tmp_path / "b").replace(path)
    marks.append(mark_of(link))
    path.unlink()
    assert mark_of(link) == ()
    assert len(set(marks)) == 3


def test_a_change_is_about_the_processes_whose_section_differs() -> None:
    plain = Options()
    assert changed_roles(plain, Options()) == ()
    assert changed_roles(plain, Options(gateway=GatewayOptions(headers_max=3))) == ("gateway", "jobs")
    assert changed_roles(plain, Options(jobs=JobsOptions(ttl_s=3))) == ("gateway", "jobs")
    assert changed_roles(plain, Options(worker=WorkerOptions(arena_bytes=3))) == ("worker",)
    both = Options(BrokerOptions(workers_max=3), gateway=GatewayOptions(headers_max=3))
    assert changed_roles(plain, both) == ("gateway", "jobs", "broker")


def test_a_command_line_gets_another_configuration() -> None:
    line = ["worker", "--config=/run/penstock-1.toml", "--", "--config=x"]
    assert with_config(line, Path("/run/penstock-1.toml"), Path("/b")) == ["worker", "--config=/b", "--", "--config=x"]


def test_what_has_been_judged_is_copied_for_this_user_alone(tmp_path: Path) -> None:
    path, directory = tmp_path / "penstock.toml", tmp_path / "run"
    directory.mkdir()
    path.write_text("[gateway]\nheaders_max = 3\n")
    file = ConfigFile(path, directory)
    toml, options = file.read()
    path.write_text("[gateway]\nheaders_mx = 3\n")
    first, second = file.keep(toml), file.keep(toml)
    assert options.gateway.headers_max == 3
    assert first != second
    assert first.read_text() == toml.text
    with pytest.raises(ConfigError, match=r"penstock.toml:2: \[gateway\]: key 'headers_mx': unknown"):
        file.read()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"penstock.toml is no file that can be read again; write it to one"):
        file.read()
    path.unlink()
    with pytest.raises(ConfigError, match=r"penstock.toml does not exist; put it back"):
        file.read()
    sweep(directory)
    assert list(directory.iterdir()) == []
    directory.rmdir()
    with pytest.raises(ConfigError, match="cannot write"):
        file.keep(toml)
