"""What models run on: which GPUs this process may use, and which of them ``--device`` names. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.worker.gpus import Gpu

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"

_CUDA: Final = re.compile(r"cuda(?::(\d{1,4}))?", re.ASCII)


class DeviceError(Exception):
    """There is no such device; the message says what there is."""


class Device(NamedTuple):
    """``name``: "cpu" or "cuda:N", counted among the GPUs that are visible here. The rest is a GPU's: its UUID, which
    is what CUDA_VISIBLE_DEVICES takes, its address in sysfs, and why nothing can run on it, or ""."""

    name: str
    uuid: str = ""
    pci: str = ""
    unusable: str = ""


CPU: Final = Device("cpu")


def visible(gpus: Sequence[Gpu], inherited: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: numbers of GPUs, UUIDs, or beginnings of these that fit one
    alone. As in CUDA, what fits none ends the list, so that -1 and nothing at all are no GPU; not set, it is all. What
    names a GPU that is divided means its first slice. (CUDA counts the fastest GPU first unless CUDA_DEVICE_ORDER is
    PCI_BUS_ID, which is how nvidia-smi counts, and this: where GPUs differ, UUIDs say more.)"""
    if inherited is None:
        return list(gpus)
    found: list[Gpu] = []
    for word in inherited.split(","):
        gpu = _find(gpus, word.strip())
        if gpu is None or gpu in found:
            break
        found.append(gpu)
    return found


def _find(gpus: Sequence[Gpu], word: str) -> Gpu | None:
    if word.isascii() and word.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(word)), None)
    word = word.lower()
    if word.startswith("gpu-"):  # of a whole GPU, which its slices are parts of
        fitting = [gpu for gpu in gpus if (gpu.parent or gpu.uuid).lower().startswith(word)]
        return fitting[0] if len({gpu.index for gpu in fitting}) == 1 else None
    fitting = [gpu for gpu in gpus if gpu.uuid.lower().startswith(word)]
    return fitting[0] if word.startswith("mig-") and len(fitting) == 1 else None


def choose(asked: str | None, gpus: Sequence[Gpu], inherited: str | None = None, absent: str = "") -> list[Device]:
    """The devices that ``--device`` names: "cpu", "cuda:0", "cuda" for every GPU, or several of them with commas
    between; None: every GPU that can be used, else the CPU. ``absent``: why no driver answers. Raises DeviceError."""
    cuda = [
        Device(f"cuda:{number}", gpu.uuid, gpu.pci, gpu.unusable) for number, gpu in enumerate(visible(gpus, inherited))
    ]
    if asked is None:
        usable = [device for device in cuda if not device.unusable]
        if cuda and not usable:
            raise DeviceError(
                f"no GPU can be used ({cuda[0].name}: {cuda[0].unusable}); --device cpu runs models on the CPU"
            )
        return usable or [CPU]
    found: list[Device] = []
    for word in asked.split(","):
        match = _CUDA.fullmatch(word)
        if match is None and word != CPU.name:
            raise DeviceError(f"--device {asked}: '{word}' is no device; models run on cpu, cuda:0, cuda:1, ...")
        if match is None:
            more = [CPU]
        elif not cuda:
            raise DeviceError(f"--device {asked}: {_no_gpu(gpus, inherited, absent)}")
        elif match[1] is None:
            more = cuda
        elif int(match[1]) < len(cuda):
            more = [cuda[int(match[1])]]
        else:
            hidden = f", of which {VISIBLE}={inherited} leaves {_list(cuda)}"
            there = f"this machine has {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
            sentence = there + (f", {_list(cuda)}" if len(cuda) == len(gpus) else hidden)
            raise DeviceError(f"--device {asked}: {sentence}")
        for device in more:
            if device in found:
                raise DeviceError(
                    f"--device {asked}: {device.name} is there twice; --workers 2 starts two on each device"
                )
            found.append(device)
    return found


def choose_one(asked: str | None, gpus: Sequence[Gpu], inherited: str | None = None, absent: str = "") -> Device:
    """The device of a single worker. Raises DeviceError, also when there are several to choose from."""
    found = choose(asked, gpus, inherited, absent)
    if len(found) > 1:
        wanted = "--device" if asked is None else f"--device {asked}"
        raise DeviceError(f"{wanted}: a worker runs on one device, and there are {_list(found)}; choose one of them")
    return found[0]


def _no_gpu(gpus: Sequence[Gpu], inherited: str | None, absent: str) -> str:
    way_out = "or leave --device out to run on the CPU"
    if absent:
        return f"no NVIDIA driver answers ({absent}); install it, {way_out}"
    if gpus:
        return f"{VISIBLE}={inherited} hides every GPU; unset it, {way_out}"
    return f"the NVIDIA driver knows no GPU here; see what nvidia-smi says, {way_out}"


def _list(devices: Sequence[Device]) -> str:
    """ "cuda:0, cuda:1 and cuda:2" """
    names = [device.name for device in devices]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
