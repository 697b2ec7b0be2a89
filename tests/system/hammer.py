"""A guest that writes garbage wherever a guest can write; run as a process of its own.

    python -m tests.system.hammer SOCKET SEED SECONDS

Sets itself up as a driver does, so that there are rings, handles and signals to ruin,
and then ruins registers, call structures, rings, descriptors, signal bytes, events.
"""

import os
import random
import sys

import trio

from ioq import Ring, ring_size
from proxy.memory import DmaMemory
from proxy.pci import PciFunction
from proxy.vfio_user import connect
from vbus import abi
from vbus.errors import VbusError
from vbus.pci.constants import Command, Irq

ARGUMENT, CHANNEL, DATA, EVENTS, BUFFERS, RINGS = (
    (1 << 20) + (nth << 16) for nth in range(6)
)
EDGES = (0, 1, 2, 3, 7, 8, 55, 56, 64, 144, 255, 2048, 2049, 4096, 65536)
HUGE = (1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - 1, 1 << 20, RINGS, DATA)


class Hammer:
    """One attached life of the hostile guest."""

    def __init__(self, function: PciFunction, memory: DmaMemory, seed: int) -> None:
        self.function = function
        self.space = memory.space
        self.random = random.Random(seed)
        self.handle = 0

    def number(self) -> int:
        return self.random.choice((*EDGES, *HUGE, self.random.getrandbits(64)))

    async def bridge_call(self, vector: int, argument: bytes) -> int:
        self.space.write(ARGUMENT, argument)
        call = abi.CALL.pack(abi.CallDescriptor(vector, len(argument), ARGUMENT))
        for at in range(0, 16, 4):
            await self.function.bar_write(abi.BAR_CALLS, at, call[at : at + 4])
        raw = await self.function.bar_read(abi.BAR_CALLS, 0, 4)
        return int.from_bytes(raw, "little", signed=True)

    async def hypercall(self, vector: int, argument: bytes) -> int:
        self.space.write(ARGUMENT, argument)
        call = abi.FastCall(vector, len(argument), ARGUMENT, -1)
        self.space.write(CHANNEL, abi.FASTCALL.pack(call))
        await self.function.bar_write(abi.BAR_SIGNALS, abi.SIGNAL_FASTCALL, bytes(4))
        raw = self.space.read(CHANNEL + abi.RESULT_OFFSET, 4)
        return int.from_bytes(raw, "little", signed=True)

    def ring(self, at: int, count: int) -> None:
        Ring.format(self.space.view(at, ring_size(count)), count)

    async def set_up(self) -> None:
        """Everything right, as far as a ring of 64 and an open echo device."""
        await self.function.set_command(Command.MEMORY | Command.BUS_MASTER, on=True)
        await self.function.enable_interrupts(Irq.MSIX, 8)
        negotiate = abi.Negotiate(abi.NEGOTIATE_MAGIC, 1, abi.CAPABILITIES)
        await self.bridge_call(0, abi.NEGOTIATE.pack(negotiate))
        channel = abi.CallDescriptor(0, abi.FASTCALL.size, CHANNEL)
        await self.bridge_call(3, abi.CALL.pack(channel))
        self.ring(EVENTS, 64)
        await self.bridge_call(1, abi.pack_qreg([abi.QueueEntry(64, EVENTS, BUFFERS)]))
        await self.hypercall(0, abi.DEVOPEN.pack(abi.DeviceOpen(0, 1, 0)))
        self.handle = abi.DEVOPEN.unpack(self.space.read(ARGUMENT, 16)).handle
        for ident in (0, 1):
            at = RINGS + 0x4000 * ident
            self.ring(at, 64)
            shm = abi.DeviceShm(self.handle, ident, ring_size(64), 0, 8, 0, ident, at)
            await self.hypercall(3, abi.DEVSHM.pack(shm))

    async def strike(self) -> None:
        """One thing no driver would do."""
        await self.random.choice(
            (self.scribble, self.scribble, self.register, self.bridge, self.device)
        )()

    async def scribble(self) -> None:
        """Ruin rings and events, with values near the allowed ones, and ring."""
        for _ in range(self.random.randrange(1, 64)):
            area = self.random.choice((EVENTS, RINGS, RINGS + 0x4000, BUFFERS, CHANNEL))
            size = self.random.choice((1, 1, 4, 8))
            at = area + size * self.random.randrange((56 + 64 * 32) // size)
            value = self.number() & ((1 << 8 * size) - 1)
            self.space.write(at, value.to_bytes(size, "little"))
        window = self.random.choice((abi.SIGNAL_EVENTQ, abi.SIGNAL_SHM))
        self.function.ring_doorbell(
            abi.BAR_SIGNALS, window, self.random.choice((0, 1, 2, 99))
        )

    async def register(self) -> None:
        bar = self.random.choice((0, 1, 2, 3, 6, 7, 8))
        offset = self.random.choice((0, 4, 8, 63, 0x40, 0x50, self.number() & 0xFFF))
        size = self.random.choice((1, 2, 4, 8, 16))
        if self.random.random() < 0.5:
            await self.function.bar_read(bar, offset, size)
        else:
            await self.function.bar_write(bar, offset, self.random.randbytes(size))

    async def bridge(self) -> None:
        numbers = b"".join(self.number().to_bytes(8, "little") for _ in range(26))
        size = self.random.choice((0, 8, 16, 16, 24, 32, 32, 56, 200))
        await self.bridge_call(self.random.randrange(1, 7), numbers[:size])

    async def device(self) -> None:
        handle = self.random.choice((self.handle, self.handle, self.number()))
        numbers = b"".join(self.number().to_bytes(8, "little") for _ in range(11))
        vector = self.random.randrange(6)
        size = self.random.choice((8, 16, 32, 48, 88, 88))
        await self.hypercall(vector, (handle.to_bytes(8, "little") + numbers)[:size])


async def life(path: str, seed: int, strikes: int) -> None:
    """Attach, behave, misbehave, and go without a word."""
    with DmaMemory(2 << 20) as memory:
        async with connect(path, memory) as function:
            hammer = Hammer(function, memory, seed)
            await hammer.set_up()
            for _ in range(strikes):
                try:
                    await hammer.strike()
                except VbusError:
                    if hammer.random.random() < 0.1:
                        return


async def main(path: str, seed: int, seconds: float) -> None:
    lives = 0
    with trio.move_on_after(seconds):
        while True:
            try:
                await life(path, seed + lives, 200)
            except* VbusError:
                pass
            lives += 1
    print(lives)


if __name__ == "__main__":
    os.nice(5)
    trio.run(main, sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
