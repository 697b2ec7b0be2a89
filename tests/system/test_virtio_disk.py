"""A virtio disk of the daemon and its image: two ways to it, and sudden death."""

import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from proxy.memory import DmaMemory
from proxy.tasks import beside
from proxy.vfio_user import connect
from proxy.virtio.device import VirtioDevice
from proxy.virtio.disk import Disk
from proxy.virtio.pci import ModernTransport, opened
from tests.proxy.virtio.guests import disk_on
from tests.system.served import Served
from vbus.errors import VbusError

CONFIG = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""
SIZE = 8 << 20
RECORD = 4096


def add(served: Served, image: Path, *words: str) -> None:
    about = ("--class", "virtio-blk", f"path={image}", "queues=2")
    done = served.vbus("device", "add", "disk0", *about, *words)
    assert done.returncode == 0, done.stderr


def remove(served: Served) -> None:
    assert served.vbus("device", "del", "disk0").returncode == 0


@asynccontextmanager
async def over_the_bridge(served: Served) -> AsyncIterator[Disk]:
    async with attach(served.socket("g1")) as bridge, disk_on(bridge) as disk:
        yield disk


@asynccontextmanager
async def as_a_function(served: Served) -> AsyncIterator[Disk]:
    socket = served.runtime / "functions" / "disk0.sock"
    with DmaMemory(16 << 20) as memory:
        async with (
            connect(socket, memory) as client,
            opened(await ModernTransport.find(client, "disk0")) as transport,
        ):
            disk = Disk(VirtioDevice(transport, await transport.identify()))
            await disk.start()
            async with beside(disk.run):
                yield disk


async def scribble(disk: Disk, model: bytearray, seed: int) -> None:
    """Write all over it, from several tasks."""
    rng = random.Random(seed)

    async def worker(first: int) -> None:
        for _ in range(30):
            size = 512 * rng.randrange(1, 300)
            at = first + 512 * rng.randrange((SIZE // 4 - size) // 512)
            data = rng.randbytes(size)
            model[at : at + size] = data
            await disk.write(at, data)

    async with trio.open_nursery() as nursery:
        for n in range(4):
            nursery.start_soon(worker, n * SIZE // 4)
    await disk.flush()


async def test_an_image_is_the_same_by_both_ways(tmp_path: Path) -> None:
    """R13, R62: written by one way it is read by the other, in both directions."""
    image = tmp_path / "image"
    model = bytearray(SIZE)
    ways = [([], over_the_bridge), (["--expose", "pci"], as_a_function)]
    with Served(tmp_path, CONFIG) as served:
        for turn in range(4):
            words, way = ways[turn % 2]
            words = words or ["--bus", "bus0"]
            await trio.to_thread.run_sync(add, served, image, f"size={SIZE}", *words)
            async with way(served) as disk:
                assert await disk.read(0, SIZE) == model
                await scribble(disk, model, turn)
                assert await disk.read(0, SIZE) == model
            await trio.to_thread.run_sync(remove, served)
        assert image.read_bytes() == model


def record(number: int, generation: int) -> bytes:
    return random.Random(f"{number}.{generation}").randbytes(RECORD)


class WriteLog:
    """What was written of each record, with marks where a flush was answered."""

    def __init__(self, seed: str, *, durable: bool) -> None:
        self.count = SIZE // RECORD
        self.begun = [0] * self.count
        """The newest generation of which the write was begun."""
        self.answered = [0] * self.count
        self.covered = [0] * self.count
        """The newest that was answered before a flush began which was answered."""
        self.flushes = 0
        self._durable = durable
        self._rng = random.Random(seed)

    async def lay(self, disk: Disk) -> None:
        for number in range(self.count):
            await disk.write(number * RECORD, record(number, 0))
        await disk.flush()

    async def work(self, disk: Disk, kill: Callable[[], object]) -> None:
        """Four writers; after 40 flushes the daemon is killed under them."""
        self.flushes = 0
        async with trio.open_nursery() as nursery:
            for n in range(4):
                nursery.start_soon(self._worker, disk, n, kill)

    async def _worker(self, disk: Disk, first: int, kill: Callable[[], object]) -> None:
        while True:
            number = first + 4 * self._rng.randrange(self.count // 4)
            self.begun[number] += 1
            generation = self.begun[number]
            await disk.write(number * RECORD, record(number, generation))
            self.answered[number] = generation
            if self._durable:
                self.covered[number] = generation
            if self._rng.random() < 0.05:
                mark = list(self.answered)
                await disk.flush()
                self.covered = list(map(max, self.covered, mark))
                self.flushes += 1
                if self.flushes == 40:
                    kill()

    def check(self, image: bytes) -> None:
        """Each record is whole, and none is older than its mark."""
        for number in range(self.count):
            found = image[number * RECORD : (number + 1) * RECORD]
            allowed = range(self.covered[number], self.begun[number] + 1)
            which = [each for each in allowed if record(number, each) == found]
            assert which, f"record {number} is none of {allowed}"
            self.covered[number] = self.answered[number] = which[0]
        assert len(image) == SIZE


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
async def test_a_killed_daemon_loses_nothing_that_was_flushed(
    tmp_path: Path, cache: str
) -> None:
    """Three times: writes and flushes under way, kill -9, and every mark holds."""
    image = tmp_path / "image"
    log = WriteLog(cache, durable=cache == "writethrough")
    for turn in range(3):
        folder = tmp_path / f"turn{turn}"
        folder.mkdir()
        with Served(folder, CONFIG) as served:
            words = [f"size={SIZE}", f"cache={cache}", "--bus", "bus0"]
            await trio.to_thread.run_sync(add, served, image, *words)
            try:
                async with over_the_bridge(served) as disk:
                    if turn == 0:
                        await log.lay(disk)
                    await log.work(disk, served.process.kill)
            except* VbusError:  # the host is gone
                pass
            assert served.process.wait() == -signal.SIGKILL
        assert log.flushes >= 40
        log.check(image.read_bytes())
