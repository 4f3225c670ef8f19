"""Which devices a command line and CUDA_VISIBLE_DEVICES name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.devices import CPU, Device, DeviceError, choose, choose_one, visible
from penstock.worker.gpus import Gpu

ONE = Gpu(0, "GPU-aaaa-1111", pci="0000:3b:00.0")
TWO = Gpu(1, "GPU-aabb-2222", pci="0000:5e:00.0")
FIRST = Gpu(2, "MIG-cccc-1", parent="GPU-dddd-3333")
SECOND = Gpu(2, "MIG-cccc-2", parent="GPU-dddd-3333")
GONE = Gpu(1, "", unusable="GPU is lost")
GPUS = [ONE, TWO, FIRST, SECOND]


# --- CUDA_VISIBLE_DEVICES ---


@pytest.mark.parametrize(
    ("inherited", "seen"),
    [
        (None, GPUS),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", [ONE]),
        ("1,0", [TWO, ONE]),
        (" 1 , 0 ", [TWO, ONE]),
        ("0,-1,1", [ONE]),
        ("0,9,1", [ONE]),
        ("0,,1", [ONE]),
        ("0,0,1", [ONE]),
        ("2", [FIRST]),
        ("GPU-aaaa-1111", [ONE]),
        ("GPU-aab", [TWO]),
        ("GPU-aa", []),
        ("GPU-AAB", [TWO]),
        ("GPU-dddd", [FIRST]),
        ("MIG-cccc-2,MIG-cccc-1", [SECOND, FIRST]),
        ("MIG-cccc", []),
        ("MIG-cccc-2,0", [SECOND, ONE]),
        ("0;1", []),
        ("٣", []),
    ],
)
def test_an_inherited_list_is_read_as_cuda_does(inherited: str | None, seen: Sequence[Gpu]) -> None:
    assert visible(GPUS, inherited) == seen


machines = st.lists(st.sampled_from(["GPU-a", "GPU-b", "GPU-c", "GPU-ab"]), unique=True, max_size=4).map(
    lambda uuids: [Gpu(index, uuid) for index, uuid in enumerate(uuids)]
)
words = st.sampled_from(["0", "1", "2", "3", "-1", "", "GPU-a", "GPU-b", "GPU-ab", "GPU-", "MIG-", "x"])


@given(machines, st.lists(words, max_size=5))
def test_what_is_visible_is_a_part_of_what_there_is(gpus: list[Gpu], said: list[str]) -> None:
    found = visible(gpus, ",".join(said))
    assert len(set(found)) == len(found) <= len(said)
    assert set(found) <= set(gpus)
    assert visible(gpus, ",".join(gpu.uuid for gpu in found)) == found or any(
        other.uuid != gpu.uuid and other.uuid.startswith(gpu.uuid) for gpu in found for other in gpus
    )


# --- --device ---


def test_every_gpu_is_the_default_and_the_cpu_without_any() -> None:
    assert choose(None, []) == [CPU] == choose(None, GPUS, "") == choose(None, [], absent="no library")
    assert choose(None, [ONE, TWO]) == [
        Device("cuda:0", "GPU-aaaa-1111", "0000:3b:00.0"),
        Device("cuda:1", "GPU-aabb-2222", "0000:5e:00.0"),
    ]


def test_a_lost_gpu_is_left_out_unless_it_is_asked_for() -> None:
    gpus = [ONE, GONE]
    assert [device.name for device in choose(None, gpus)] == ["cuda:0"]
    assert choose("cuda:1", gpus) == [Device("cuda:1", unusable="GPU is lost")]
    assert [device.name for device in choose(None, [GONE, ONE])] == ["cuda:1"]
    with pytest.raises(DeviceError, match=r"^no GPU can be used \(cuda:0: GPU is lost\); --device cpu runs models"):
        choose(None, [GONE])


@pytest.mark.parametrize(
    ("asked", "inherited", "uuids"),
    [
        ("cuda:1", None, [TWO.uuid]),
        ("cuda:1,cuda:0", None, [TWO.uuid, ONE.uuid]),
        ("cuda", None, [gpu.uuid for gpu in GPUS]),
        ("cuda:3", None, [SECOND.uuid]),
        ("cuda:0", "1", [TWO.uuid]),
        ("cuda", "MIG-cccc-2,0", [SECOND.uuid, ONE.uuid]),
        ("cpu", "0", [""]),
        ("cuda:0,cpu", None, [ONE.uuid, ""]),
    ],
)
def test_numbers_count_those_that_are_visible(asked: str, inherited: str | None, uuids: list[str]) -> None:
    assert [device.uuid for device in choose(asked, GPUS, inherited)] == uuids


@pytest.mark.parametrize(
    ("asked", "inherited", "said"),
    [
        ("cuda:3", None, "--device cuda:3: this machine has 2 GPUs, cuda:0 and cuda:1"),
        ("cuda:1", "0", "--device cuda:1: this machine has 2 GPUs, of which CUDA_VISIBLE_DEVICES=0 leaves cuda:0"),
        (
            "cuda:0",
            "-1",
            "--device cuda:0: CUDA_VISIBLE_DEVICES=-1 hides every GPU; unset it, "
            "or leave --device out to run on the CPU",
        ),
        ("tpu", None, "--device tpu: 'tpu' is no device; models run on cpu, cuda:0, cuda:1, ..."),
        ("cuda:0,", None, "--device cuda:0,: '' is no device; models run on cpu, cuda:0, cuda:1, ..."),
        ("cuda:-1", None, "--device cuda:-1: 'cuda:-1' is no device; models run on cpu, cuda:0, cuda:1, ..."),
        ("cpu,cpu", None, "--device cpu,cpu: cpu is there twice; --workers 2 starts two on each device"),
        ("cuda,cuda:1", None, "--device cuda,cuda:1: cuda:1 is there twice; --workers 2 starts two on each device"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(asked: str, inherited: str | None, said: str) -> None:
    with pytest.raises(DeviceError) as raised:
        choose(asked, [ONE, TWO], inherited)
    assert str(raised.value) == said


def test_a_machine_without_gpus_says_why() -> None:
    with pytest.raises(DeviceError) as raised:
        choose("cuda:0", [], absent="Driver Not Loaded")
    assert str(raised.value) == (
        "--device cuda:0: no NVIDIA driver answers (Driver Not Loaded); install it, "
        "or leave --device out to run on the CPU"
    )
    with pytest.raises(DeviceError, match="the NVIDIA driver knows no GPU here; see what nvidia-smi says"):
        choose("cuda", [])
    with pytest.raises(DeviceError, match=r"this machine has 1 GPU, cuda:0$"):
        choose("cuda:1", [ONE])


# --- of one worker ---


def test_one_worker_runs_on_one_device() -> None:
    assert choose_one(None, []) == CPU
    assert choose_one(None, [ONE]).uuid == ONE.uuid
    assert choose_one(None, GPUS, "1").uuid == TWO.uuid
    with pytest.raises(DeviceError) as raised:
        choose_one(None, GPUS[:3])
    assert str(raised.value) == (
        "--device: a worker runs on one device, and there are cuda:0, cuda:1 and cuda:2; choose one of them"
    )
    with pytest.raises(DeviceError, match="--device cuda:0,cpu: a worker runs on one device"):
        choose_one("cuda:0,cpu", GPUS)
