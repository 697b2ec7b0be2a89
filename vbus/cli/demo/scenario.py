"""What happens in the demo, in order; `run` plays it."""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import trio

from vbus.cli.demo import report
from vbus.cli.demo.stage import DemoError, Guest, Place, Stage

PINGS = 200
HOST = "10.90.0.1"
ADDRESSES = {"g1": "10.90.0.11", "g2": "10.90.0.12"}
HOT, HOT_ADDRESS = "net-hot", "10.91.0.11"
_UPLINK = f"""
[[device]]
name = "uplink"
class = "switch-tap"
switch = "lan0"
ifname = "vbus-host"
address = "{HOST}/24"
"""
_GUEST = """
[[bus]]
name = "{0}"
[[device]]
name = "net-{0}"
class = "venet"
bus = "{0}"
switch = "lan0"
[[guest]]
name = "{0}"
bus = "{0}"
"""


def config(guests: Iterable[str], *, uplink: bool) -> str:
    """Write the daemon's configuration: a switch, a bus and a port for each guest."""
    parts = ['[[device]]\nname = "lan0"\nclass = "switch"\n']
    parts += [_UPLINK] if uplink else []
    return "".join([*parts, *map(_GUEST.format, guests)])


class Scenario:
    """One run of the demo; fills `result` as it goes."""

    def __init__(self, stage: Stage, seconds: float, *, frames: bool) -> None:
        self.stage = stage
        self.addresses = ADDRESSES
        self.seconds = seconds
        self.frames = frames
        self.guests: dict[str, Guest] = {}
        self.counted: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}

    async def run(self) -> None:
        """Everything. Raises DemoError, VbusError."""
        await self.stage.serve(config(self.addresses, uplink=not self.frames))
        for name in self.addresses:
            await self.start(name)
        if self.frames:
            await self.generated()
        else:
            await self.pings()
            await self.transfers()
        await self.kill_and_attach("g2")
        for guest in self.guests.values():
            self.counted.append(await guest.ask_statistics())
        shown = (await self.stage.ask("guest.show", name="g1"))[0]
        self.result |= report.counters(self.counted)
        self.result["pci"] = report.footprint(shown["pci"], devices=len(self.guests))

    async def start(self, name: str) -> None:
        """Start a guest and wait until its interface works."""
        options = ["--frames"]
        if not self.frames:
            options = [
                "--address",
                f"net-{name}={self.addresses[name]}/24",
                "--address",
                f"{HOT}={HOT_ADDRESS}/24",
            ]
        self.guests[name] = guest = await self.stage.guest(name, *options)
        await guest.device(f"net-{name}", "running")

    async def pings(self) -> None:
        """The median round trip of each pair."""
        first, second = self.guests["g1"], self.guests["g2"]
        self.result["ping_rtt_us"] = {
            "g1-host": await self.ping(first, HOST, PINGS),
            "g2-host": await self.ping(second, HOST, PINGS),
            "g1-g2": await self.ping(first, ADDRESSES["g2"], PINGS),
        }

    async def ping(self, place: Guest, address: str, count: int) -> float:
        said = await place.traffic("ping", address, str(count))
        trips = [float(line) for line in said.split()]
        if len(trips) < count / 2:
            raise DemoError(f"{place.name}: {len(trips)} of {count} pings answered")
        return statistics.median(trips)

    async def transfers(self) -> None:
        """TCP both ways between the guests and with the host; a device comes and goes
        meanwhile."""
        first, second = self.guests["g1"], self.guests["g2"]
        result = self.result["tcp_gbit_s"] = {}
        host = self.stage.host
        result["g1-host"] = await self.transfer(first, host, HOST)
        result["host-g1"] = await self.transfer(host, first, ADDRESSES["g1"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.plug, "g1")
            result["g1-g2"] = await self.transfer(first, second, ADDRESSES["g2"])
            result["g2-g1"] = await self.transfer(second, first, ADDRESSES["g1"])

    async def transfer(self, source: Place, sink: Place, address: str) -> float:
        output = await sink.sink("7007")
        await source.traffic("source", address, "7007", str(self.seconds))
        size, took = (await output.read_line()).split()
        return int(size) * 8 / float(took) / 1e9

    async def plug(self, name: str) -> None:
        """Hot-add a device to a guest and drop it again."""
        guest = self.guests[name]
        start = time.perf_counter()
        await self.stage.ask(
            "device.add",
            name=HOT,
            class_name="venet",
            buses=[name],
            attributes={"switch": "lan0"},
        )
        await guest.device(HOT, "running")
        added = time.perf_counter()
        await self.stage.ask("device.remove", name=HOT)
        await guest.device(HOT, "gone")
        self.result["hot_plug_ms"] = {
            "add_to_running": (added - start) * 1e3,
            "remove_to_gone": (time.perf_counter() - added) * 1e3,
        }

    async def kill_and_attach(self, name: str) -> None:
        """SIGKILL a guest; a new one takes its place and answers."""
        old = self.guests[name]
        self.counted.append(await old.ask_statistics())
        await old.kill()
        start = time.perf_counter()
        await self.start(name)
        if not self.frames:
            await self.ping(self.guests[name], HOST, 1)
        self.result["reattach_ms"] = (time.perf_counter() - start) * 1e3

    async def generated(self) -> None:
        """Let the guests exchange generated frames, a device comes and goes."""
        await self.plug("g1")
        before = [await guest.ask_statistics() for guest in self.guests.values()]
        start = time.perf_counter()
        await trio.sleep(2 * self.seconds)
        after = [await guest.ask_statistics() for guest in self.guests.values()]
        took = time.perf_counter() - start
        self.result |= report.generated(before, after, took)
