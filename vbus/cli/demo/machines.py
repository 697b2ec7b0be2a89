"""What happens in `vbus demo --vm`: two virtual machines, a process and the host.

The order is its own, because machines boot side by side and everything that they move
is checked; what happens at each step is the scenario's.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from vbus.cli.demo import report
from vbus.cli.demo.machine import MachineGuest, MachineStage
from vbus.cli.demo.scenario import HOST, Scenario, config
from vbus.cli.demo.stage import DemoError, Place
from vbus.vm.arguments import Iommu

PINGS = 50
MIB = 64
PORT = "7007"
# Under way for longer than a QEMU takes to die.
KILL_MIB = 256
FREED_WITHIN_S = 5
ADDRESSES = {"vm1": "10.90.0.11", "vm2": "10.90.0.12", "p3": "10.90.0.13"}
# The one is driven by VFIO behind its IOMMU, the other has none and is driven by uio.
MACHINES: dict[str, Iommu | None] = {"vm1": "intel", "vm2": None}


class MachineScenario(Scenario):
    """One run with virtual machines."""

    def __init__(self, stage: MachineStage) -> None:
        super().__init__(stage, 0, frames=False)
        self.addresses = ADDRESSES
        guests: dict[str, Any] = {name: {} for name in self.addresses}
        self.result = {"accelerator": stage.accelerator, "guests": guests}

    async def run(self) -> None:
        """Everything. Raises DemoError, VbusError."""
        await self.stage.serve(config(self.addresses, uplink=True))
        async with trio.open_nursery() as nursery:
            for name in self.addresses:
                nursery.start_soon(self.start, name)
        await self.pings()
        await self.transfers()
        await self.kill_and_attach("vm2")
        for guest in self.guests.values():
            self.counted.append(await guest.ask_statistics())
        shown = (await self.stage.ask("guest.show", name="vm1"))[0]
        self.result |= report.counters(self.counted)
        self.result["pci"] = report.footprint(shown["pci"], devices=len(self.guests))

    async def start(self, name: str) -> None:
        """Start a guest, and note how it came up the first time."""
        began = time.perf_counter()
        await super().start(name)
        guest = self.guests[name]
        is_machine = isinstance(guest, MachineGuest)
        self.result["guests"][name] = self.result["guests"][name] or {
            "kind": "machine" if is_machine else "process",
            "boot_s": guest.boot_seconds if isinstance(guest, MachineGuest) else None,
            "running_s": time.perf_counter() - began,
            "function": guest.function,
        }

    async def pings(self) -> None:
        """The median round trip of each pair."""
        vm1, p3 = self.guests["vm1"], self.guests["p3"]
        self.result["ping_rtt_us"] = {
            "vm1-host": await self.ping(vm1, HOST, PINGS),
            "vm1-vm2": await self.ping(vm1, self.addresses["vm2"], PINGS),
            "vm1-p3": await self.ping(vm1, self.addresses["p3"], PINGS),
            "p3-host": await self.ping(p3, HOST, PINGS),
        }

    async def transfers(self) -> None:
        """TCP both ways of each pair; a device comes and goes meanwhile."""
        self.result |= {"tcp_gbit_s": {}, "checksums": {}}
        await self.move("vm1", "host")
        await self.move("host", "vm1")
        await self.move("vm1", "vm2", lambda: self.plug("vm1"))
        await self.move("vm2", "vm1")
        await self.move("vm1", "p3")
        await self.move("p3", "vm1")

    async def move(
        self,
        source: str,
        sink: str,
        meanwhile: Callable[[], Awaitable[object]] | None = None,
        mib: int = MIB,
        note: str = "",
    ) -> float:
        """Move `mib` by TCP, and compare what was sent with what came.

        Gives when all was sent. Raises DemoError.
        """
        address = self.addresses.get(sink, HOST)
        taken = await self._place(sink).sink(PORT, "receive")
        given = await self._place(source).start_traffic("send", address, PORT, str(mib))
        if await given.read_line() != "sending":
            raise DemoError(f"{source} does not send to {sink}")
        async with trio.open_nursery() as nursery:
            if meanwhile is not None:
                nursery.start_soon(meanwhile)
            sent = (await given.read_line()).split()
            ended = time.perf_counter()
        size, took, *crc = (await taken.read_line()).split() or ("0", "1")
        if sent != [size, *crc]:
            raise DemoError(f"{source} sent {sent}, but {sink} got {[size, *crc]}")
        pair = f"{source}-{sink}{note}"
        self.result["checksums"][pair] = {"bytes": int(size), "crc32": crc[0]}
        self.result["tcp_gbit_s"][pair] = int(size) * 8 / float(took) / 1e9
        return ended

    def _place(self, name: str) -> Place:
        return self.stage.host if name == "host" else self.guests[name]

    async def kill_and_attach(self, name: str) -> None:
        """SIGKILL a QEMU under the others' traffic; a new one takes its place."""
        self.counted.append(await self.guests[name].ask_statistics())
        ended = await self.move(
            "vm1", "p3", lambda: self._kill(name), KILL_MIB, " under the kill"
        )
        killed = self.result["killed"]
        killed["traffic_went_on_ms"] = (ended - killed.pop("at")) * 1e3
        began = time.perf_counter()
        await self.start(name)
        await self.ping(self.guests[name], HOST, 1)
        self.result["reattach_ms"] = (time.perf_counter() - began) * 1e3

    async def _kill(self, name: str) -> None:
        """SIGKILL, and wait until the daemon has nothing of the guest any more."""
        before = await self._held(name)
        await self.guests[name].kill()
        killed_at = time.perf_counter()
        after = await self._held(name)
        while any(after.values()):
            if time.perf_counter() > killed_at + FREED_WITHIN_S:
                raise DemoError(f"{name} is gone, but the daemon holds {after}")
            await trio.sleep(0.01)
            after = await self._held(name)
        self.result["killed"] = {
            "at": killed_at,
            "held_before": before,
            "held_after": after,
            "freed_ms": (time.perf_counter() - killed_at) * 1e3,
        }

    async def _held(self, name: str) -> dict[str, Any]:
        """What the daemon has of a guest now."""
        shown = (await self.stage.ask("guest.show", name=name))[0]
        memory = await self.stage.ask("stats", path=f"guests/{name}/memory")
        return {
            "attached": shown["attached"],
            "connections": shown["connections"],
            "regions": memory["regions"],
            "mapped_bytes": memory["mapped_bytes"],
        }
