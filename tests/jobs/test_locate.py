"""Where jobs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.jobs.options import JobsOptions
from penstock.jobs.redis import RedisStore
from penstock.jobs.sqlite import SqliteStore
from penstock.jobs.store import StoreError, locate, open_store

RUN = Path("/run/penstock")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")


def test_in_the_users_state_and_two_servers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = locate("sqlite", RUN), locate("sqlite", Path("/run/other"))
    assert one != two
    assert one == locate("sqlite", RUN)
    assert Path(one).parent == Path("/home/me/.local/state/penstock")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/me")
    assert Path(locate("sqlite", RUN)) == Path("/var/me/penstock") / Path(one).name
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert locate("sqlite", RUN) == one


def test_in_systemds_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/penstock:/var/lib/more")
    assert locate("sqlite", RUN) == "/var/lib/penstock/jobs.sqlite"


@pytest.mark.parametrize("url", ["redis://host:6379/1", "rediss://host", "unix:///run/redis.sock", "/srv/jobs.sqlite"])
def test_what_says_where_it_is(url: str) -> None:
    assert locate(url, RUN) == url
    assert locate("sqlite:/srv/jobs.sqlite", RUN) == "/srv/jobs.sqlite"


def test_nowhere() -> None:
    assert locate("off", RUN) == locate("", RUN) == ""


@pytest.mark.parametrize("name", ["jobs.sqlite", "postgres://host", "sqlite:jobs", "Sqlite"])
def test_what_is_no_store(name: str) -> None:
    with pytest.raises(StoreError, match=r"it is sqlite, the absolute path of its file, redis://\.\.\. or off"):
        locate(name, RUN)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(StoreError, match=r"no home directory; name a file with \[jobs\] store"):
        locate("sqlite", RUN)


def test_which_kind_it_is(tmp_path: Path) -> None:
    for where, kind in (("unix:///nowhere", RedisStore), (str(tmp_path / "jobs.sqlite"), SqliteStore)):
        store = open_store(where, JobsOptions())
        assert isinstance(store, kind)
        store.close()
    assert list(tmp_path.iterdir()) == []
