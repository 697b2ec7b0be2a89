"""A disk whose process is killed under load: no write is lost, none comes twice."""

import random
import struct
import time
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from proxy.virtio.disk import Disk
from tests.proxy.virtio.guests import disk_on
from tests.system.served import WITHIN_S, Served
from tests.system.test_transparent import KILLS, PAUSE_S, kill, other_process, shown

SIZE = 16 << 20
WRITERS = 6
PLACES = 8
"""Of each writer, which it writes again and again."""
ROOM = SIZE // WRITERS // PLACES // 512 * 512
_HEAD = struct.Struct("<QQ")

CONFIG = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
[[backend]]
name = "far"
classes = ["virtio-blk"]
restart_limit = 1000000
deadline_s = 30
[[device]]
name = "disk0"
class = "virtio-blk"
bus = "bus0"
path = "PATH"
size = "16M"
queues = 2
"""


def content(writer: int, number: int, size: int) -> bytes:
    """What a writer writes as its write `number`; all of it says so."""
    return (_HEAD.pack(writer, number) * (size // _HEAD.size))[:size]


class Writers:
    """Write and read all the time; whatever is answered must have been done."""

    def __init__(self, disk: Disk) -> None:
        self.written = 0
        self.longest_s = 0.0
        self._disk = disk
        self._model: dict[tuple[int, int], bytes] = {}
        self._more = trio.lowlevel.ParkingLot()
        self._enough = False

    async def run(self) -> None:
        """Write until `stop`."""
        async with trio.open_nursery() as nursery:
            for writer in range(WRITERS):
                nursery.start_soon(self._write, writer)

    def stop(self) -> None:
        self._enough = True

    async def _write(self, writer: int) -> None:
        rng = random.Random(writer)
        number = 0
        while not self._enough:
            number += 1
            place = rng.randrange(PLACES)
            size = 512 * rng.choice([1, 1, 8, 8, 64, 200, ROOM // 512])
            data = content(writer, number, size)
            began = time.monotonic()
            await self._disk.write((writer * PLACES + place) * ROOM, data)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            before = self._model.get((writer, place), bytes(ROOM))
            self._model[writer, place] = data + before[size:]
            self.written += 1
            self._more.unpark_all()
            if rng.random() < 0.3:
                await self._check(writer, rng.randrange(PLACES))
            if rng.random() < 0.05:
                await self._disk.flush()

    async def _check(self, writer: int, place: int) -> None:
        expected = self._model.get((writer, place), bytes(ROOM))
        found = await self._disk.read((writer * PLACES + place) * ROOM, ROOM)
        assert found == expected, f"writer {writer} finds another write at {place}"

    async def check_all(self) -> None:
        for writer, place in self._model:
            await self._check(writer, place)

    async def go_on(self) -> None:
        """Wait until there is more than can have been under way."""
        wanted = self.written + 2 * WRITERS
        with trio.fail_after(WITHIN_S):
            while self.written < wanted:
                await self._more.park()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_no_write_is_lost_or_doubled_when_the_process_is_killed(
    tmp_path: Path, packed: bool
) -> None:
    """Issue 6: as often as VBUS_TEST_TRANSPARENT_KILLS says, at random moments.

    The driver's ring refuses an answer that comes twice; a write done again after a
    later one to the same place would be read.
    """
    choice = random.Random(packed)
    gaps = []
    config = CONFIG.replace("PATH", str(tmp_path / "image"))
    with Served(tmp_path, config) as daemon:
        async with (
            attach(daemon.socket("g1")) as bridge,
            disk_on(bridge, packed=packed) as disk,
        ):
            writers = Writers(disk)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writers.run)
                await writers.go_on()
                for _ in range(KILLS):
                    await trio.sleep(PAUSE_S + choice.random() / 2)
                    pid = await kill(daemon)
                    killed = time.monotonic()
                    await other_process(daemon, pid)
                    await writers.go_on()
                    gaps.append(time.monotonic() - killed)
                writers.stop()
            await writers.check_all()
        assert (await shown(daemon))["starts"] == KILLS + 1
        assert "Traceback" not in daemon.log.read_text()
    gaps.sort()
    print(
        f"{KILLS} kills, {writers.written} writes; writers go on after"
        f" {gaps[len(gaps) // 2]:.2f} s (median), {gaps[-1]:.2f} s at most;"
        f" longest write {writers.longest_s:.2f} s"
    )
