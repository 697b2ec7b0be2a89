"""A virtio disk of the daemon and its image: two ways to it, and sudden death."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
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
from tests.proxy.host import until
from tests.proxy.virtio.guests import disk_on
from tests.proxy.virtio.test_nbd import Client
from tests.system.served import Served
from vbus.errors import NoDeviceError, VbusError

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


WAYS = {
    "bridge": (("--bus", "bus0"), over_the_bridge),
    "function": (("--expose", "pci"), as_a_function),
}


async def test_an_image_is_the_same_by_both_ways(tmp_path: Path) -> None:
    """R13, R62: written by one way it is read by the other, in both directions."""
    image = tmp_path / "image"
    model = bytearray(SIZE)
    with Served(tmp_path, CONFIG) as served:
        for turn, name in enumerate(("bridge", "function", "bridge")):
            words, way = WAYS[name]
            await trio.to_thread.run_sync(add, served, image, f"size={SIZE}", *words)
            async with way(served) as disk:
                assert await disk.read(0, SIZE) == model
                await scribble(disk, model, turn)
                assert await disk.read(0, SIZE) == model
            await trio.to_thread.run_sync(remove, served)
        assert image.read_bytes() == model


async def hammer(disk: Disk) -> None:
    """Read and write for as long as it goes."""
    while True:
        await disk.write(RECORD, b"x" * RECORD)
        await disk.read(0, SIZE // 8)


async def test_a_disk_removed_under_load_is_gone_and_its_image_free(
    tmp_path: Path,
) -> None:
    """R8: the guest gets an error, the daemon goes on, the image can be used again."""
    image = tmp_path / "image"
    with Served(tmp_path, CONFIG) as served:
        words = [f"size={SIZE}", "--bus", "bus0"]
        ended = 0
        async with attach(served.socket("g1")) as bridge:
            for _ in range(2):
                await trio.to_thread.run_sync(add, served, image, *words)
                try:
                    async with disk_on(bridge) as disk, trio.open_nursery() as nursery:
                        for _ in range(8):
                            nursery.start_soon(hammer, disk)
                        await until(lambda disk=disk: disk.statistics().writes > 50)
                        await trio.to_thread.run_sync(remove, served)
                except* NoDeviceError:
                    ended += 1
                await until(lambda: not bridge.devices)
        assert ended == 2
        assert image.read_bytes()[RECORD : 2 * RECORD] == b"x" * RECORD


GUEST = """
import sys, trio
from pathlib import Path
from proxy.guest import attach
from tests.proxy.host import until
from tests.proxy.virtio.guests import disk_on
from tests.proxy.virtio.test_nbd import Client
from tests.system.test_virtio_disk import hammer

async def main(path):
    async with attach(path) as bridge, disk_on(bridge) as disk:
        print("ready", flush=True)
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(hammer, disk)

trio.run(main, sys.argv[1])
"""


async def test_a_guest_killed_under_load_leaves_the_disk_to_the_next(
    tmp_path: Path,
) -> None:
    """R26, R61: kill -9 of the guest; the device is reset and serves another."""
    with Served(tmp_path, CONFIG) as served:
        image = tmp_path / "image"
        words = [f"size={SIZE}", "--bus", "bus0"]
        await trio.to_thread.run_sync(add, served, image, *words)
        command = [sys.executable, "-c", GUEST, str(served.socket("g1"))]
        guest = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        assert guest.stdout is not None
        async with guest.stdout:
            with trio.fail_after(20):
                assert (await guest.stdout.receive_some()).startswith(b"ready")
                busy = partial(served.ask, "stats", "devices/disk0/io/writes")
                before = await trio.to_thread.run_sync(busy)
                while await trio.to_thread.run_sync(busy) < before + 20:
                    pass
            guest.kill()
            await guest.wait()
        await until(lambda: free(served))
        async with over_the_bridge(served) as disk:
            assert await disk.read(RECORD, RECORD) == b"x" * RECORD


def free(served: Served) -> bool:
    """Nobody is attached."""
    (guest,) = served.ask("guest", "show", "g1")
    return not guest["attached"]


async def connected(path: Path) -> trio.SocketStream:
    """Connect as soon as somebody listens."""
    with trio.fail_after(60):
        while True:
            try:
                return await trio.open_unix_socket(str(path))
            except OSError:
                await trio.sleep(0.02)


async def test_the_command_serves_a_disk_by_nbd(tmp_path: Path) -> None:
    """R13, R61: `vbus guest run --set`, and a client of the public protocol."""
    path = tmp_path / "nbd"
    with Served(tmp_path, CONFIG) as served:
        image = tmp_path / "image"
        words = [f"size={SIZE}", "--bus", "bus0"]
        await trio.to_thread.run_sync(add, served, image, *words)
        command = [sys.executable, "-m", "vbus", "guest", "run"]
        command += [str(served.socket("g1")), "--set", f"disk0.nbd={path}"]
        guest = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        try:
            async with await connected(path) as stream:
                client = Client(stream)
                assert await client.begin() == SIZE
                data = os.urandom(1 << 20)
                assert await client.ask(1, 0, len(data), data, flags=1) == (0, b"")
                assert await client.ask(0, 0, len(data)) == (0, data)
            assert image.read_bytes()[: len(data)] == data
        finally:
            guest.terminate()
            with trio.fail_after(10):
                await guest.wait()
            assert guest.stdout is not None
            await guest.stdout.aclose()
        assert guest.returncode == 0
    assert not path.exists()


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
@pytest.mark.parametrize("name", WAYS)
async def test_a_killed_daemon_loses_nothing_that_was_flushed(
    tmp_path: Path, name: str, cache: str
) -> None:
    """Twice: writes and flushes under way, kill -9, and every mark holds."""
    words, way = WAYS[name]
    image = tmp_path / "image"
    log = WriteLog(cache, durable=cache == "writethrough")
    for turn in range(2):
        folder = tmp_path / f"turn{turn}"
        folder.mkdir()
        with Served(folder, CONFIG) as served:
            about = (f"size={SIZE}", f"cache={cache}", *words)
            await trio.to_thread.run_sync(add, served, image, *about)
            try:
                async with way(served) as disk:
                    if turn == 0:
                        await log.lay(disk)
                    await log.work(disk, served.process.kill)
            except* VbusError:  # the host is gone
                pass
            assert served.process.wait() == -signal.SIGKILL
        assert log.flushes >= 40
        log.check(image.read_bytes())
