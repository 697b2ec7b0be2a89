"""A machine that lies about its memory hurts nobody but itself (R50, issue 3).

The liar is `liar.py`, in the guest. Beside it two guests that are processes work on the
same bus and switch all the time; their memory holds canaries, and so does the liar's
own machine on both sides of what it shares.
"""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from proxy.bridge import BridgeDriver
from proxy.drivers.venet import VenetDriver
from proxy.guest import attach
from proxy.memory import DmaBuffer
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_life import Bystander, asked, held, shown, until
from vbus.vm.machine import VirtualMachine

NAMES = ("vm1", "first", "second")
CONFIG = """
[[device]]
name = "lan0"
class = "switch"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "net-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[device]]
name = "{echo}"
class = "echo"
bus = "{name}"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name, echo in zip(NAMES, ("echo0", "echo1", "echo2"), strict=True)
)
EFAULT = {"negotiate", "slow call", "channel", "call", "share"}
CANARY = b"canary!!" * (1 << 17)
MEMORY_MIB = 768
RAM_END = MEMORY_MIB << 20
OUTSIDE = [1 << 40, (1 << 64) - (1 << 16), RAM_END - 4, RAM_END, 0xFEC0_0000]
WRAPPING = (1 << 64) - 8
FLASH = [0xFFFC_0000, 0xFFFF_FFF0]
"""The firmware's own, which QEMU maps without a descriptor."""
SHADOW = 0xF_0000
"""The firmware's copy in the guest's memory, mapped read-only."""


class Neighbours:
    """Two guests in this process: calls and frames flow, canaries stand."""

    def __init__(self, bridges: list[BridgeDriver], drivers: list[VenetDriver]) -> None:
        self.calls = Bystander(bridges[0])
        self._drivers = drivers
        self._canaries: list[DmaBuffer] = []
        for bridge in bridges:
            buffer = bridge.function.memory.allocate(len(CANARY))
            buffer.view.write(0, CANARY)
            self._canaries.append(buffer)

    def received(self) -> list[int]:
        found = [driver.statistics().exchange for driver in self._drivers]
        return [one.received_frames if one else 0 for one in found]

    async def goes_on(self) -> None:
        """Wait for a hundred more calls, and frames at both ends; then look."""
        before = self.received()
        await self.calls.goes_on()
        with trio.fail_after(60):
            while min(map(int.__sub__, self.received(), before)) < 100:  # noqa: ASYNC110
                await trio.sleep(0.005)
        assert [one.view.read() for one in self._canaries] == [CANARY, CANARY]


@asynccontextmanager
async def neighbours(served: Served) -> AsyncIterator[Neighbours]:
    async with (
        attach(served.socket("first"), memory_mib=16) as first,
        attach(served.socket("second"), memory_mib=16) as second,
        trio.open_nursery() as nursery,
    ):
        bridges = [first, second]
        drivers = [
            VenetDriver(await bridge.device(f"net-{name}"), {"frames": True})
            for bridge, name in zip(bridges, NAMES[1:], strict=True)
        ]
        for driver in drivers:
            nursery.start_soon(driver.run, lambda _: None)
        found = Neighbours(bridges, drivers)
        nursery.start_soon(found.calls.run, await first.open("echo1"))
        await found.goes_on()
        yield found
        await found.goes_on()
        nursery.cancel_scope.cancel()


async def run_liar(name: str, arguments: list[object]) -> object:
    """In the guest."""
    import importlib
    import sys

    sys.path.insert(0, "/tmp")
    value: object = await getattr(importlib.import_module("liar"), name)(*arguments)
    return value


async def lie(vm: VirtualMachine, name: str, *arguments: Any) -> Any:
    source = Path(__file__).with_name("liar.py").read_bytes()
    await vm.put("/tmp/liar.py", source)
    return await vm.python(run_liar, name, arguments)


def refused(answers: dict[str, int]) -> set[str]:
    return {what for what, result in answers.items() if result == -errno.EFAULT}


def warnings(served: Served, words: str) -> int:
    return sum(words in line for line in served.log.read_text().splitlines())


async def failures(served: Served) -> int:
    counted = await asked(served, "stats", path="guests/vm1/bridge")
    return int(counted["connection_failures"])


async def test_addresses_outside_and_in_roms_are_refused_without_an_iommu(
    daemon: Daemon, boot: Boot
) -> None:
    """R50: each kind of call, descriptors of rings, and the event queue itself."""
    served = daemon(CONFIG)
    async with (
        neighbours(served) as others,
        boot(served.socket("vm1"), iommu=None, memory_mib=MEMORY_MIB) as vm,
    ):
        before = await held(served)
        for answer in await lie(vm, "calls_at", OUTSIDE + FLASH):
            assert refused(answer) == EFAULT
        wrapping, shadow = await lie(vm, "calls_at", [WRAPPING, SHADOW])
        assert refused(wrapping) == EFAULT - {"share"}
        assert wrapping["share"] == -errno.EINVAL
        # It may be read, and says nothing that is a call; it is never written.
        assert refused(shadow) == {"channel", "call", "share"}
        assert shadow["negotiate"] == shadow["slow call"] == -errno.EINVAL
        assert await failures(served) == 0
        await others.goes_on()

        reads = [1 << 40, RAM_END - 8, FLASH[0]]
        writes = [1 << 40, RAM_END - 8, FLASH[0], SHADOW]
        ends = await lie(vm, "lying_rings", reads, writes)
        assert set(ends) == {"NoDeviceError"}
        assert await failures(served) == len(ends)
        assert warnings(served, "buffer-address") == len(ends)
        await others.goes_on()

        for at in (1 << 40, SHADOW):
            found = await lie(vm, "lying_event_queues", at)
            refusals = {"ring": -errno.EFAULT, "data": -errno.EFAULT}
            assert found == refusals | {"descriptors": 0}
        assert warnings(served, "event queue 0") == 2
        assert await lie(vm, "calls_at", []) == []
        assert (await shown(served))["connections"] == []
        await until(lambda: held(served), before)


async def test_what_the_guest_unmaps_is_never_touched_again(
    daemon: Daemon, boot: Boot
) -> None:
    """R50: by the IOMMU, at rest and while two backends copy from it and to it."""
    served = daemon(CONFIG)
    async with (
        neighbours(served) as others,
        boot(served.socket("vm1"), words=["guest.hugepages=64"]) as vm,
    ):
        before = await held(served)
        found = await lie(vm, "use_after_unmap")
        print(found)
        assert refused(found["never mapped"]) == EFAULT
        assert [refused(edge) for edge in found["edges"]] == [EFAULT, EFAULT]
        assert (found["mapped"], found["channel"]) == (0, 0)
        assert refused(found["unmapped"]) == EFAULT
        assert found["ring"] == "NoDeviceError"
        assert found["unmapped is unchanged"]
        assert found["calls left it"]
        assert found["its successor is unchanged"]
        assert found["intact"]
        assert found["again"] == 0
        assert await failures(served) == 1
        await others.goes_on()

        found = await lie(vm, "unmap_while_copied", 20, 1)
        print(found)
        assert found["copied"]["echo"] > 0
        assert found["copied"]["frames"] > 0
        assert (found["late"], found["intact"], found["again"]) == (0, True, 0)
        await others.goes_on()
        assert len(found["ends"]) == 20
        assert await failures(served) == 21
        assert warnings(served, "to echo0: open> failed: ") == 21
        told = served.log.read_text()
        assert "Traceback" not in told
        assert (await shown(served))["connections"] == []
        await until(lambda: held(served), before)
        counted = await asked(served, "stats", path="guests/vm1")
        print(counted)
        assert counted["memory"]["faults"] > 21
        assert counted["memory"]["mapped_bytes"] == 0
