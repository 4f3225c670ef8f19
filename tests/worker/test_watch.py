"""What is seen of changes in real directories."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.worker import watch
from penstock.worker.watch import Changes, Watch, file_system

DEADLINE_MS = 10_000


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return put(tmp_path / "models", "m/1/model.onnx", "n/1/model.onnx")


@pytest.fixture
def start() -> Iterator[Callable[..., Watch]]:
    """A watch of a repository of ``m`` and ``n``, each with version 1."""
    started: list[Watch] = []

    def start_one(root: Path, is_file: bool = False) -> Watch:
        one = Watch(root, is_file)
        one.start()
        started.append(one)
        follow(one, root)
        one.take()
        return one

    yield start_one
    for each in started:
        each.stop()


def follow(one: Watch, root: Path) -> bool:
    found = [(model.name, path) for model in root.glob("*") if model.is_dir() for path in (model, *model.glob("*"))]
    return one.follow([(name, path) for name, path in found if path.is_dir()], everything=True)


def wait(one: Watch) -> Changes:
    """All that is said of what has been done; the kernel has said it by the time that it is done."""
    poll = select.poll()
    poll.register(one.fileno(), select.POLLIN)
    assert poll.poll(DEADLINE_MS), "nothing was told"
    return one.take()


def test_nothing_is_told_when_nothing_changes(start: Callable[..., Watch], models: Path) -> None:
    one = start(models)
    (models / "m/1/model.onnx").read_bytes()
    os.listdir(models / "m")
    poll = select.poll()
    poll.register(one.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    assert not one.take()
    assert not one.polls


@pytest.mark.parametrize(
    "change",
    [
        lambda models: (models / "m/1/model.onnx").write_bytes(b"other"),
        lambda models: (models / "m/1/weights").touch(),
        lambda models: (models / "m/1/model.onnx").unlink(),
        lambda models: (models / "m/1/model.onnx").chmod(0o600),
        lambda models: (models / "m/model.toml").write_text("weight = 2"),
        lambda models: (models / "m/2").mkdir(),
        lambda models: shutil.rmtree(models / "m/1"),
        lambda models: shutil.rmtree(models / "m"),
        lambda models: (models / "m/2").symlink_to("1"),
    ],
)
def test_a_change_names_its_model(start: Callable[..., Watch], models: Path, change: Callable[[Path], object]) -> None:
    one = start(models)
    change(models)
    assert wait(one) == Changes(models={"m"})


def test_what_is_renamed_into_place_is_named(start: Callable[..., Watch], models: Path, tmp_path: Path) -> None:
    one = start(models)
    put(tmp_path / "aside", "2/model.onnx", "p/1/model.onnx")
    (tmp_path / "aside/2").rename(models / "m/2")
    assert wait(one) == Changes(models={"m"}, placed={("m", "2")})
    (tmp_path / "aside/p").rename(models / "p")
    assert wait(one) == Changes(models={"p"}, placed={("p", "")})
    put(models, "m/.model.toml")
    one.take()
    (models / "m/.model.toml").rename(models / "m/model.toml")
    assert wait(one).placed == {("m", ".model.toml"), ("m", "model.toml")} - {("m", ".model.toml")}
    put(models, "m/1/.part")
    one.take()
    (models / "m/1/.part").rename(models / "m/1/weights")
    assert wait(one) == Changes(models={"m"}), "other files of a version may follow"


def test_a_link_that_is_made_to_lead_elsewhere_is_followed(start: Callable[..., Watch], models: Path) -> None:
    put(models, "m/.a/model.onnx", "m/.b/model.onnx")
    (models / "m/2").symlink_to(".a")
    one = start(models)
    (models / "m/.new").symlink_to(".b")
    (models / "m/.new").rename(models / "m/2")
    assert ("m", "2") in wait(one).placed
    assert follow(one, models)
    one.take()
    put(models, "m/.b/weights")
    assert wait(one) == Changes(models={"m"})


def test_a_model_that_comes_is_watched_once_it_is_followed(start: Callable[..., Watch], models: Path) -> None:
    one = start(models)
    (models / "p").mkdir()
    assert wait(one) == Changes(models={"p"})
    assert follow(one, models)
    assert not follow(one, models)
    (models / "p/1").mkdir()
    assert wait(one) == Changes(models={"p"})


def test_what_is_followed_no_more_is_not_watched(start: Callable[..., Watch], models: Path) -> None:
    one = start(models)
    one.follow([("n", models / "n")], everything=True)
    one.take()
    put(models, "m/2/model.onnx")
    poll = select.poll()
    poll.register(one.fileno(), select.POLLIN)
    assert not poll.poll(0) or not one.take()


def test_a_repository_that_goes_may_have_changed_everywhere_and_is_looked_for(
    start: Callable[..., Watch], models: Path
) -> None:
    one = start(models)
    shutil.rmtree(models)
    assert wait(one).everything
    one.take()
    assert one.polls
    put(models, "m/1/model.onnx")
    assert follow(one, models)
    assert not one.polls


def test_a_repository_behind_a_link_that_is_made_to_lead_elsewhere(
    start: Callable[..., Watch], models: Path, tmp_path: Path
) -> None:
    put(tmp_path / "other", "m/2/model.onnx")
    link = tmp_path / "link"
    link.symlink_to(models)
    one = start(link)
    put(tmp_path, "unrelated")
    assert not one.take()
    (tmp_path / "new").symlink_to(tmp_path / "other")
    (tmp_path / "new").rename(link)
    assert wait(one).everything


def test_one_file_is_watched_and_not_what_lies_beside_it(start: Callable[..., Watch], tmp_path: Path) -> None:
    path = put(tmp_path, "net.onnx") / "net.onnx"
    one = start(path, True)
    put(tmp_path, "other.onnx")
    assert not wait(one)
    path.write_bytes(b"other")
    assert wait(one).everything


def test_where_too_many_would_be_watched_all_is_looked_at(
    start: Callable[..., Watch], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_WATCHES_MAX", 3)
    one = start(models)
    assert one.polls
    assert one.fileno() == -1
    assert one.reason == "there are more than 3 directories"
    assert one.take().everything


def test_more_changes_than_the_kernel_keeps_may_be_anywhere(start: Callable[..., Watch], models: Path) -> None:
    one = start(models)
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    path = models / "m/1/model.onnx"
    if most > 100_000:
        pytest.skip("the kernel keeps too many here")
    for _ in range(most // 2 + 1):  # which are not alike one behind the other, or they would be one
        path.chmod(0o600)
        path.open("ab").close()
    assert wait(one).everything


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /srv/models rw shared:2 - nfs4 host:/models rw
31 30 0:41 / /srv/models/local rw - tmpfs tmpfs rw
32 22 0:42 / /srv/my\\040models rw - fuse.sshfs host: rw
33 22 0:43 / /srv/my\\040models rw - xfs /dev/sdb rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srv", "ext4"),
        ("/srv/models", "nfs4"),
        ("/srv/models/m/1", "nfs4"),
        ("/srv/models2", "ext4"),
        ("/srv/models/local/m", "tmpfs"),
        ("/srv/my models/m", "xfs"),
    ],
)
def test_a_path_lies_on_the_file_system_that_was_mounted_last(tmp_path: Path, path: str, kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), str(mounts)) == kind


def test_nothing_is_known_without_a_list_of_mounts(tmp_path: Path) -> None:
    assert file_system(tmp_path, str(tmp_path / "nope")) == ""


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse", "9p", "ceph", "lustre"])
def test_file_systems_that_others_write_to_are_looked_at(
    models: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(watch, "file_system", lambda path: kind)
    one = Watch(models)
    one.start()
    assert one.polls
    assert one.reason == f"{models} lies on a file system of the kind {kind}"
    one.stop()
