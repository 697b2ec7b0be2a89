"""A round on a virtual machine: `python -m vbus.compare.machine WAY N [--loaded]`.

Boots one, tries everything once, prints one JSON object: what it found, or why it could
not. Runs in a network of its own (`machines.py`), where the host's end of the traffic
is. It ends when its stdin does. How many rounds there are is for `measure.py`.
"""

import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import click
import msgspec
import trio

from vbus.compare import inside
from vbus.compare.peer import ECHO, SINK, SOURCE, peer
from vbus.compare.round import IN_FLIGHT, Outcome, Round, Values, reason
from vbus.compare.subjects import Host, SubjectError, daemon
from vbus.errors import VbusError
from vbus.vm import image
from vbus.vm.arguments import bridge_device
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine, boot

CARDS = 32
"""So many devices are network cards; those beyond are sources of entropy."""
HOT = 3
MEMORY_MIB = 1024
DRIVER_MIB = 384
MORE_KIB = 192
"""Memory for the bridge's drivers: of the cards, and of each device beyond."""
READY_S = 120.0
TRIPS, URGENT_TRIPS, MESSAGES = 200, 100, 1000
TCP_S, MOST_S = 1.5, 4.0
HOST = "10.89.255.1"
NET = 16
_FIRST_SLOT, _SLOTS, _FUNCTIONS = 8, range(8, 0x1F), 8
_BEHIND = 31 * _FUNCTIONS
# One domain for all that the guest's kernel drives: no message for each of its pages.
_WORDS = ("iommu=pt", "ipv6.disable=1", "guest.modules=virtio_net,virtio-rng")


def mac(number: int) -> str:
    """The address of a card, in the network too (`address`)."""
    return f"02:76:00:00:{number >> 8:02x}:{number & 255:02x}"


def address(number: int) -> str:
    """The IPv4 address of a card, with its prefix."""
    return f"10.89.{number >> 8}.{(number & 255) + 1}/{NET}"


def device(number: int, *, card: bool) -> dict[str, Any]:
    """Say what a device is, whichever way it is shown."""
    if card:
        about = {"switch": "lan0", "mac": mac(number)}
        return {"class_name": "virtio-net", "attributes": about}
    return {"class_name": "virtio-rng", "attributes": {}}


class MachineWay(ABC):
    """A way to show devices to a virtual machine, and what drives them there."""

    name: ClassVar[str]

    def __init__(self, count: int) -> None:
        self.count = count
        self.cards = min(count, CARDS)

    async def setup(self, host: Host) -> None:
        """Add all devices."""
        for number in range(self.count):
            await self.add(host, number, card=number < CARDS)

    @abstractmethod
    async def add(
        self, host: Host, number: int, *, card: bool, layout: str = "modern"
    ) -> None:
        """Add a device."""

    @abstractmethod
    def arguments(self, host: Host) -> list[str]:
        """Give QEMU's options."""

    @abstractmethod
    async def start(self, vm: VirtualMachine) -> None:
        """Return once all devices have drivers that are ready."""

    @abstractmethod
    async def plug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        """Add a card; give the microseconds until the guest can use it."""

    @abstractmethod
    async def unplug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        """Remove it; give the microseconds until the guest has let go."""


class Bridge(MachineWay):
    """All devices behind one function, driven by `vbus guest run`."""

    name = "vbus-bridge"
    process: GuestProcess

    async def setup(self, host: Host) -> None:
        await host.control.request("bus.add", name="bus0")
        guest = {"name": "vm1", "bus": "bus0"}
        await host.control.request("guest.add", guest=guest)
        await super().setup(host)

    async def add(
        self, host: Host, number: int, *, card: bool, layout: str = "modern"
    ) -> None:
        about = device(number, card=card)
        await host.control.request(
            "device.add", name=f"dev{number}", buses=["bus0"], **about
        )

    def arguments(self, host: Host) -> list[str]:
        place = {"bus": "pcie.0", "addr": f"{_FIRST_SLOT:x}.0"}
        return bridge_device(Path(host.socket("vm1")), "vbus0", **place)

    async def start(self, vm: VirtualMachine) -> None:
        more = max(0, self.count - CARDS) * MORE_KIB >> 10
        words = ["--memory-mib", str(DRIVER_MIB + more), "--set", "dev0.prio=7"]
        self.process = await vm.start("vbus", "guest", "run", "--json", *words)
        for _ in range(self.count):
            await self._until("running")

    async def _until(self, state: str) -> None:
        with trio.move_on_after(READY_S) as limit:
            async for line in self.process:
                said = json.loads(line)
                if said["event"] == "device":
                    if said["state"] == "failed":
                        raise SubjectError(f"{said['name']}: {said['detail']}")
                    if said["state"] == state:
                        return
        if limit.cancelled_caught:
            raise SubjectError(f"no device was {state} for {READY_S:g} s")
        said = self.process.stderr.decode(errors="replace").strip()
        raise SubjectError(f"the guest's drivers ended: {said}")

    async def plug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        began = time.perf_counter()
        await self.add(host, number, card=True)
        await self._until("running")
        return (time.perf_counter() - began) * 1e6

    async def unplug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        began = time.perf_counter()
        await host.control.request("device.remove", name=f"dev{number}")
        await self._until("gone")
        return (time.perf_counter() - began) * 1e6


class Functions(MachineWay):
    """Each device a virtio-pci function, driven by the guest's kernel."""

    name = "function-each"

    def __init__(self, count: int) -> None:
        """Raises SubjectError if there are not so many slots."""
        super().__init__(count)
        self.bridges = bridges_for(count)

    async def add(
        self, host: Host, number: int, *, card: bool, layout: str = "modern"
    ) -> None:
        about = device(number, card=card)
        name = f"dev{number}"
        await host.control.request(
            "device.add", name=name, expose="pci", layout=layout, **about
        )

    def arguments(self, host: Host) -> list[str]:
        found = []
        for number in range(self.bridges):
            slot = f"addr={_SLOTS[number]:x}.0"
            found += ["-device", f"i82801b11-bridge,id=b{number},bus=pcie.0,{slot}"]
        for number in range(self.count):
            found += _function(host, number, **place(number, self.bridges))
        return found

    async def start(self, vm: VirtualMachine) -> None:
        await vm.python(inside.drivers, self.count, READY_S, timeout_s=READY_S + 10)

    async def plug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        # One that can leave again has no MSI-X (docs/qemu.md).
        return await self._plug(host, vm, number, "modern", number - self.count)

    async def _plug(
        self, host: Host, vm: VirtualMachine, number: int, layout: str, port: int
    ) -> float:
        began = time.perf_counter()
        await self.add(host, number, card=True, layout=layout)
        [_, text] = _function(host, number, bus=f"port{port}")
        await vm.qmp.execute("device_add", **json.loads(text))
        await vm.python(inside.appears, mac(number), READY_S, timeout_s=READY_S + 10)
        return (time.perf_counter() - began) * 1e6

    async def unplug(self, host: Host, vm: VirtualMachine, number: int) -> float:
        other = number + HOT
        port = HOT + number - self.count
        await self._plug(host, vm, other, "legacy-intx", port)
        took = 0.0

        async def gone() -> None:
            nonlocal took
            await vm.qmp.wait_event("DEVICE_DELETED")
            took = (time.perf_counter() - began) * 1e6

        with trio.fail_after(READY_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gone)
                began = time.perf_counter()
                await vm.qmp.execute("device_del", id=f"dev{other}")
        return took


WAYS: dict[str, type[MachineWay]] = {way.name: way for way in (Bridge, Functions)}


def _function(host: Host, number: int, **properties: object) -> list[str]:
    name = f"dev{number}"
    return bridge_device(
        host.runtime / "functions" / f"{name}.sock", name, **properties
    )


def bridges_for(count: int) -> int:
    """How many conventional bridges so many functions need, eight to a slot."""
    bridges = 0
    while (len(_SLOTS) - bridges) * _FUNCTIONS + bridges * _BEHIND < count:
        bridges += 1
        if bridges > len(_SLOTS):
            most = len(_SLOTS) * _BEHIND
            raise SubjectError(
                f"slots: {most:,} functions behind {bridges - 1} bridges"
            )
    return bridges


def place(number: int, bridges: int) -> dict[str, object]:
    """Give bus and address of a function: bus 0's slots first."""
    slots = _SLOTS[bridges:]
    bus, first = "pcie.0", slots.start
    if number >= len(slots) * _FUNCTIONS:
        number -= len(slots) * _FUNCTIONS
        bus, first = f"b{number // _BEHIND}", 1
        number %= _BEHIND
    at = f"{first + number // _FUNCTIONS:x}.{number % _FUNCTIONS}"
    return {"bus": bus, "addr": at, "multifunction": True}


async def one_round(way: MachineWay, *, loaded: bool) -> Round:
    """Start both, measure everything once, end both. Raises VbusError, OSError."""
    found = Round()
    async with daemon() as host:
        await _network(host)
        memory, fds = host.memory, host.fds
        await way.setup(host)
        found.values["memory_idle"] = (host.memory - memory) / way.count
        found.values["fds_idle"] = (host.fds - fds) / way.count
        async with _booted(way, host) as vm, peer(HOST):
            began = time.perf_counter()
            await way.start(vm)
            ready_s = vm.boot_seconds + time.perf_counter() - began
            found.values |= {"boot": vm.boot_seconds * 1e6, "bring_up": ready_s * 1e6}
            found.values |= await _shown(host, vm)
            found.values["qemu_fds"] = len(os.listdir(f"/proc/{vm.pid}/fd"))
            cards = [[mac(number), address(number)] for number in range(way.cards)]
            names = await vm.python(inside.set_up, cards, READY_S)
            found.values |= await _traffic(vm, names)
            if loaded:
                found.loads |= await _loads(vm, names)
                found.values |= await _urgent(way, vm, names)
            found.values["memory_open"] = (host.memory - memory) / way.count
            found.values["fds_open"] = (host.fds - fds) / way.count
            found.values |= await _hot_plug(way, host, vm)
    return found


async def _network(host: Host) -> None:
    """A switch with the host on it."""
    ask = partial(host.control.request, "device.add", buses=[])
    await ask(name="lan0", class_name="switch", attributes={})
    about = {"switch": "lan0", "ifname": "vbus0", "address": f"{HOST}/{NET}"}
    await ask(name="uplink0", class_name="switch-tap", attributes=about)


@asynccontextmanager
async def _booted(way: MachineWay, host: Host) -> AsyncIterator[VirtualMachine]:
    more = max(0, way.count - CARDS) * MORE_KIB >> 10
    machine = boot(
        await trio.to_thread.run_sync(image.cached),
        memory_mib=MEMORY_MIB + 2 * more,
        root_ports=2 * HOT,
        words=_WORDS,
        extra=way.arguments(host),
        timeout_s=READY_S,
    )
    async with machine as vm:
        yield vm


async def _shown(host: Host, vm: VirtualMachine) -> Values:
    """What firmware and kernel asked until all was up, and what interrupts it takes."""
    seen = await host.accesses()
    taken = await vm.python(inside.interrupts)
    return {
        "config_accesses": seen["config_reads"] + seen["config_writes"],
        "region_accesses": seen["region_reads"] + seen["region_writes"],
        "functions": taken["functions"],
        "vectors": taken["vectors"],
        "shared_lines": taken["shared"],
    }


async def _traffic(vm: VirtualMachine, names: Sequence[str]) -> Values:
    card = names[-1]
    await vm.python(inside.trips, card, HOST, ECHO, 20, MOST_S)
    times = await vm.python(inside.trips, card, HOST, ECHO, TRIPS, MOST_S)
    pushed = await vm.python(inside.push, card, HOST, SINK, TCP_S)
    pulled = await vm.python(inside.pull, card, HOST, SOURCE, TCP_S)
    return {"round_trip": median(times), "tcp_out": pushed, "tcp_in": pulled}


async def _loads(vm: VirtualMachine, names: Sequence[str]) -> dict[int, Values]:
    found = {}
    for name in names:
        await vm.python(
            inside.trips, name, HOST, ECHO, 1, MOST_S
        )  # the ARP table is filled
    for in_flight in IN_FLIGHT:
        if in_flight > 4 * len(names):
            break
        before = await vm.python(inside.interrupts)
        got = await vm.python(
            inside.load, names, HOST, ECHO, in_flight, MESSAGES, MOST_S
        )
        after = await vm.python(inside.interrupts)
        interrupts = after["total"] - before["total"]
        found[in_flight] = {
            "interrupts_per_1000": 1000 * interrupts / got["answers"],
            "messages_per_s": got["answers"] / got["seconds"],
        }
    return found


async def _urgent(way: MachineWay, vm: VirtualMachine, names: Sequence[str]) -> Values:
    """Round trips of two cards, of which the first one's events have the highest
    priority behind the bridge, while the others are flooded."""
    if len(names) < 3:
        return {}
    found = {}
    flooded = list(names[2:])
    async with trio.open_nursery() as nursery:
        flood = partial(
            vm.python, inside.load, flooded, HOST, ECHO, 4 * len(flooded), 1 << 60, 50
        )
        nursery.start_soon(flood)
        await trio.sleep(1)
        for name, card in (("urgent_first", names[0]), ("urgent_flat", names[1])):
            if name == "urgent_flat" or isinstance(way, Bridge):
                times = await vm.python(
                    inside.trips, card, HOST, ECHO, URGENT_TRIPS, 2 * MOST_S
                )
                found[name] = median(times)
                found[f"{name}_high"] = sorted(times)[int(0.99 * (len(times) - 1))]
        nursery.cancel_scope.cancel()
    return found


async def _hot_plug(way: MachineWay, host: Host, vm: VirtualMachine) -> Values:
    numbers = range(way.count, way.count + HOT)
    added = [await way.plug(host, vm, number) for number in numbers]
    removed = [await way.unplug(host, vm, number) for number in numbers]
    return {"hot_add": median(added), "hot_remove": median(removed)}


async def _until_stdin_ends(scope: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        async for _ in stream:
            pass
    scope.cancel()


async def _until_terminated(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await anext(signals)
    scope.cancel()


async def _run(way: type[MachineWay], count: int, *, loaded: bool) -> None:
    async with trio.open_nursery() as nursery:
        for end in (_until_stdin_ends, _until_terminated):
            nursery.start_soon(end, nursery.cancel_scope)
        try:
            outcome = Outcome(await one_round(way(count), loaded=loaded))
        except* (VbusError, OSError, trio.TooSlowError) as group:
            outcome = Outcome(stopped=reason(group))
        sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
        sys.stdout.buffer.flush()
        nursery.cancel_scope.cancel()


@click.command()
@click.argument("way", type=click.Choice(list(WAYS)))
@click.argument("count", type=click.IntRange(1))
@click.option("--loaded", is_flag=True, help="Try rising load as well.")
def main(way: str, count: int, loaded: bool) -> None:
    """Measure one machine once."""
    trio.run(partial(_run, WAYS[way], count, loaded=loaded))


if __name__ == "__main__":
    main()
