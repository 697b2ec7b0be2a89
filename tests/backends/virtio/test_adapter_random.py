"""Any sequence of calls, memory and kicks: the adapter stays sane (R13, R50)."""

import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from backends.venet import Switch
from backends.virtio.adapter import VirtioOnBus
from backends.virtio.classes import (
    VirtioBlkDevice,
    VirtioConsoleDevice,
    VirtioNetDevice,
    VirtioRngDevice,
)
from tests.backends.virtio.bus import LIVE, SETUP, SIGNAL_AT, BusGuest, on_bus
from vbus.virtio.adapter import CONFIG_SHM
from vbus.virtio.common import Ring, Status, bits

KINDS: dict[str, tuple[type[VirtioOnBus], dict[str, Any]]] = {
    "blk": (VirtioBlkDevice, {"size": "1M", "queues": 2}),
    "console": (VirtioConsoleDevice, {"to": "pty,pty"}),
    "net": (VirtioNetDevice, {"switch": "sw", "pairs": 2}),
    "rng": (VirtioRngDevice, {}),
}
STEPS = 300
RINGS = bits(Ring.VERSION_1, Ring.INDIRECT_DESC, Ring.EVENT_IDX, Ring.RESET)


class Hostile:
    """A guest that knows the calls and keeps no rule."""

    def __init__(self, guest: BusGuest, seed: int) -> None:
        self.guest = guest
        self.rng = random.Random(seed)
        self.queues = len(guest.device.model.queues)
        rare = [self.call, self.status, self.negotiate, self.share, self.enable]
        often = [self.chain, self.chain, self.kick, self.guest.settle]
        self.actions = [*rare, *3 * [self.bring_up, self.scribble], *10 * often]

    async def step(self) -> None:
        action = self.rng.choice(self.actions)
        with suppress(OSError, MemoryError):
            await action()

    def number(self) -> int:
        return self.rng.choice([0, 1, 2, 3, 7, 8, 64, 255, 256, 1 << 16, 0xFFFF_FFFF])

    async def call(self) -> None:
        size = self.rng.choice([0, 4, 8, 9, 16, 24, 40])
        data = self.rng.randbytes(size)
        if size >= 4 and self.rng.random() < 0.7:
            data = self.number().to_bytes(4, "little") + data[4:]
        await self.guest.call(self.rng.randrange(12), data)

    async def status(self) -> None:
        await self.guest.status(self.rng.choice([0, 1, 3, 11, LIVE, LIVE, 128, 255]))

    async def negotiate(self) -> None:
        offered = self.guest.device.model.offered
        features = offered & self.rng.choice([RINGS, offered, self.rng.getrandbits(64)])
        await self.guest.negotiate(features | self.rng.choice([0, 1 << 32]))

    async def bring_up(self) -> None:
        await self.guest.negotiate(self.guest.device.model.offered & RINGS)
        for index in range(self.queues):
            with suppress(OSError):
                await self.guest.share(index)
            self.guest.shared[index].view.write(0, bytes(SIGNAL_AT))
            await self.guest.enable(index, 8, 0, 0x100, 0x200)
        await self.guest.status(LIVE)

    async def share(self) -> None:
        await self.guest.share(self.rng.choice([*range(self.queues), CONFIG_SHM]))

    async def enable(self) -> None:
        size = self.rng.choice([1, 2, 4, 8, 16, 3])
        at = self.rng.choice([0, 0, 0, 16, 4000])
        index = self.rng.randrange(self.queues)
        await self.guest.enable(index, size, at, at + 0x100, at + 0x200)

    async def scribble(self) -> None:
        if self.guest.shared:
            view = self.rng.choice(list(self.guest.shared.values())).view
            at = self.rng.randrange(view.size - 16)
            view.write(at, self.rng.randbytes(self.rng.choice([1, 2, 8, 16])))

    async def chain(self) -> None:
        """A descriptor that may be good, and an index that says it is there."""
        index = self.rng.randrange(self.queues)
        if index not in self.guest.shared:
            return
        view = self.guest.shared[index].view
        address = self.guest.peer.base + self.rng.randrange(1 << 16)
        size = self.rng.choice([16, 16, 17, 64, 512, 513, 4096, 0, 0xFFFF_FFFF])
        flags = self.rng.choice([0, 1, 1, 2, 2, 3, 4])
        at = self.rng.randrange(8)
        following = self.rng.choice([at + 1, at + 1, at + 1, 0, 9]) % 10
        entry = struct.pack("<QIHH", address, size, flags, following)
        view.write(16 * at, entry)
        seen = int.from_bytes(view.read(0x102, 2), "little")
        view.write(0x104 + 2 * (seen % 8), bytes([at, 0]))
        seen = seen + self.rng.choice([0, 0, 1, 1, 1, 2]) & 0xFFFF
        view.write(0x102, seen.to_bytes(2, "little"))

    async def kick(self) -> None:
        self.guest.kick_if_shared(self.rng.randrange(self.queues))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
async def test_no_guest_breaks_more_than_its_device(
    kind: str, seed: int, tmp_path: Path
) -> None:
    """After any such life the same connection can be reset and used as if new."""
    device_class, attributes = KINDS[kind]
    if kind == "blk":
        attributes = {**attributes, "path": str(tmp_path / "disk")}
    others = {"sw": Switch} if kind == "net" else {}
    async with on_bus(device_class, others=others, **attributes) as guest:
        hostile = Hostile(guest, seed)
        for _ in range(STEPS):
            await hostile.step()
            guest.recorded.check()
        await guest.settle()
        model = guest.device.model
        assert model.statistics().resets > 10
        assert guest.device.adapter_statistics().kicks > 10
        assert await guest.status(0) == 0
        assert model.broken is None
        assert await guest.negotiate(RINGS) == SETUP | Status.FEATURES_OK
        for index in range(hostile.queues):
            if index not in guest.shared:
                await guest.share(index)
            guest.shared[index].view.write(0, bytes(SIGNAL_AT))
            await guest.enable(index, 8, 0, 0x100, 0x200)
        assert await guest.status(LIVE) == LIVE
        await guest.settle()
        assert await guest.status() == LIVE
        assert guest.recorded.effects.failures == []  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="busy"):
            await guest.enable(0, 8, 0, 0x100, 0x200)
