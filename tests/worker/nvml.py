"""A stand-in for NVIDIA's library, where there is none: GPUs that tests make up, behind the functions of pynvml.

Its constants and errors are pynvml's own. What a GPU does not know it answers with NOT_SUPPORTED, as real ones do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


def error(name: str) -> pynvml.NVMLError:
    return pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{name}"))


@dataclass
class Card:
    """What a GPU or slice knows, by the name of the function that asks for it, without nvmlDeviceGet. An error is
    raised. ``fails``: what every call raises, from now on."""

    uuid: str
    known: dict[str, Any] = field(default_factory=dict)
    slices: list[Card | None] = field(default_factory=list)
    whole: Card | None = None
    fails: str = ""

    def ask(self, what: str) -> Any:
        if self.fails:
            raise error(self.fails)
        answer = self.known.get(what, error("NOT_SUPPORTED"))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Nvml:
    """The module. ``absent``: the error of nvmlInit."""

    def __init__(self, *cards: Card, absent: str = "") -> None:
        self.cards = cards
        self.absent = absent

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceGet"):
            getattr(pynvml, name)  # it must exist
            return lambda card, *arguments: card.ask(name.removeprefix("nvmlDeviceGet"))
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        if self.absent:
            raise error(self.absent)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        if self.cards[index].fails:
            raise error(self.cards[index].fails)
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        slices = [each for card in self.cards for each in card.slices if each is not None]
        for card in (*self.cards, *slices):
            if card.uuid == uuid and card.fails != "NOT_FOUND":
                return card
        raise error("NOT_FOUND")

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return len(card.slices)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        found = card.slices[index]
        if found is None:
            raise error("NOT_FOUND")
        return found

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: Card) -> Card:
        assert card.whole is not None
        return card.whole


def memory(used: int, total: int) -> SimpleNamespace:
    return SimpleNamespace(used=used, total=total, free=total - used)


def h100(uuid: str = "GPU-11111111-aaaa", bus: str = "00000000:3B:00.0") -> Card:
    """One that knows everything, is busy, and at its limit of power."""
    return Card(
        uuid,
        {
            "Name": "NVIDIA H100 80GB HBM3",
            "PciInfo": SimpleNamespace(busId=bus),
            "MemoryInfo": memory(20 << 30, 80 << 30),
            "MigMode": (0, 0),
            "UtilizationRates": SimpleNamespace(gpu=93, memory=40),
            "Temperature": 61,
            "PowerUsage": 512_345,
            "EnforcedPowerLimit": 700_000,
            "TotalEnergyConsumption": 9_876_543,
            "CurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonSwPowerCap,
            "TotalEccErrors": 7,
            "RemappedRows": (0, 1, 0, 0),
        },
    )


def divided(uuid: str = "GPU-22222222-bbbb") -> Card:
    """One with two slices and a free place. A slice knows its memory alone."""
    card = h100(uuid, "00000000:86:00.0")
    card.known["MigMode"] = (1, 1)
    for number in range(2):
        known = {"Name": "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "MemoryInfo": memory(1 << 30, 40 << 30)}
        card.slices.append(Card(f"MIG-{number}0000000-cccc", known, whole=card))
    card.slices.insert(1, None)
    return card
